"""The reverse step: the formula against diffusers and a plain restatement, every backend against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastddpm_kernels.philox import STREAM_KNOWN, STREAM_STEP, normal, sample_keys
from fastddpm_kernels.reverse_step import reverse_step, reverse_step_
from fastddpm_kernels.testing import (
    SHAPES,
    assert_close,
    check_compiles,
    check_op,
    check_refuses,
    gradients,
    to_layout,
)
from torch import Tensor

HALF, BFLOAT = torch.float16, torch.bfloat16
# A row of every kind; in the second neither noise is added (S = 0) nor the x0 before read (F = 0).
TABLE = torch.tensor([[1.1, -0.4, 0.6, 0.3, 0.0, 0.0, 0.25], [0.9, -0.2, 1.0, 0.1, -0.1, 0.0, 0.0],
                      [1.2, -0.7, 0.8, 0.2, 0.15, -0.3, 0.5], [0.0, 1.0, 0.5, 0.4, 0.0, 0.2, 1.0]])  # fmt: skip
LOG_VARIANCE = torch.tensor([[-3.0, -2.5], [-46.0, -9.0], [-2.0, -1.0], [-1.5, -1.4]])
KNOWN_TABLE = torch.tensor([[0.7, 0.7], [1.0, 0.0], [0.9, 0.3], [0.2, 0.95]])
EVERYTHING = ("keys", "x0_prev", "clip_range", "learned", "guided", "known", "per_sample")


@dataclass(frozen=True)
class Case:
    why: str
    options: tuple[str, ...] = EVERYTHING
    shape: tuple[int, ...] = (3, 3, 13, 17)
    rows: tuple[int, ...] = (2,)
    dtype: torch.dtype = torch.float32  # of the network: its output, and its next input
    layout: str = "contiguous"  # of the same


CASES = {
    "no_noise": Case("three terms and nothing else: DDIM", ()),
    "philox": Case("noise is made in registers", ("keys",)),
    "ancestral": Case("the commonest loop, and its last row, without noise", ("keys", "clip_range"), rows=(1, 2)),
    "given": Case("noise is read", ("noise", "clip_range")),
    "multistep": Case("a row with F = 0 ignores x0_prev, others read it", ("x0_prev", "clip_range"), rows=(1, 2)),
    "stochastic_multistep": Case("noise and x0_prev", ("x0_prev", "keys")),
    "learned": Case("twice the channels; with S = 0 no variance", ("keys", "clip_range", "learned"), rows=(1, 2)),
    "learned_given": Case("the gradient of the noise has the learned scale", ("noise", "learned")),
    "guided": Case("twice the batch", ("keys", "guided")),
    "guided_per_sample": Case("a scale for each sample", ("noise", "guided", "per_sample")),
    "guided_learned": Case("v is the conditional half's", ("keys", "clip_range", "guided", "learned")),
    "known": Case("a second noise, from its own stream", ("keys", "clip_range", "known"), rows=(1, 2)),
    "known_given": Case("two given noises", ("noise", "known", "known_noise")),
    "known_noise_alone": Case("noise of the known region alone", ("known", "known_noise")),
    "threshold": Case("each sample is cut at its own bound, or not at all", ("threshold",), rows=(0, 2)),
    "threshold_half": Case("a bound per sample, halves in and out", ("threshold", "keys"), dtype=HALF),
    "threshold_guided": Case("all that goes with a threshold", ("threshold", "keys", "guided", "known", "x0_prev")),
    "everything": Case("no option disturbs another", rows=(0, 1, 2, 3)),
    "half": Case("x stays float32 between halves", shape=(2, 3, 8, 9), dtype=HALF),
    "half_channels_last": Case("out and net_in in other strides than x", shape=(2, 3, 8, 9), dtype=HALF,
                               layout="channels_last"),
    "bfloat16": Case("as half", shape=(2, 3, 8, 9), dtype=BFLOAT),
    "bfloat16_channels_last": Case("as half_channels_last", shape=(2, 3, 8, 9), dtype=BFLOAT, layout="channels_last"),
    "channels_last": Case("as half_channels_last, in float32", layout="channels_last"),
    "vector": Case("no space", shape=(3, 2), dtype=HALF, rows=(3,)),
    "signal": Case("an odd number of pixels", shape=(2, 4, 19), dtype=HALF, rows=(3,)),
    "many_channels": Case("more channels than pixels", shape=(2, 50, 3), dtype=HALF, rows=(3,)),
    "volume": Case("three dimensions", shape=(2, 3, 2, 5, 4), dtype=HALF, rows=(3,)),
    "one_value": Case("less than one vector", shape=(1, 1), dtype=HALF, rows=(3,)),
    "one_pixel": Case("sizes of one", shape=SHAPES["one_pixel"][0]),
    "one_channel": Case("contiguous and channels-last at once", shape=SHAPES["one_channel"][0], layout="channels_last"),
    "wide": Case("many channels of few pixels", shape=SHAPES["wide"][0], layout="channels_last"),
    "many_pixels": Case("several programs a sample", shape=SHAPES["many_pixels"][0]),
    "empty_batch": Case("nothing to do", shape=SHAPES["empty_batch"][0]),
    "threshold_empty_batch": Case("no bounds", ("threshold",), SHAPES["empty_batch"][0]),
}  # fmt: skip


def make(shape: tuple[int, ...], options: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return arguments of `reverse_step` for a state of this shape."""
    n = shape[0]
    learned, guided = "learned" in options, "guided" in options
    out = torch.randn(n * (1 + guided), shape[1] * (1 + learned), *shape[2:], device=device)
    arguments: dict[str, Any] = {"x": torch.randn(shape, device=device), "out": (out / 2).to(dtype)}
    arguments["table"] = TABLE.to(device)
    if "keys" in options:
        arguments["keys"] = sample_keys([2**63 + 1] * n, range(n), device)
    for name in ("noise", "x0_prev", "known_noise"):
        if name in options:
            arguments[name] = torch.randn(shape, device=device)
    if "clip_range" in options:
        arguments["clip_range"] = 0.8
    if "threshold" in options:  # cuts much, little and nothing
        arguments["threshold"] = torch.tensor([0.6, 1.7, 100.0], device=device)[torch.arange(n, device=device) % 3]
    if learned:
        arguments["log_variance"] = LOG_VARIANCE.to(device)
    if guided:
        scales = torch.tensor([3.0, 1.0, 0.0, 7.5], device=device)
        arguments["guidance_scale"] = scales[torch.arange(n) % 4] if "per_sample" in options else scales[:1]
    if "known" in options:
        arguments["known"] = torch.rand(shape[1:], device=device)
        arguments["known_mask"] = torch.rand(n, 1, *shape[2:], device=device).round()
        arguments["known_table"] = KNOWN_TABLE.to(device)
    return arguments


