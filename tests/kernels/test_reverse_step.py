"""The reverse step: the formula against diffusers and a plain restatement, every backend against float64."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from fastddpm_kernels.philox import STREAM_KNOWN, STREAM_STEP, normal, sample_keys
from fastddpm_kernels.reverse_step import reverse_step, reverse_step_
from fastddpm_kernels.testing import SHAPES, assert_close, poisoned_memory
from torch import Tensor

# A row of every kind; in the second neither noise is added (S = 0) nor the x0 before read (F = 0).
TABLE = torch.tensor([[1.1, -0.4, 0.6, 0.3, 0.0, 0.0, 0.25], [0.9, -0.2, 1.0, 0.1, -0.1, 0.0, 0.0],
                      [1.2, -0.7, 0.8, 0.2, 0.15, -0.3, 0.5], [0.0, 1.0, 0.5, 0.4, 0.0, 0.2, 1.0]])  # fmt: skip
LOG_VARIANCE = torch.tensor([[-3.0, -2.5], [-46.0, -9.0], [-2.0, -1.0], [-1.5, -1.4]])
KNOWN_TABLE = torch.tensor([[0.7, 0.7], [1.0, 0.0], [0.9, 0.3], [0.2, 0.95]])
COMBINATIONS: dict[str, tuple[str, ...]] = {
    "no_noise": (),
    "philox": ("keys",),
    "ancestral": ("keys", "clip_range"),
    "given": ("noise", "clip_range"),
    "multistep": ("x0_prev", "clip_range"),
    "stochastic_multistep": ("x0_prev", "keys"),
    "learned": ("keys", "clip_range", "learned"),
    "learned_given": ("noise", "learned"),
    "guided": ("keys", "guided"),
    "guided_per_sample": ("noise", "guided", "per_sample"),
    "guided_learned": ("keys", "clip_range", "guided", "learned"),
    "known": ("keys", "clip_range", "known"),
    "known_given": ("noise", "known", "known_noise"),
    "known_noise_alone": ("known", "known_noise"),
    "everything": ("keys", "x0_prev", "clip_range", "learned", "guided", "known", "per_sample"),
}


def make(shape: tuple[int, ...], options: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `reverse_step` for a state of this shape."""
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
    merged = arguments | changes
    x, out, table = merged.pop("x"), merged.pop("out"), merged.pop("table")
    return reverse_step(x, out, table, torch.tensor([row], device=x.device), backend=backend, **merged)


def check(arguments: dict[str, Any], row: int, backend: str) -> tuple[Tensor, Tensor]:
    """Runs `backend` and compares both results with the reference in float64."""
    with poisoned_memory():
        got = call(arguments, row, backend)
    wide = {k: arguments[k].double() for k in ("x", "x0_prev") if k in arguments}
    truth, eager = call(arguments, row, "reference", **wide), call(arguments, row, "eager")
    for name, actual, expected, torchs in zip(("x_next", "x0"), got, truth, eager, strict=True):
        assert actual.dtype == arguments["x"].dtype
        assert_close(actual, expected, eager=torchs, name=name)
    return got


