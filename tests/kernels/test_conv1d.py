"""Every backend of the convolutions of sequences against `reference` in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastddpm_kernels.conv1d import conv1d_, pack
from fastddpm_kernels.native.memory import PAGE, empty
from fastddpm_kernels.testing import Guarded, check_op, check_refuses, same_on_any_threads
from torch import Tensor

HALF, BFLOAT = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    why: str
    n: int = 1
    channels: int = 32
    channels2: int = 0
    outputs: int = 64
    length: int = 4
    kernel: int = 5
    stride: int = 1
    padding: int | None = None  # None: half of the kernel
    transposed: bool = False
    bias: bool = True

    def sequence(self, channels: int, length: int) -> tuple[int, int, int]:
        return (self.n, channels, length)

    @property
    def options(self) -> dict[str, Any]:
        padding = self.kernel // 2 if self.padding is None else self.padding
        return {"stride": self.stride, "padding": padding, "transposed": self.transposed}

    @property
    def out_length(self) -> int:
        padding = self.options["padding"]
        return 2 * self.length if self.transposed else (self.length + 2 * padding - self.kernel) // self.stride + 1

    @property
    def weight(self) -> tuple[int, int, int]:
        inner = self.channels + self.channels2
        return (inner, self.outputs, self.kernel) if self.transposed else (self.outputs, inner, self.kernel)


UP = {"kernel": 4, "stride": 2, "padding": 1, "transposed": True}
CASES = {
    "mid": Case("the layers with most weights: few positions, many taps outside of the sequence"),
    "one_position": Case("all taps but one are outside", length=1),
    "skip": Case("two sources, read in place", channels=24, channels2=40, length=8),
    "odd": Case("channels that make no whole word in bfloat16, no whole vector or panel", 2, 7, 3, 70, 16),
    "first": Case("few input channels", channels=2, length=16, outputs=80),
    "last": Case("few output channels, one tap, no bias", outputs=3, kernel=1, length=12, bias=False),
    "down": Case("every second position", kernel=3, stride=2, length=10, channels=12),
    "strided": Case("a stride that does not divide, over more samples", 5, 12, 4, 33, 13, 7, 3),
    "no_padding": Case("fewer outputs than inputs", padding=0, length=9, channels=8),
    "up": Case("two phases of two taps", length=6, channels=8, **UP),
    "up_odd": Case("phases, two sources, odd channels, samples", 3, 5, 2, 9, 5, **UP),
    "horizon_64": Case("more rows than a tile", length=64, channels=16),
    "many": Case("more rows than an item, tiles that end with a sample", 9, 8, 0, 16, 20, 3),
    "whole": Case("sequences that fit a tile, of more rows than an item, two sources", 9, 8, 6, 16, 8),
    "whole_point": Case("the same of one tap", 70, 4, 0, 20, 12, 1),
    "whole_three": Case("the same of three, few positions", 40, 6, 0, 16, 2, 3),
    "several_blocks": Case("more weights than are used together", channels=80, length=2),
    "empty": Case("nothing to do", 0),
}


def operands(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
    """Return exact values of `dtype`, as float64."""

    def some(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(device, dtype).double()

    return {
        "x": some(*case.sequence(case.channels, case.length)),
        "x2": some(*case.sequence(case.channels2, case.length)) if case.channels2 else None,
        "weight": some(*case.weight, scale=0.1),
        "bias": some(case.outputs) if case.bias else None,
    }


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("backend", ["eager", "triton", "native"])
def test_results(case: Case, backend: str, dtype: torch.dtype, device: torch.device, request: Any) -> None:
    if backend == "native":
        request.getfixturevalue("native_bfloat16" if dtype == BFLOAT else "native")
        device = torch.device("cpu")
    elif backend == "triton":
        request.getfixturevalue("on_triton")
        if dtype == BFLOAT and case is not CASES["odd"]:
            pytest.skip("one case shows the rounding")
        dtype = torch.float16 if dtype == BFLOAT else dtype  # triton's interpreter rounds bfloat16 wrongly
    wide = operands(case, dtype, device)

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        given = {name: None if value is None else value.to(dtype) for name, value in wide.items()}
        for name in ("x", "x2"):
            if (value := given[name]) is not None:
                given[name] = value.movedim(1, -1).contiguous().movedim(-1, 1)
        y = Guarded(case.sequence(case.outputs, case.out_length), dtype, device, "channels_last")
        conv1d_(y.tensor, **given, **case.options, backend=backend)
        y.check()
        return {"y": y.tensor}

    check_op(run, backend, dtype, rounds=2)


def test_a_packed_weight_is_the_weight(native: str) -> None:
    """Also after its values were overwritten, and bound once; the numbers of threads change no bit."""
    case = CASES["skip"]
    given = {k: None if v is None else v.float() for k, v in operands(case, torch.float32).items()}
    x, x2, weight, bias = (given[name] for name in ("x", "x2", "weight", "bias"))
    assert x is not None
    assert x2 is not None
    assert weight is not None
    x, x2 = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, x2))
    y = torch.empty(1, case.out_length, case.outputs).movedim(-1, 1)
    packed = pack(torch.zeros_like(weight), native, channels2=case.channels2)
    run = conv1d_.bind(y, x, packed, x2=x2, bias=bias, **case.options)
    packed.values.copy_(pack(weight, native, channels2=case.channels2).values)
    run()
    expected = torch.empty_like(y)
    conv1d_(expected, x, weight, x2=x2, bias=bias, **case.options, backend=native)
    assert torch.equal(y, expected)

    def again() -> dict[str, Tensor]:
        run()
        return {"y": y.clone()}

    same_on_any_threads(again, (3, 2, 1))


X, Y, W = torch.randn(2, 8, 6), torch.empty(2, 4, 6), torch.randn(4, 8, 3)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "x .*list", {"x": [1.0]}),
        (TypeError, "weight .*int", {"weight": 3}),
        (TypeError, "weight .*float64", {"weight": W.double()}),
        (ValueError, r"x .*\(8, 6\)", {"x": X[0]}),
        (ValueError, r"x2 .*\(2, 8, 5\)", {"x2": X[..., :5]}),
        (ValueError, "8 channels to 4.*must be for 16", {"x2": X.clone()}),
        (ValueError, "stride is 0", {"stride": 0}),
        (ValueError, "padding is -1", {"padding": -1}),
        (ValueError, r"y .*\(2, 4, 6\), must be \(2, 4, 4\)", {"padding": 0}),
        (ValueError, r"bias .*\(3,\), must be \[4\]", {"bias": torch.zeros(3)}),
        (ValueError, "3, 1, 1, must be 4, 2, 1 if transposed", {"transposed": True, "weight": W.transpose(0, 1)}),
        (ValueError, "y is x", {"y": X, "weight": torch.randn(8, 8, 3)}),
        (ValueError, "backend .*cuda", {"backend": "cuda"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(conv1d_, error, message, **{"y": Y, "x": X, "weight": W, "padding": 1, **changed})


def test_bad_input_of_native(native: str) -> None:
    packed = pack(W, native)
    last = {"y": Y.transpose(1, 2).contiguous().transpose(1, 2), "x": X.transpose(1, 2).contiguous().transpose(1, 2)}
    check_refuses(conv1d_, ValueError, "x has strides", **{**last, "x": X}, weight=W, padding=1, backend=native)
    check_refuses(conv1d_, ValueError, "packed for 'native'", **last, weight=packed, padding=1, backend="eager")
    check_refuses(conv1d_, ValueError, "packed for transposed=False", **last, weight=packed, transposed=True)
    check_refuses(conv1d_, ValueError, "packed for 0 channels of x2", **last, weight=packed, x2=X[:, :1])


def test_weights_are_in_huge_pages() -> None:
    """They begin at one, keep their memory, and are copied as other tensors are."""
    tensor = empty((3, 2**18), torch.float32)
    tensor.fill_(2.0)
    assert tensor.shape == (3, 2**18)
    assert tensor.data_ptr() % PAGE == 0
    assert torch.equal(copy.deepcopy(tensor), tensor)
    assert empty((2, 0), torch.bfloat16).shape == (2, 0)