def call(arguments: dict[str, Any], row: int, backend: str, **changes: Any) -> tuple[Tensor, Tensor]:
    step = torch.tensor([row], device=arguments["x"].device)
    return reverse_step(**arguments | changes, step=step, backend=backend)


def call_in_place(arguments: dict[str, Any], row: int, backend: str, net_in: Tensor) -> tuple[Tensor, Tensor]:
    """Run `reverse_step_` on copies of the state, and return (x, x0)."""
    options = {name: value for name, value in arguments.items() if name != "x0_prev"}
    x, multistep = arguments["x"].detach().clone(), "x0_prev" in arguments
    x0 = arguments["x0_prev"].detach().clone() if multistep else torch.full_like(x, math.nan)
    step = torch.tensor([row], device=x.device)
    reverse_step_(**options | {"x": x}, step=step, x0=x0, net_in=net_in, multistep=multistep, backend=backend)
    return x, x0


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_results_gradients_and_in_place(case: Case, backend: str, device: torch.device) -> None:
    arguments = make(case.shape, case.options, case.dtype, device)
    for row in case.rows:

        def run(backend: str, dtype: torch.dtype, row: int = row) -> dict[str, Tensor]:
            leaves = {n: arguments[n].to(dtype).requires_grad_() for n in ("x", "x0_prev", "noise") if n in arguments}
            of_network = dtype if dtype == torch.float64 else case.dtype
            leaves["out"] = arguments["out"].detach().to(of_network, copy=True).requires_grad_()
            given = arguments | leaves | {"out": to_layout(leaves["out"], case.layout)}
            results = dict(zip(("x_next", "x0"), call(given, row, backend), strict=True))
            assert all(value.dtype == dtype for value in results.values())
            size = (len(given["out"]), *case.shape[1:])
            net_in = to_layout(torch.full(size, math.nan, dtype=of_network, device=device), case.layout)
            x, x0 = call_in_place(given, row, backend, net_in)
            for half in net_in.split(len(x)) if len(x) else ():
                assert torch.equal(half, x.to(of_network))
            return results | {"x in place": x, "x0 in place": x0} | gradients(results, leaves)

        check_op(run, backend, torch.float32, rounds=4)


