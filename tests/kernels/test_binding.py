"""Bound ops: checks and look-ups run once; every run is the op in place, bit for bit, of what the tensors then hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fastddpm_kernels import native as native_library
from fastddpm_kernels import tuned
from fastddpm_kernels.attention import attention_
from fastddpm_kernels.backend import why_not
from fastddpm_kernels.conv import conv_, pack
from fastddpm_kernels.group_norm_silu import group_norm_silu_, rms_norm_silu_
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.pointwise_conv import pointwise_conv_
from fastddpm_kernels.residual_add import residual_add_
from torch import Tensor


class Case(NamedTuple):
    op: InPlace[...]
    backends: tuple[str, ...]
    arguments: Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]  # after y


def image(channels: int, dtype: torch.dtype = torch.float32, size: int = 6) -> Tensor:
    return torch.randn(2, size, size, channels).to(dtype).permute(0, 3, 1, 2)


def of_conv(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    more = {"x2": image(4, dtype), "bias": torch.randn(8, dtype=dtype), "residual": image(8, dtype)}
    return (image(6, dtype), torch.randn(8, 10, 3, 3).to(dtype)), more


def of_group_norm(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight, bias, rows = torch.randn(8, dtype=dtype), torch.randn(8), torch.randn(2, 8, dtype=dtype)
    more = {"x2": image(4, dtype), "residual": image(4, dtype), "total": image(4, dtype), "time_bias": rows}
    return (image(4, dtype), weight, bias, 4), more


def of_rms_norm(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    scale, shift = torch.randn(2, 16, dtype=dtype).split(8, dim=1)
    more = {"bias": torch.randn(8, dtype=dtype), "residual": image(8, dtype), "scale": scale, "shift": shift}
    return (image(8, dtype), torch.randn(8, dtype=dtype)), more


def of_pointwise(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    more = {"x2": image(4, dtype), "weight2": torch.randn(8, 4).to(dtype), "residual": image(8, dtype)}
    return (image(6, dtype), torch.randn(8, 6).to(dtype)), {**more, "bias": torch.randn(8)}


CASES = {
    "conv": Case(conv_, ("native", "eager", "reference"), of_conv),
    "attention": Case(attention_, ("native", "eager", "reference"), lambda dtype: ((image(24, dtype), 2, 4), {})),
    "group_norm_silu": Case(group_norm_silu_, ("triton", "native", "eager", "reference"), of_group_norm),
    "rms_norm_silu": Case(rms_norm_silu_, ("triton", "native", "eager", "reference"), of_rms_norm),
    "pointwise_conv": Case(pointwise_conv_, ("triton", "eager", "reference"), of_pointwise),
    "residual_add": Case(
        residual_add_, ("triton", "eager", "reference"),
        lambda dtype: ((image(8, dtype),), {"residual": image(8, dtype), "bias": torch.randn(8)}),
    ),
}  # fmt: skip
PAIRS = [(name, backend) for name, case in CASES.items() for backend in case.backends]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
# bfloat16 vectors, which native kernels read as float32: converted at every run.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bound_op_is_the_op_of_what_its_tensors_hold(name: str, backend: str, dtype: torch.dtype) -> None:
    if reason := why_not(backend, "cpu", "group_norm_silu_" if "norm" in name else name, dtype):
        pytest.skip(reason)
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("triton's interpreter computes bf16 wrongly")
    torch.manual_seed(0)
    case = CASES[name]
    arguments, more = case.arguments(dtype)
    y, expected = image(8, dtype), image(8, dtype)
    if name == "conv" and backend == "native":  # packed, as a frozen network has it; its values may change too
        arguments = (arguments[0], pack(arguments[1], "winograd2", dtype=dtype, channels2=4))
    run = case.op.bind(y, *arguments, **more, backend=backend)
    for _ in range(2):
        case.op(expected, *arguments, **more, backend=backend)
        y.fill_(float("nan"))
        run()
        assert torch.equal(y, expected)
        for value in (*arguments, *more.values()):
            if isinstance(value, Tensor) and value.stride(0):
                value.mul_(-0.5).add_(0.25)
        if name == "conv" and backend == "native":
            arguments[1].values.mul_(0.75)
    with pytest.raises((TypeError, ValueError)):
        case.op.bind(y[:1], *arguments, **more, backend=backend)  # what is bound was checked


def test_a_bound_op_runs_on_the_threads_that_torch_then_has(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, functions = [], native_library.get().functions

    class Spy:
        def __init__(self, name: str) -> None:
            self.argtypes, self._call = getattr(functions, name).argtypes, getattr(functions, name)

        def __call__(self, *arguments: Any) -> None:
            given.append([value for value in arguments if type(value) is int])  # all others were converted before
            self._call(*arguments)

    spies = type("Spies", (), {"__getattr__": lambda _, name: Spy(name)})
    monkeypatch.setattr(native_library.get(), "functions", spies())
    run = attention_.bind(image(8), image(24), 2, 4, backend=native)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            run()
    finally:
        torch.set_num_threads(before)
    assert given == [[1], [2], [1]]


def test_a_tuned_choice_is_looked_up_when_an_op_is_bound() -> None:
    if reason := why_not("triton", "cpu"):
        pytest.skip(reason)
    arguments, more = of_pointwise(torch.float32)
    with tuned.recording() as seen:
        run = pointwise_conv_.bind(image(8), *arguments, **more, backend="triton")
        assert sum(seen.values()) == 1
        run()
        run()
    assert sum(seen.values()) == 1