def restatement(arguments: dict[str, Any], row: int) -> tuple[Tensor, Tensor]:
    """The formula once more, sample by sample, in float64 on the CPU."""
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


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_reference_is_the_formula(combination: str) -> None:
    arguments = make((3, 2, 4, 5), COMBINATIONS[combination], torch.float32, torch.device("cpu"))
    wide = {k: arguments[k].double() for k in ("x", "x0_prev") if k in arguments}
    for row in range(len(TABLE)):
        for actual, expected in zip(
            call(arguments, row, "reference", **wide), restatement(arguments, row), strict=True
        ):
            # The restatement's own noise is rounded to float32 where it is made, not given.
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=5e-7 if "keys" in arguments else 1e-12)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_matches_reference(backend: str, device: torch.device, combination: str) -> None:
    arguments = make((3, 3, 13, 17), COMBINATIONS[combination], torch.float32, device)
    for row in (1, 2):
        check(arguments, row, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("combination", ["ancestral", "everything"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_network(
    backend: str, device: torch.device, dtype: torch.dtype, combination: str, channels_last: bool
) -> None:
    if dtype == torch.bfloat16 and backend == "triton" and device.type == "cpu":
        pytest.skip("triton's interpreter rounds bfloat16 wrongly")
    arguments = make((2, 3, 8, 9), COMBINATIONS[combination], dtype, device)
    if channels_last:
        arguments["out"] = arguments["out"].contiguous(memory_format=torch.channels_last)
    check(arguments, 2, backend)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(backend: str, device: torch.device, name: str) -> None:
    check(make(SHAPES[name][0], COMBINATIONS["everything"], torch.float32, device), 2, backend)


@pytest.mark.parametrize("shape", [(3, 2), (2, 4, 19), (2, 50, 3), (2, 3, 2, 5, 4), (1, 1)])
def test_ranks(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    check(make(shape, COMBINATIONS["everything"], torch.float16, device), 3, backend)


def test_layouts(backend: str, device: torch.device) -> None:
    """Where x_next comes from does not matter: out and masks in any strides give the same numbers."""
    arguments = make((2, 3, 6, 10), COMBINATIONS["everything"], torch.float32, device)
    expected = check(arguments, 2, backend)
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
        check(arguments, 2, backend)


def diffusers_rows(scheduler: diffusers.DDPMScheduler, prediction_type: str, variance_type: str) -> tuple[Tensor, ...]:
    """Table and log-variances of ancestral sampling over all of the scheduler's steps (Ho et al. 2020, eq. 7)."""
    abar = scheduler.alphas_cumprod
    rows, log_variances = [], []
    for t in scheduler.timesteps.tolist():
        before = t - len(abar) // len(scheduler.timesteps)
        now, previous = float(abar[t]), float(abar[before]) if before >= 0 else 1.0
        beta = 1 - now / previous
        a, b = {
            "epsilon": (now**-0.5, -(((1 - now) / now) ** 0.5)),
            "sample": (0.0, 1.0),
            "v_prediction": (now**0.5, -((1 - now) ** 0.5)),
        }[prediction_type]
        small = max((1 - previous) / (1 - now) * beta, 1e-20)
        std = {"fixed_small": small**0.5, "fixed_large": beta**0.5, "learned_range": 1.0}[variance_type]
        c, d = previous**0.5 * beta / (1 - now), (1 - beta) ** 0.5 * (1 - previous) / (1 - now)
        rows.append([a, b, c, d, 0.0, 0.0, std if t > 0 else 0.0])
        log_variances.append([math.log(small), math.log(beta)])
    return torch.tensor(rows), torch.tensor(log_variances)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("clip", [True, False])
def test_agrees_with_diffusers(
    backend: str, device: torch.device, prediction_type: str, variance_type: str, clip: bool
) -> None:
    scheduler = diffusers.DDPMScheduler(
        1000, prediction_type=prediction_type, variance_type=variance_type, clip_sample=clip, clip_sample_range=1.0
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    scheduler.set_timesteps(50)
    table, log_variance = diffusers_rows(scheduler, prediction_type, variance_type)
    learned = variance_type == "learned_range"
    for row in (0, 20, 48, 49):
        x, out = torch.randn(2, 3, 8, 8), torch.randn(2, 6 if learned else 3, 8, 8).clamp(-1, 1)
        expected = scheduler.step(
            out.double(), int(scheduler.timesteps[row]), x.double(), generator=torch.Generator().manual_seed(row)
        )
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(row), dtype=torch.float64)
        x_next, x0 = reverse_step(
            x.to(device), out.to(device), table.to(device), torch.tensor([row], device=device),
            noise=noise.to(device), clip_range=1.0 if clip else None,
            log_variance=log_variance.to(device) if learned else None, backend=backend,
        )  # fmt: skip
        assert_close(x_next, expected.prev_sample, name=f"x_next, row {row}")
        # A*x and B*out nearly cancel where x is nearly noise: each is rounded as a table entry and as a product, and
        # their sum once more, so that float32 allows 3 half units of what they were, not of what is left.
        terms = (table[row, 0] * x).abs() + (table[row, 1] * out[:, :3]).abs()
        assert ((x0.cpu() - expected.pred_original_sample).abs() <= 3.001 * 2.0**-24 * terms.double()).all()


def test_nan_of_the_network_is_not_hidden(backend: str, device: torch.device) -> None:
    arguments = make((1, 2, 4, 4), COMBINATIONS["ancestral"], torch.float32, device)
    arguments["out"][0, 1, 2, 3] = math.nan
    for result in call(arguments, 2, backend):
        assert int(result.isnan().sum()) == 1


def test_unwritten_x0_is_not_read(backend: str, device: torch.device) -> None:
    """A row with F = 0, the first of every multistep sampler, finds in x0 whatever was there."""
    arguments = make((2, 3, 4, 4), COMBINATIONS["multistep"], torch.float32, device)
    arguments["x0_prev"].fill_(math.nan)
    assert not call(arguments, 1, backend)[0].isnan().any()
    assert call(arguments, 2, backend)[0].isnan().all()


def test_samples_depend_on_their_key_alone(backend: str, device: torch.device) -> None:
    arguments = make((4, 3, 9, 7), COMBINATIONS["known"], torch.float32, device)
    x_next, x0 = call(arguments, 2, backend)
    for rows in (slice(0, 1), slice(1, 4)):
        part = {k: arguments[k][rows] for k in ("x", "out", "keys", "known_mask")}
        for one, whole in zip(call(arguments, 2, backend, **part), (x_next, x0), strict=True):
            assert torch.equal(one, whole[rows])


def in_place(
    arguments: dict[str, Any], row: int, backend: str, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `reverse_step_`: (x, x0, net_in)."""
    options = {k: v for k, v in arguments.items() if k not in ("x", "out", "table", "x0_prev")}
    x, multistep = arguments["x"].clone(), "x0_prev" in arguments
    x0 = arguments["x0_prev"].clone() if multistep else torch.full_like(x, math.nan)
    batch = 2 * len(x) if "guidance_scale" in arguments else len(x)
    net_in = torch.full((batch, *x.shape[1:]), math.nan, dtype=dtype, device=x.device)
    if channels_last:
        net_in = net_in.contiguous(memory_format=torch.channels_last)
    step = torch.tensor([row], device=x.device)
    reverse_step_(
        x,
        arguments["out"],
        arguments["table"],
        step,
        x0=x0,
        net_in=net_in,
        multistep=multistep,
        backend=backend,
        **options,
    )
    return x, x0, net_in


@pytest.mark.parametrize("combination", ["no_noise", "ancestral", "multistep", "guided", "everything"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_in_place(backend: str, device: torch.device, combination: str, channels_last: bool) -> None:
    arguments = make((2, 3, 6, 10), COMBINATIONS[combination], torch.float16, device)
    wide = {k: arguments[k].double() for k in ("x", "x0_prev") if k in arguments}
    truth = call(arguments, 2, "reference", **wide)
    eager = in_place(arguments, 2, "eager")
    x, x0, net_in = in_place(arguments, 2, backend, torch.float16, channels_last)
    assert_close(x, truth[0], eager=eager[0], name="x")
    assert_close(x0, truth[1], eager=eager[1], name="x0")
    for half in net_in.chunk(len(net_in) // len(x)):
        assert torch.equal(half, x.half())


def test_in_place_minimal(backend: str, device: torch.device) -> None:
    """Neither x0 nor net_in, an empty batch, and a float64 state where that is allowed."""
    arguments = make((2, 3, 5), COMBINATIONS["ancestral"], torch.float32, device)
    expected = call(arguments, 0, backend)[0]
    options = {k: arguments[k] for k in ("keys", "clip_range")}
    x, step = arguments["x"].clone(), torch.tensor([0], device=device)
    reverse_step_(x, arguments["out"], arguments["table"], step, backend=backend, **options)
    assert_close(x, expected.double(), name="x")
    empty = x[:0].clone()
    reverse_step_(empty, arguments["out"][:0], arguments["table"], step, backend=backend)
    if backend == "eager":
        x = arguments["x"].double()
        reverse_step_(x, arguments["out"], arguments["table"], step, backend=backend, **options)
        assert_close(x, call(arguments, 0, "reference", x=arguments["x"].double())[0], name="float64")


GRADIENT_INPUTS = ("x", "out", "x0_prev", "noise")


@pytest.mark.parametrize(
    "combination", ["no_noise", "ancestral", "given", "multistep", "learned", "learned_given", "guided_per_sample",
                    "guided_learned", "known", "everything"]
)  # fmt: skip
def test_gradients(backend: str, device: torch.device, combination: str) -> None:
    arguments = make((3, 2, 3, 5), COMBINATIONS[combination], torch.float32, device)
    names = [name for name in GRADIENT_INPUTS if name in arguments]
    g = torch.randn(2, 3, 2, 3, 5, device=device)

    def gradients(backend: str, dtype: torch.dtype, row: int) -> tuple[Tensor, ...]:
        inputs = {name: arguments[name].to(dtype).requires_grad_() for name in names}
        results = call(arguments, row, backend, **inputs)
        return torch.autograd.grad(results, list(inputs.values()), tuple(g.to(dtype)), materialize_grads=True)

    for row in (1, 2):
        truth, eager = gradients("reference", torch.float64, row), gradients("eager", torch.float32, row)
        for name, got, expected, torchs in zip(
            names, gradients(backend, torch.float32, row), truth, eager, strict=True
        ):
            assert_close(got, expected, eager=torchs, name=f"gradient of {name}, row {row}")


def test_gradient_stops_at_the_clip(backend: str, device: torch.device) -> None:
    table = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]], device=device)
    x = torch.tensor([[-1.5, -0.9, 0.0, 0.9, 1.5]], device=device, requires_grad=True)
    step = torch.tensor([0], device=device)
    x_next, x0 = reverse_step(x, torch.zeros_like(x), table, step, clip_range=1.0, backend=backend)
    assert torch.autograd.grad((x_next + x0).sum(), x)[0].tolist() == [[0, 2, 2, 2, 0]]


@pytest.mark.parametrize(
    ("backend", "combination"), [("triton", "ancestral"), ("eager", "everything")], indirect=["backend"]
)
def test_compiles(backend: str, device: torch.device, combination: str) -> None:
    arguments = make((2, 3, 4, 5), COMBINATIONS[combination], torch.float32, device)
    x = arguments.pop("x").requires_grad_()

    def functional(x: Tensor, row: int) -> Tensor:
        x_next, x0 = call(arguments | {"x": x * 1.5}, row, backend)
        return x_next.square() + x0

    def loop(x: Tensor, net_in: Tensor) -> Tensor:
        x = x.detach() * 2
        options = {k: v for k, v in arguments.items() if k not in ("out", "table", "x0_prev")}
        for row in (0, 2):
            reverse_step_(
                x, arguments["out"] + net_in, arguments["table"], torch.tensor([row], device=device),
                net_in=net_in[:, :3], backend=backend, **options,
            )  # fmt: skip
        return x

    compiled = torch.compile(functional, fullgraph=True, backend="aot_eager")
    one, other = functional(x, 2), compiled(x, 2)
    assert_close(one, other.double())
    grads = [torch.autograd.grad(result.sum(), x)[0] for result in (one, other)]
    assert_close(grads[0], grads[1].double())
    net_ins = [torch.zeros_like(arguments["out"]) for _ in range(2)]
    results = [loop(x, net_ins[0]), torch.compile(loop, fullgraph=True, backend="aot_eager")(x, net_ins[1])]
    assert_close(results[0], results[1].double())
    assert_close(net_ins[0], net_ins[1].double())


@pytest.mark.parametrize("combination", ["learned_given", "everything"])
def test_custom_ops(device: torch.device, combination: str) -> None:
    pytest.importorskip("triton")
    a = make((2, 3, 4, 5), COMBINATIONS[combination], torch.float32, device)
    names = ("keys", "noise", "x0_prev", "clip_range", "log_variance", "guidance_scale", "known", "known_mask",
             "known_table", "known_noise")  # fmt: skip
    options = [a.get(name) for name in names]
    step = torch.tensor([2], device=device)
    x, out = a["x"].clone().requires_grad_(), a["out"].clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastddpm.reverse_step.default, (x, out, a["table"], step, *options))
    options[2] = None
    net_in = torch.zeros(len(a["out"]), 3, 4, 5, device=device).half()
    arguments = (a["x"], a["out"], a["table"], step, torch.zeros_like(a["x"]), net_in, True, *options)
    torch.library.opcheck(torch.ops.fastddpm.reverse_step_inplace.default, arguments)


def test_step_out_of_range_is_nan(device: torch.device) -> None:
    """Where the step is not checked, nothing that lies beyond the table is passed off as a result."""
    pytest.importorskip("triton")
    x, table = torch.zeros(2, 3, device=device), TABLE.to(device)
    for row in (-1, len(TABLE)):
        step = torch.tensor([row], device=device)
        x_next, x0 = torch.ops.fastddpm.reverse_step(x, x, table, step, *[None] * 10)
        assert x_next.isnan().all()
        assert x0.isnan().all()


@pytest.mark.gpu
def test_cuda_graph(device: torch.device) -> None:
    """One captured step, replayed over the table with nothing changed but the counter on the device."""
    arguments = make((2, 3, 8, 8), COMBINATIONS["ancestral"], torch.float16, device)
    options = {k: arguments[k] for k in ("keys", "clip_range")}
    start = arguments["x"]

    def body(x: Tensor, step: Tensor, net_in: Tensor) -> None:
        reverse_step_(x, arguments["out"], arguments["table"], step, net_in=net_in, **options)
        step.add_(1)

    plain, step, net_in = (
        start.clone(),
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.empty_like(start).half(),
    )
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


def test_bad_input() -> None:
    good = make((2, 3, 4), ("keys",), torch.float32, torch.device("cpu"))
    x, step = good["x"], torch.tensor([0])

    def fails(error: type[Exception], match: str, step: Tensor = step, **changes: Any) -> None:
        merged = good | changes
        with pytest.raises(error, match=match):
            reverse_step(merged.pop("x"), merged.pop("out"), merged.pop("table"), step, **merged)

    fails(TypeError, "x is torch.float16", x=x.half())
    fails(ValueError, r"x has shape \[2\]", x=x[:, 0, 0])
    fails(ValueError, "x has strides", x=torch.zeros(2, 4, 3).transpose(1, 2))
    fails(TypeError, "out is torch.int64", out=x.long())
    fails(ValueError, r"out has shape \[2, 3, 4\], must be \[4, 3, 4\]", guidance_scale=torch.ones(1))
    fails(ValueError, r"out has shape \[2, 3, 4\], must be \[2, 6, 4\]", log_variance=LOG_VARIANCE)
    fails(ValueError, r"table has shape \[4, 6\], must be \[rows, 7\]", table=TABLE[:, :6])
    fails(TypeError, "table is torch.float64", table=TABLE.double())
    fails(ValueError, r"step is 4, must be in \[0, 4\)", step=torch.tensor([4]))
    fails(ValueError, r"step is -1", step=torch.tensor([-1]))
    fails(ValueError, r"step has shape \[\]", step=torch.tensor(0))
    fails(TypeError, "step is torch.int32", step=step.int())
    fails(ValueError, r"keys has shape \[1, 2\], must be \[2, 2\]", keys=good["keys"][:1])
    fails(ValueError, r"noise has shape", noise=x[:1])
    fails(ValueError, "both noise and keys", noise=x)
    fails(TypeError, "x0_prev is torch.float16", x0_prev=x.half())
    for bad in (0.0, -1.0, math.inf, math.nan):
        fails(ValueError, "clip_range is", clip_range=bad)
    fails(
        ValueError,
        r"log_variance has shape \[3, 2\], must be \[4, 2\]",
        log_variance=LOG_VARIANCE[:3],
        out=x.repeat(1, 2, 1),
    )
    fails(ValueError, r"guidance_scale has shape \[3\]", guidance_scale=torch.ones(3), out=x.repeat(2, 1, 1))
    fails(TypeError, "guidance_scale is torch.float64", guidance_scale=torch.ones(1).double(), out=x.repeat(2, 1, 1))
    known = {"known": x, "known_mask": x, "known_table": KNOWN_TABLE}
    fails(ValueError, "known_mask is None", known=x)
    fails(ValueError, "known is None", known_noise=x)
    fails(TypeError, "known_mask is torch.bool", **known | {"known_mask": x > 0})
    fails(ValueError, r"known has shape \[2, 3, 5\], must be broadcastable", **known | {"known": torch.ones(2, 3, 5)})
    fails(ValueError, r"known_table has shape \[1, 2\]", **known | {"known_table": KNOWN_TABLE[:1]})
    fails(ValueError, "known_noise is None", **known, keys=None)
    fails(ValueError, "backend is 'fast'", backend="fast")
    fails(ValueError, "table is on meta", table=TABLE.to("meta"))

    def fails_in_place(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            reverse_step_(x.clone(), x, TABLE, step, **changes)

    fails_in_place(ValueError, "x0 is None", multistep=True)
    fails_in_place(ValueError, "x0 has strides", x0=torch.zeros(2, 4, 3).transpose(1, 2))
    fails_in_place(TypeError, "x0 is torch.float16", x0=x.half())
    fails_in_place(ValueError, r"net_in has shape \[1, 3, 4\]", net_in=x[:1])
    fails_in_place(TypeError, "net_in is torch.int64", net_in=x.long())


def test_bad_input_of_triton(device: torch.device) -> None:
    pytest.importorskip("triton")
    a = make((2, 3, 4, 5), ("guided",), torch.float32, device)
    with pytest.raises(TypeError, match="x is torch.float64"):
        call(a, 0, "triton", x=a["x"].double())
    with pytest.raises(ValueError, match="guidance_scale requires a gradient"):
        call(a, 0, "triton", guidance_scale=torch.ones(1, device=device, requires_grad=True))
    net_in = torch.zeros(4, 3, 5, 4, device=device).transpose(2, 3)
    options = {"guidance_scale": a["guidance_scale"], "net_in": net_in, "backend": "triton"}
    with pytest.raises(ValueError, match="net_in has strides"):
        reverse_step_(a["x"], a["out"], a["table"], torch.tensor([0], device=device), **options)