def restatement(arguments: dict[str, Any], row: int) -> tuple[Tensor, Tensor]:
    """Compute the formula once more, sample by sample, in float64 on the CPU."""
    a = {k: v.double().cpu() if isinstance(v, Tensor) and k != "keys" else v for k, v in arguments.items()}
    coefficient = a["table"][row].tolist()
    n, channels = a["x"].shape[:2]
    results = []
    for i in range(n):
        x, out = a["x"][i], a["out"][i]
        if "guidance_scale" in a:
            conditional = a["out"][n + i]
            scale = float(a["guidance_scale"][i if len(a["guidance_scale"]) > 1 else 0])
            out = torch.cat([(1 - scale) * out[:channels] + scale * conditional[:channels], conditional[channels:]])
        prediction, v = out[:channels], out[channels:]
        x0 = coefficient[0] * x + coefficient[1] * prediction
        if "clip_range" in a:
            x0 = torch.where(x0.abs() > a["clip_range"], a["clip_range"] * x0.sign(), x0)
        if "threshold" in a:
            bound = a["threshold"][i]
            x0 = torch.minimum(x0.abs(), bound).copysign(x0) / bound
        x_next = coefficient[2] * x0 + coefficient[3] * x + coefficient[4] * prediction
        if "x0_prev" in a:
            x_next = x_next + coefficient[5] * a["x0_prev"][i]
        if "keys" in a or "noise" in a:
            std = coefficient[6] * torch.ones_like(x)
            if "log_variance" in a:
                log_min, log_max = a["log_variance"][row].tolist()
                std = std * torch.exp((log_max * (v + 1) / 2 + log_min * (1 - v) / 2) / 2)
            z = a["noise"][i] if "noise" in a else made(a["keys"][i : i + 1], x, row, STREAM_STEP)
            x_next = x_next + std * z
        if "known" in a:
            z2 = a["known_noise"][i] if "known_noise" in a else made(a["keys"][i : i + 1], x, row, STREAM_KNOWN)
            signal, sigma = a["known_table"][row].tolist()
            mask = a["known_mask"][i]
            x_next = mask * (signal * a["known"] + sigma * z2) + (1 - mask) * x_next
        results.append((x_next, x0))
    return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])


def made(keys: Tensor, x: Tensor, step: int, stream: int) -> Tensor:
    return normal(keys.cpu(), x.shape, step=step, stream=stream, backend="reference")[0].double()


@pytest.mark.parametrize("combination", {case.options: name for name, case in CASES.items()}, ids="-".join)
def test_reference_is_the_formula(combination: tuple[str, ...]) -> None:
    arguments = make((3, 2, 4, 5), combination, torch.float32, torch.device("cpu"))
    wide = {k: arguments[k].double() for k in ("x", "x0_prev") if k in arguments}
    for row in range(len(TABLE)):
        for actual, expected in zip(
            call(arguments, row, "reference", **wide), restatement(arguments, row), strict=True
        ):
            # The restatement's own noise is rounded to float32 where it is made, not given.
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=5e-7 if "keys" in arguments else 1e-12)


