"""`rms_norm_silu_`, with a convolution's bias before the norm and a residual after the activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastddpm_kernels.group_norm_silu import rms_norm_silu, rms_norm_silu_
from fastddpm_kernels.testing import assert_close
from torch import Tensor

SHAPES = [(2, 17, 3, 5), (1, 130, 1, 1), (3, 64, 8, 8), (2, 5, 7)]


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, last: bool) -> dict[str, Any]:
    n, channels = shape[:2]

    def image() -> Tensor:
        x = torch.randn(shape, device=device).to(dtype)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x

    rows = torch.randn(1, 2 * channels, device=device).expand(n, -1)  # as a row of the table of all blocks
    return {
        "x": image(), "residual": image(), "weight": torch.randn(channels, device=device),
        "bias": torch.randn(channels, device=device), "scale": rows[:, :channels], "shift": rows[:, channels:],
    }  # fmt: skip


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() for name, value in given.items()}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_its_definition(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, backend: str, device: torch.device
) -> None:
    given = make(shape, dtype, device, last)
    x, residual, weight, bias, scale, shift = wide(given).values()
    columns = (1, -1, *(1,) * (x.ndim - 2))
    h = torch.nn.functional.normalize(x + bias.view(columns), dim=1) * weight.view(columns) * shape[1] ** 0.5
    rows = [value.reshape(*value.shape, *columns[2:]) for value in (scale, shift)]
    expected = torch.nn.functional.silu(h * (1 + rows[0]) + rows[1]) + residual
    y, eager = torch.full_like(given["x"], torch.nan), torch.empty_like(given["x"])
    rms_norm_silu_(eager, **given, backend="eager")
    rms_norm_silu_(y, **given, backend=backend)
    assert_close(y, expected, eager=eager)
    reference = torch.empty_like(x)
    rms_norm_silu_(reference, **wide(given), backend="reference")
    torch.testing.assert_close(reference, expected, rtol=1e-12, atol=1e-12)


def test_in_the_place_of_what_it_reads(backend: str, device: torch.device) -> None:
    given = make((2, 24, 4, 4), torch.float32, device, True)
    y = torch.empty_like(given["x"])
    rms_norm_silu_(y, **given, backend=backend)
    for name in ("x", "residual"):
        other = {**given, name: given[name].clone(memory_format=torch.preserve_format)}
        rms_norm_silu_(other[name], **other, backend=backend)
        assert torch.equal(other[name], y)


def test_without_bias_and_residual_is_the_function(backend: str, device: torch.device) -> None:
    given = make((2, 24, 4, 4), torch.float32, device, True)
    given.pop("bias"), given.pop("residual")
    y = torch.empty_like(given["x"])
    rms_norm_silu_(y, **given, activation=None, backend=backend)
    assert torch.equal(y, rms_norm_silu(**given, activation=None, backend=backend))


def test_bad_input() -> None:
    given = make((2, 24, 4, 4), torch.float32, torch.device("cpu"), True)
    y = torch.empty_like(given["x"])
    with pytest.raises(ValueError, match=r"bias has shape \(23,\), must be \[24\], one per channel"):
        rms_norm_silu_(y, **{**given, "bias": given["bias"][:-1]})
    with pytest.raises(ValueError, match=r"residual has shape \(1, 24, 4, 4\), must be \(2, 24, 4, 4\)"):
        rms_norm_silu_(y, **{**given, "residual": given["residual"][:1]})
    with pytest.raises(ValueError, match="bias has strides .*, must be 1 from channel to channel"):
        rms_norm_silu_(y, **{**given, "bias": torch.randn(48)[::2]})
