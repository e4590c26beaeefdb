"""The noising step: every backend against float64, any layout, gradients, and noise that depends on the key alone."""

from __future__ import annotations

import diffusers
import pytest
import torch
from fastddpm_kernels.philox import STREAM_Q_SAMPLE, normal, sample_keys
from fastddpm_kernels.q_sample import PREDICTION_TYPES, q_sample
from fastddpm_kernels.testing import SHAPES, assert_close, poisoned_memory
from torch import Tensor

STEPS = 1000
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64), 0)


def make_table(device: torch.device) -> Tensor:
    return torch.stack([ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()], 1).float().to(device)


def levels(batch: int, device: torch.device) -> Tensor:
    return torch.tensor([0, 999, 321, 500], device=device)[torch.arange(batch) % 4]


def make_keys(batch: int, device: torch.device) -> Tensor:
    return sample_keys([7] * batch, range(batch), device)


def skip_false_bf16(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    if dtype == torch.bfloat16 and backend == "triton" and device.type == "cpu":
        pytest.skip("triton's interpreter rounds bfloat16 wrongly")


def check(x0: Tensor, t: Tensor, backend: str, **options: object) -> tuple[Tensor, Tensor]:
    """Runs `backend` and compares both results with the reference in float64."""
    table = make_table(x0.device)
    with poisoned_memory():
        got = q_sample(x0, table, t, backend=backend, **options)
    wide = {k: v.double() if k == "noise" else v for k, v in options.items()}
    truth = q_sample(x0.double(), table, t, backend="reference", **wide)
    eager = q_sample(x0, table, t, backend="eager", **options)
    for name, actual, expected, torchs in zip(("x_t", "target"), got, truth, eager, strict=True):
        assert actual.dtype == x0.dtype
        assert_close(actual, expected, eager=torchs, name=name)
    return got


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_reference_is_the_formula(prediction_type: str) -> None:
    x0, noise = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64)
    t = torch.tensor([3, 5, 999])
    table = make_table(torch.device("cpu"))
    x_t, target = q_sample(x0, table, t, noise=noise, prediction_type=prediction_type, backend="reference")
    for n in range(3):
        signal, sigma = table[t[n]].double().tolist()
        expected = {"epsilon": noise[n], "sample": x0[n], "v_prediction": signal * noise[n] - sigma * x0[n]}
        torch.testing.assert_close(x_t[n], signal * x0[n] + sigma * noise[n], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(target[n], expected[prediction_type], rtol=1e-14, atol=1e-14)


def test_agrees_with_diffusers(backend: str, device: torch.device) -> None:
    scheduler = diffusers.DDPMScheduler(STEPS)
    scheduler.alphas_cumprod = ALPHA_BAR
    x0, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    t = levels(4, torch.device("cpu"))
    x_t, v = q_sample(
        x0.to(device), make_table(device), t.to(device), noise=noise.to(device), prediction_type="v_prediction",
        backend=backend,
    )  # fmt: skip
    assert_close(x_t, scheduler.add_noise(x0.double(), noise.double(), t), name="add_noise")
    assert_close(v, scheduler.get_velocity(x0.double(), noise.double(), t), name="get_velocity")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("source", ["keys", "noise"])
def test_matches_reference(
    backend: str, device: torch.device, dtype: torch.dtype, prediction_type: str, source: str
) -> None:
    skip_false_bf16(dtype, backend, device)
    x0 = (torch.rand(3, 3, 13, 17, device=device) * 2 - 1).to(dtype)
    given = {"keys": make_keys(3, device)} if source == "keys" else {"noise": torch.randn_like(x0)}
    _, target = check(x0, levels(3, device), backend, prediction_type=prediction_type, **given)
    if prediction_type == "sample":
        assert target is x0
    if prediction_type == "epsilon" and source == "noise":
        assert target is given["noise"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_shapes(backend: str, device: torch.device, name: str, channels_last: bool) -> None:
    x0 = torch.randn(SHAPES[name][0], device=device)
    if channels_last:
        x0 = x0.contiguous(memory_format=torch.channels_last)
    x_t, target = check(x0, levels(len(x0), device), backend, keys=make_keys(len(x0), device))
    for result in (x_t, target):
        assert result.is_contiguous() if x0.is_contiguous() else result.stride() == x0.stride()


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 4, 19), (2, 3, 2, 5, 4), (2, 3, 2, 2, 2, 3)])
def test_ranks(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    x0 = torch.randn(shape, device=device)
    check(x0, levels(shape[0], device), backend, keys=make_keys(shape[0], device), prediction_type="v_prediction")
    if len(shape) == 5:
        x0 = x0.contiguous(memory_format=torch.channels_last_3d)
        x_t, _ = check(x0, levels(shape[0], device), backend, noise=torch.randn(shape, device=device))
        assert x_t.stride() == x0.stride()


def test_strided_input(backend: str, device: torch.device) -> None:
    """Slices, transposes and noise in another format than x0's: the result is contiguous, and the same."""
    t = levels(3, device)
    big = torch.randn(3, 8, 12, 14, device=device)
    noise = torch.randn(3, 6, 12, 7, device=device).contiguous(memory_format=torch.channels_last)
    for x0 in (big[:, :6, :, :7], big.transpose(2, 3)[:, 1:7, ::2, :12].transpose(2, 3)):
        assert not x0.is_contiguous()
        x_t, _ = check(x0, t, backend, noise=noise, prediction_type="v_prediction")
        assert x_t.is_contiguous()
        dense = q_sample(x0.contiguous(), make_table(device), t, noise=noise.contiguous(), backend=backend)
        assert torch.equal(x_t, dense[0])


def test_other_dtypes_of_noise(backend: str, device: torch.device) -> None:
    x0 = torch.randn(2, 3, 4, 4, device=device).half()
    noise = torch.randn(2, 3, 4, 4, device=device)
    _, target = check(x0, levels(2, device), backend, noise=noise)
    assert torch.equal(target, noise.half())


def test_noise_depends_on_the_key_alone(backend: str, device: torch.device) -> None:
    x0, t, keys = torch.randn(4, 3, 9, 7, device=device), levels(4, device), make_keys(4, device)
    step = torch.tensor([123], device=device)
    table = make_table(device)

    def run(x0: Tensor, rows: slice) -> Tensor:
        return q_sample(x0[rows], table, t[rows], keys=keys[rows], step=step, backend=backend)[1]

    whole = run(x0, slice(None))
    assert torch.equal(whole, torch.cat([run(x0, slice(0, 1)), run(x0, slice(1, 4))]))
    assert torch.equal(whole, run(x0.contiguous(memory_format=torch.channels_last), slice(None)))
    assert torch.equal(whole, normal(keys, (3, 9, 7), step=123, stream=STREAM_Q_SAMPLE, backend=backend))
    assert not torch.equal(whole, q_sample(x0, table, t, keys=keys, backend=backend)[1])


def test_one_step_chain(device: torch.device, backend: str) -> None:
    """T steps of q(x_t | x_{t-1}), one after the other, have the variance of q(x_T | x_0)."""
    betas = torch.linspace(0.01, 0.2, 20)
    chain = torch.stack([(1 - betas).sqrt(), betas.sqrt()], 1).to(device)
    x = torch.full((1, 2000), 0.5, device=device)
    for i in range(20):
        row, step = torch.tensor([i], device=device), torch.tensor([i], device=device)
        x, _ = q_sample(x, chain, row, keys=make_keys(1, device), step=step, backend=backend)
    left = float((1 - betas).prod())
    assert abs(float(x.mean()) - 0.5 * left**0.5) < 5 / 2000**0.5
    assert abs(float(x.var()) - (1 - left)) < 5 * (2 / 2000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradients(backend: str, device: torch.device, dtype: torch.dtype, prediction_type: str) -> None:
    x0, noise, g1, g2 = torch.randn(4, 2, 3, 5, 4, device=device).to(dtype)
    table, t = make_table(device), levels(2, device)

    def gradients(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x0.to(dtype).requires_grad_(), noise.to(dtype).requires_grad_()]
        out = q_sample(inputs[0], table, t, noise=inputs[1], prediction_type=prediction_type, backend=backend)
        return torch.autograd.grad(out, inputs, (g1.to(dtype), g2.to(dtype)))

    truth, eager = gradients("reference", torch.float64), gradients("eager", dtype)
    for name, actual, expected, torchs in zip(("x0", "noise"), gradients(backend, dtype), truth, eager, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, eager=torchs, name=name)

    x0.requires_grad_()
    made = q_sample(x0, table, t, keys=make_keys(2, device), prediction_type=prediction_type, backend=backend)
    (grad,) = torch.autograd.grad(made[0].sum(), x0)
    assert_close(grad, table[t, 0].view(2, 1, 1, 1).expand_as(grad).to(dtype), name="x0 with made noise")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_compiles(backend: str, device: torch.device, prediction_type: str) -> None:
    x0 = torch.randn(2, 3, 5, 4, device=device).contiguous(memory_format=torch.channels_last)
    table, t, keys = make_table(device), levels(2, device), make_keys(2, device)

    def run(x0: Tensor) -> tuple[Tensor, Tensor]:
        x_t, target = q_sample(x0 * 2, table, t, keys=keys, prediction_type=prediction_type, backend=backend)
        return x_t.square(), target.square()

    x0.requires_grad_()
    plain, compiled = run(x0), torch.compile(run, fullgraph=True, backend="aot_eager")(x0)
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert one.stride() == other.stride()
    grads = [torch.autograd.grad(results[0].sum(), x0)[0] for results in (plain, compiled)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("source", "prediction_type"), [("keys", "epsilon"), ("noise", "v_prediction")])
def test_custom_op(device: torch.device, source: str, prediction_type: str) -> None:
    pytest.importorskip("triton")
    x0 = torch.randn(2, 3, 5, 4, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    noise = torch.randn_like(x0).requires_grad_() if source == "noise" else None
    keys, step = (make_keys(2, device), torch.tensor([3], device=device)) if source == "keys" else (None, None)
    arguments = (x0, make_table(device), levels(2, device), noise, keys, step, prediction_type)
    torch.library.opcheck(torch.ops.fastddpm.q_sample.default, arguments)


def test_bad_input() -> None:
    x0, table, t, noise = torch.zeros(2, 3), torch.ones(5, 2), torch.tensor([0, 4]), torch.zeros(2, 3)
    keys = sample_keys([0, 0], [0, 1])

    def fails(error: type[Exception], match: str, *positional: Tensor, **options: object) -> None:
        with pytest.raises(error, match=match):
            q_sample(*(positional or (x0, table, t)), **({"noise": noise} | options))

    fails(TypeError, "x0 is torch.int64", x0.long(), table, t)
    fails(ValueError, "x0 has no dimensions", x0[0, 0], table, t)
    fails(TypeError, "table is torch.float64", x0, table.double(), t)
    fails(ValueError, r"table has shape \[5, 3\]", x0, torch.ones(5, 3), t)
    fails(TypeError, "t is torch.int32", x0, table, t.int())
    fails(ValueError, r"t has shape \[1\]", x0, table, t[:1])
    fails(ValueError, r"t is \[0, 5\]", x0, table, torch.tensor([0, 5]))
    fails(ValueError, r"t is \[-1, 0\]", x0, table, torch.tensor([-1, 0]))
    fails(ValueError, r"noise has shape \[3\]", noise=noise[0])
    fails(TypeError, "noise is torch.int64", noise=noise.long())
    fails(ValueError, "neither of noise and keys", noise=None)
    fails(ValueError, "both of noise and keys", keys=keys)
    fails(ValueError, r"keys has shape \[1, 2\]", noise=None, keys=keys[:1])
    fails(TypeError, "step is int", noise=None, keys=keys, step=3)
    fails(ValueError, "prediction_type is 'eps'", prediction_type="eps")
    fails(ValueError, "backend is 'fast'", backend="fast")
    fails(ValueError, "t is on meta", x0, table, t.to("meta"))


def test_bad_input_of_triton(device: torch.device) -> None:
    pytest.importorskip("triton")
    x0, table, t = torch.zeros(2, 3, device=device), torch.ones(5, 2, device=device), levels(2, device) // 500
    with pytest.raises(TypeError, match="x0 is torch.float64"):
        q_sample(x0.double(), table, t, noise=x0, backend="triton")
    with pytest.raises(ValueError, match="table requires a gradient"):
        q_sample(x0, table.requires_grad_(), t, noise=x0, backend="triton")


def test_level_out_of_range_is_nan(device: torch.device) -> None:
    """Where values are not checked, nothing that lies beyond the table is passed off as a result."""
    pytest.importorskip("triton")
    x0, table = torch.zeros(3, 3, device=device), torch.ones(5, 2, device=device)
    t = torch.tensor([-1, 0, 5], device=device)
    x_t, _ = torch.ops.fastddpm.q_sample(x0, table, t, x0, None, None, "epsilon")
    assert x_t.isnan().any(1).tolist() == [True, False, True]