def test_layouts(backend: str, device: torch.device) -> None:
    """Out and masks in any strides, and masks that are broadcast, give the same bits."""
    arguments = make((2, 3, 6, 10), EVERYTHING, torch.float32, device)
    expected = call(arguments, 2, backend)
    out, mask = arguments["out"], arguments["known_mask"]
    wide = torch.full((4, 8, 6, 10), math.nan, device=device)
    wide[:, :6] = out
    others = [
        {"out": out.contiguous(memory_format=torch.channels_last)},
        {"out": wide[:, :6]},
        {"out": wide.contiguous(memory_format=torch.channels_last)[:, :6]},
        {"out": out.transpose(2, 3).contiguous().transpose(2, 3)},
        {"known_mask": mask.expand(2, 3, 6, 10).contiguous(memory_format=torch.channels_last)},
        {"known": arguments["known"].expand(2, 3, 6, 10).contiguous()},
    ]
    for change in others:
        for one, other in zip(call(arguments, 2, backend, **change), expected, strict=True):
            assert torch.equal(one, other)
    for shape in [(6, 10), (1, 1, 6, 10), (2, 1, 1, 1), (3, 1, 1), (2, 3, 6, 1), ()]:
        arguments["known_mask"] = torch.rand(shape, device=device)
        whole = arguments | {"known_mask": arguments["known_mask"].expand(2, 3, 6, 10).contiguous()}
        for one, other in zip(call(arguments, 2, backend), call(whole, 2, backend), strict=True):
            assert torch.equal(one, other)


def test_nan_of_the_network_is_not_hidden(backend: str, device: torch.device) -> None:
    for bound in ("clip_range", "threshold"):
        arguments = make((1, 2, 4, 4), ("keys", bound), torch.float32, device)
        arguments["out"][0, 1, 2, 3] = math.nan
        for result in call(arguments, 2, backend):
            assert int(result.isnan().sum()) == 1


def test_unwritten_x0_is_not_read(backend: str, device: torch.device) -> None:
    """A row with F = 0, the first of every multistep sampler, finds in x0 whatever was there."""
    arguments = make((2, 3, 4, 4), ("x0_prev", "clip_range"), torch.float32, device)
    arguments["x0_prev"].fill_(math.nan)
    assert not call(arguments, 1, backend)[0].isnan().any()
    assert call(arguments, 2, backend)[0].isnan().all()


def test_samples_depend_on_their_key_alone(backend: str, device: torch.device) -> None:
    arguments = make((4, 3, 9, 7), ("keys", "clip_range", "known"), torch.float32, device)
    x_next, x0 = call(arguments, 2, backend)
    for rows in (slice(0, 1), slice(1, 4)):
        part = {k: arguments[k][rows] for k in ("x", "out", "keys", "known_mask")}
        for one, whole in zip(call(arguments, 2, backend, **part), (x_next, x0), strict=True):
            assert torch.equal(one, whole[rows])


def test_in_place_needs_neither_x0_nor_net_in(backend: str, device: torch.device) -> None:
    arguments = make((2, 3, 5), ("keys", "clip_range"), torch.float32, device)
    given = arguments | {"x": arguments["x"].clone(), "step": torch.tensor([0], device=device), "backend": backend}
    reverse_step_(**given)
    assert_close(given["x"], call(arguments, 0, backend)[0].double())


def test_gradient_stops_at_the_clip(backend: str, device: torch.device) -> None:
    table = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]], device=device)
    x = torch.tensor([[-1.5, -0.9, 0.0, 0.9, 1.5]], device=device, requires_grad=True)
    step = torch.tensor([0], device=device)
    x_next, x0 = reverse_step(x, torch.zeros_like(x), table, step, clip_range=1.0, backend=backend)
    assert torch.autograd.grad((x_next + x0).sum(), x)[0].tolist() == [[0, 2, 2, 2, 0]]


