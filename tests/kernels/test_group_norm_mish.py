"""Every backend of group norm, Mish and FiLM against `reference` in float64, and against torch's own layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.group_norm_mish import group_norm_mish_
from fastddpm_kernels.testing import Guarded, assert_close, check_op, check_refuses, to_layout
from torch import Tensor

BFLOAT = torch.bfloat16


@dataclass(frozen=True)
class Case:
    why: str
    shape: tuple[int, ...] = (2, 64, 8)
    groups: int = 8
    given: tuple[str, ...] = ("scale", "shift", "residual")
    offset: float = 0.0
    spread: float = 1.0


CASES = {
    "all": Case("FiLM and residual"),
    "film": Case("the first norm of a block", given=("scale", "shift")),
    "shift": Case("FiLM without a factor", given=("shift",)),
    "residual": Case("the second norm of a block", given=("residual",)),
    "plain": Case("neither", given=()),
    "odd": Case("groups that fill no vector", (3, 24, 5)),
    "one_group": Case("channels that are no power of two", (1, 40, 7), 1),
    "one_position": Case("one value more than a group's mean", (2, 32, 1)),
    "one_channel_a_group": Case("statistics over positions alone", (1, 8, 9)),
    "far_from_zero": Case("no digits are lost to the mean", offset=20.0),
    "large": Case("Mish is the identity there, and e^v no number", spread=100.0),
    "image": Case("two spatial dimensions", (2, 16, 3, 5)),
    "long": Case("a group that no program holds", (1, 16, 1100), 2),
    "empty": Case("nothing to do", (0, 16, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("backend", ["eager", "triton", "native"])
def test_results(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device, request: Any, monkeypatch: Any
) -> None:
    if backend == "native":
        request.getfixturevalue("native_bfloat16" if dtype == BFLOAT else "native")
        device = torch.device("cpu")
    elif backend == "triton":
        request.getfixturevalue("on_triton")
        if dtype == BFLOAT and case is not CASES["all"]:
            pytest.skip("one case shows the rounding")
        dtype = torch.float16 if dtype == BFLOAT else dtype  # triton's interpreter rounds bfloat16 wrongly
        if case is CASES["long"]:
            from fastddpm_kernels.group_norm_mish import triton

            monkeypatch.setitem(triton.make_launch.__kwdefaults__, "largest", 4096)
    n, channels = case.shape[:2]
    x = torch.randn(case.shape) + case.offset
    wide = {"x": x, "weight": torch.randn(channels) * case.spread, "bias": torch.randn(channels)}
    wide |= {"scale": torch.randn(n, channels), "shift": torch.randn(n, channels), "residual": torch.randn(case.shape)}
    wide = {name: value.to(device, dtype).double() for name, value in wide.items()}

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        given = {k: v.to(dtype) for k, v in wide.items() if k in ("x", "weight", "bias", *case.given)}
        given |= {k: to_layout(given[k], "channels_last") for k in ("x", "residual") if k in given}
        if "scale" in given:  # rows of a table
            given["scale"], given["shift"] = torch.cat([given["scale"], given["shift"]], 1).chunk(2, 1)
        y = Guarded(case.shape, dtype, device, "channels_last")
        group_norm_mish_(y.tensor, num_groups=case.groups, **given, backend=backend)
        y.check()
        return {"y": y.tensor}

    check_op(run, backend, dtype, rounds=4)


def test_reference_is_torchs_layers() -> None:
    x, w, b = torch.randn(2, 16, 5).double(), torch.randn(16).double(), torch.randn(16).double()
    y = torch.empty_like(x)
    group_norm_mish_(y, x, w, b, 4, eps=0.1, backend="reference")
    assert_close(y, F.mish(F.group_norm(x, 4, w, b, 0.1)))


@pytest.mark.parametrize("name", ["x", "residual"])
def test_y_may_be_an_input(name: str, native: str) -> None:
    given = {k: to_layout(torch.randn(2, 16, 5), "channels_last") for k in ("x", "residual")}
    vectors = {"weight": torch.randn(16), "bias": torch.randn(16), "num_groups": 4, "backend": native}
    expected = torch.empty_like(given["x"])
    group_norm_mish_(expected, **given, **vectors)
    group_norm_mish_(given[name], **given, **vectors)
    assert torch.equal(given[name], expected)


X, V = torch.randn(2, 8, 4), torch.randn(8)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "x .*list", {"x": [1.0]}),
        (TypeError, "residual .*float64", {"residual": X.double()}),
        (ValueError, r"x .*\(8, 4\)", {"x": X[0]}),
        (ValueError, r"y .*\(2, 8, 3\)", {"y": X[..., :3]}),
        (ValueError, r"weight .*\(4,\), must be \(8,\)", {"weight": V[:4]}),
        (ValueError, r"scale .*\(8,\), must be \(2, 8\)", {"scale": V}),
        (ValueError, "shift .*strides", {"shift": torch.randn(8, 2).T}),
        (ValueError, "num_groups is 3, must divide x's 8", {"num_groups": 3}),
        (ValueError, "eps is -1", {"eps": -1.0}),
        (ValueError, "backend .*cuda", {"backend": "cuda"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given = {"y": X.clone(), "x": X, "weight": V, "bias": V, "num_groups": 4, **changed}
    check_refuses(group_norm_mish_, error, message, **given)