@pytest.mark.parametrize(
    ("backend", "options"),
    [("triton", ("keys", "clip_range")), ("eager", EVERYTHING)],
    indirect=["backend"],
    ids=["triton-ancestral", "eager-everything"],
)
def test_compiles(backend: str, options: tuple[str, ...], device: torch.device) -> None:
    arguments = make((2, 3, 4, 5), options, torch.float32, device)
    start = arguments.pop("x")

    def functional(x: Tensor) -> Tensor:
        x_next, x0 = reverse_step(x * 1.5, **arguments, step=torch.tensor([2], device=device), backend=backend)
        return x_next.square() + x0

    def loop(x: Tensor, net_in: Tensor) -> Tensor:
        x = x * 2
        given = {name: value for name, value in arguments.items() if name not in ("out", "x0_prev")}
        for row in (0, 2):
            step = torch.tensor([row], device=device)
            out = arguments["out"] + net_in[:, :1]
            reverse_step_(x, out, **given, step=step, net_in=net_in, backend=backend)
        return x

    check_compiles(functional, start.requires_grad_())
    check_compiles(loop, start.detach(), torch.zeros(len(arguments["out"]), 3, 4, 5, device=device))


# Rows as a multistep sampler has them: no past at first, one prediction more at each step, then all of them; some
# factors are 0 again. Columns A B C D E F S F2 F3 F4.
WARMING_UP = torch.tensor([
    [1.1, -0.4, 0.9, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0],
    [1.0, -0.3, 1.4, 0.3, 0.0, -0.5, 0.2, 0.0, 0.0, 0.0],
    [0.9, -0.2, 1.6, 0.2, 0.1, -0.9, 0.0, 0.3, 0.0, 0.0],
    [0.8, -0.2, 1.7, 0.1, 0.2, -1.1, 0.1, 0.6, -0.2, 0.0],
    [0.7, -0.1, 1.8, 0.1, 0.1, 0.0, 0.0, 0.7, -0.3, 0.1],
    [0.6, -0.1, 1.9, 0.1, 0.0, -1.3, 0.3, 0.8, 0.0, 0.2],
])  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "triton", "native"], indirect=True)
@pytest.mark.parametrize(
    ("past", "shape", "options"),
    [
        (1, (2, 3, 4, 5), ("noise", "clip_range")),
        (2, (3, 5, 7), ("noise",)),
        (3, (2, 2, 33, 33), ("noise", "guided", "known")),
        (3, (2, 3, 4, 5), ("noise", "clip_range")),
    ],
    ids=["small", "one dimension", "several blocks", "three before"],
)
def test_history(past: int, shape: Any, options: tuple[str, ...], backend: str, device: torch.device) -> None:
    """Every step against the sum of what was predicted before. Nothing that no step wrote is read."""
    arguments = make(shape, options, torch.float32, device)
    table = WARMING_UP[:, : 7 + past].contiguous().to(device)
    outs, noises = torch.randn(2, len(table), *arguments["out"].shape, device=device)
    if "known" in options:
        arguments["known_table"] = torch.full((len(table), 2), 0.5, device=device)
        arguments["known_noise"] = arguments["noise"]
    x, x0 = arguments.pop("x").clone(), torch.full(shape, math.nan, device=device)
    history = torch.full((past, *shape), math.nan, device=device)
    seen: list[Tensor] = []
    for row, (out, noise) in enumerate(zip(outs, noises[:, : shape[0]], strict=True)):
        plain = table[row : row + 1, :7].clone()
        plain[0, 5] = 0
        step = torch.zeros(1, dtype=torch.int64, device=device)
        given = arguments | {"x": x, "out": out, "noise": noise, "step": step, "table": plain}
        factors = table[row, [5, 7, 8, 9][: past + 1]].tolist()
        older = sum((factor * m for factor, m in zip(factors, seen[::-1], strict=False)), 0 * x)
        mask = torch.ones_like(x)
        if "known" in options:  # what is known is blended with the sum
            given["known_table"] = arguments["known_table"][:1]
            mask = (arguments["known_mask"].expand(shape) == 0).float()
        following, predicted = reverse_step(**given, backend="reference")
        expected = following + mask * older
        step = torch.tensor([row], device=device)
        net_in = torch.full((len(out), *shape[1:]), math.nan, device=device)
        reverse_step_(
            **arguments | {"x": x, "out": out, "noise": noise, "table": table}, step=step, x0=x0, net_in=net_in,
            multistep=True, history=history, backend=backend,
        )  # fmt: skip
        assert_close(x, expected.double())
        assert_close(x0, predicted.double())
        assert torch.equal(net_in[: len(x)], x)
        for kept, prediction in zip(history, seen[::-1], strict=False):
            assert torch.equal(kept, prediction)
        seen.append(x0.clone())


@pytest.mark.parametrize("options", [("noise", "learned", "threshold"), EVERYTHING], ids="-".join)
def test_custom_ops(on_triton: torch.device, options: tuple[str, ...]) -> None:
    a = make((2, 3, 4, 5), options, torch.float32, on_triton)
    names = ("keys", "noise", "x0_prev", "clip_range", "log_variance", "guidance_scale", "known", "known_mask",
             "known_table", "known_noise", "threshold")  # fmt: skip
    given = {name: a.get(name) for name in names}
    step = torch.tensor([2], device=on_triton)
    x, out = a["x"].clone().requires_grad_(), a["out"].clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastddpm.reverse_step.default, (x, out, a["table"], step, *given.values()))
    given["x0_prev"] = None
    net_in = torch.zeros(len(a["out"]), 3, 4, 5, device=on_triton).half()
    history = None if "keys" in options else torch.zeros(2, *a["x"].shape, device=on_triton)
    table = a["table"] if history is None else torch.cat([a["table"], a["table"][:, :2]], dim=1)
    arguments = (a["x"], a["out"], table, step, torch.zeros_like(a["x"]), net_in, True, history, *given.values())
    torch.library.opcheck(torch.ops.fastddpm.reverse_step_inplace.default, arguments)


def test_step_out_of_range_is_nan(on_triton: torch.device) -> None:
    """Where the step is not checked, nothing that lies beyond the table is passed off as a result."""
    x, table = torch.zeros(2, 3, device=on_triton), TABLE.to(on_triton)
    for row in (-1, len(TABLE)):
        step = torch.tensor([row], device=on_triton)
        x_next, x0 = torch.ops.fastddpm.reverse_step(x, x, table, step, *[None] * 10)
        assert x_next.isnan().all()
        assert x0.isnan().all()


@pytest.mark.gpu
def test_cuda_graph(device: torch.device) -> None:
    """One captured step, replayed over the table with nothing changed but the counter on the device."""
    arguments = make((2, 3, 8, 8), ("keys", "clip_range"), HALF, device)
    options = {k: arguments[k] for k in ("keys", "clip_range")}
    start = arguments["x"]

    def body(x: Tensor, step: Tensor, net_in: Tensor) -> None:
        reverse_step_(x, arguments["out"], arguments["table"], step, net_in=net_in, **options)
        step.add_(1)

    plain, net_in = start.clone(), torch.empty_like(start).half()
    step = torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(len(TABLE)):
        body(plain, step, net_in)
    x, graph = start.clone(), torch.cuda.CUDAGraph()
    step.zero_()
    with torch.cuda.graph(graph):
        body(x, step, net_in)
    x.copy_(start)
    step.zero_()
    for _ in range(len(TABLE)):
        graph.replay()
    assert torch.equal(x, plain)


GOOD = {**make((2, 3, 4), ("keys",), torch.float32, torch.device("cpu")), "step": torch.tensor([0])}
X, BOUND = GOOD["x"], torch.ones(2)
KNOWN = {"known": X, "known_mask": X, "known_table": KNOWN_TABLE}


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "x .*float16", {"x": X.half()}),
        (ValueError, r"x .*\[2\]", {"x": X[:, 0, 0]}),
        (ValueError, "x .*strides", {"x": torch.zeros(2, 4, 3).transpose(1, 2)}),
        (TypeError, "out .*int64", {"out": X.long()}),
        (ValueError, r"out .*\[4, 3, 4\]", {"guidance_scale": torch.ones(1)}),
        (ValueError, r"out .*\[2, 6, 4\]", {"log_variance": LOG_VARIANCE}),
        (ValueError, r"table .*\[4, 6\]", {"table": TABLE[:, :6]}),
        (TypeError, "table .*float64", {"table": TABLE.double()}),
        (ValueError, "table .*meta", {"table": TABLE.to("meta")}),
        (ValueError, "step .*4", {"step": torch.tensor([4])}),
        (ValueError, "step .*-1", {"step": torch.tensor([-1])}),
        (ValueError, r"step .*\[\]", {"step": torch.tensor(0)}),
        (TypeError, "step .*int32", {"step": torch.tensor([0]).int()}),
        (ValueError, r"keys .*\[1, 2\]", {"keys": GOOD["keys"][:1]}),
        (ValueError, "noise .*shape", {"noise": X[:1]}),
        (ValueError, "both noise .*keys", {"noise": X}),
        (TypeError, "x0_prev .*float16", {"x0_prev": X.half()}),
        *((ValueError, "clip_range", {"clip_range": bad}) for bad in (0.0, -1.0, math.inf, math.nan)),
        (ValueError, r"log_variance .*\[3, 2\]", {"log_variance": LOG_VARIANCE[:3], "out": X.repeat(1, 2, 1)}),
        (ValueError, r"guidance_scale .*\[3\]", {"guidance_scale": torch.ones(3), "out": X.repeat(2, 1, 1)}),
        (TypeError, "guidance_scale .*64", {"guidance_scale": torch.ones(1).double(), "out": X.repeat(2, 1, 1)}),
        (ValueError, "known_mask .*None", {"known": X}),
        (ValueError, "known .*None", {"known_noise": X}),
        (TypeError, "known_mask .*bool", {**KNOWN, "known_mask": X > 0}),
        (ValueError, "known .*broadcast", {**KNOWN, "known": torch.ones(2, 3, 5)}),
        (ValueError, r"known_table .*\[1, 2\]", {**KNOWN, "known_table": KNOWN_TABLE[:1]}),
        (ValueError, "known_noise .*None", {**KNOWN, "keys": None}),
        (ValueError, "both clip_range .*threshold", {"clip_range": 1.0, "threshold": BOUND}),
        (TypeError, "threshold .*float64", {"threshold": BOUND.double()}),
        (ValueError, r"threshold .*\[1\]", {"threshold": BOUND[:1]}),
        (ValueError, "threshold .*meta", {"threshold": BOUND.to("meta")}),
        (ValueError, "backend .*fast", {"backend": "fast"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(reverse_step, error, message, **GOOD | changed)


PAST = {"multistep": True, "x0": X.clone()}


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, "x0 .*None", {"multistep": True}),
        (ValueError, "x0 .*strides", {"x0": torch.zeros(2, 4, 3).transpose(1, 2)}),
        (TypeError, "x0 .*float16", {"x0": X.half()}),
        (ValueError, r"net_in .*\[1, 3, 4\]", {"net_in": X[:1]}),
        (TypeError, "net_in .*int64", {"net_in": X.long()}),
        (ValueError, "multistep is False but a history is given", {"history": X[None]}),
        (
            ValueError,
            r"history .*\[4, 2, 3, 4\], must be \[1 to 3, 2, 3, 4\]",
            PAST | {"history": X.expand(4, 2, 3, 4)},
        ),
        (ValueError, r"history .*\[1, 1, 3, 4\]", PAST | {"history": X[None, :1]}),
        (TypeError, "history .*float64", PAST | {"history": X[None].double()}),
        (ValueError, "history .*meta", PAST | {"history": X[None].to("meta")}),
        (ValueError, "history .*strides", PAST | {"history": X[None].expand(2, 2, 3, 4)}),
        (ValueError, "table .*8", PAST | {"history": X[None]}),
    ],
)
def test_bad_input_in_place(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(reverse_step_, error, message, **GOOD | {"x": X.clone()} | changed)


def test_bad_input_of_triton(on_triton: torch.device) -> None:
    a = make((2, 3, 4, 5), ("guided",), torch.float32, on_triton)
    a |= {"step": torch.tensor([0], device=on_triton), "backend": "triton"}
    check_refuses(reverse_step, TypeError, "x .*float64", **a | {"x": a["x"].double()})
    scale = torch.ones(1, device=on_triton, requires_grad=True)
    check_refuses(reverse_step, ValueError, "guidance_scale .*gradient", **a | {"guidance_scale": scale})
    net_in = torch.zeros(4, 3, 5, 4, device=on_triton).transpose(2, 3)
    check_refuses(reverse_step_, ValueError, "net_in .*strides", **a, net_in=net_in)
