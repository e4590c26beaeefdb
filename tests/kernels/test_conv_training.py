"""`conv3x3` and the gradients of the native ops: against float64 on hard shapes, and what they refuse.

A convolution or gradient may be as far from float64 as torch's in float32 is, times what Winograd's algorithm must lose
(`error_factor`), times two; where torch adds fewer terms than the transforms do, as on one pixel, a floor. In bfloat16
the same, against torch's own in bfloat16.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastddpm_kernels import native as _native
from fastddpm_kernels.backend import BackendError, why_not
from fastddpm_kernels.conv import error_factor, packed_values
from fastddpm_kernels.conv.packing import _transforms
from fastddpm_kernels.conv.training import _conv3x3, conv3x3, resolve_conv3x3
from fastddpm_kernels.group_norm_silu import group_norm_silu
from fastddpm_kernels.testing import FLOORS, assert_close, errors, poisoned_memory
from torch import Tensor

# (N, C, C2, O, H, W): less than a tile, less than a vector, one more than a vector or a panel, borders in all places,
# a second source that begins within a vector, and enough tiles for several chunks and blocks.
SHAPES = {
    "one_pixel": (1, 1, 0, 1, 1, 1),
    "two_by_three": (2, 3, 0, 5, 2, 3),
    "seven_by_nine": (1, 17, 0, 130, 7, 9),
    "one_more_than_a_panel": (2, 130, 0, 17, 7, 9),
    "two_sources": (2, 17, 3, 33, 5, 4),
    "many_tiles": (3, 80, 80, 96, 36, 33),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def make(shape: str, layout: str = "contiguous") -> tuple[list[Tensor | None], Tensor]:
    """x, weight, bias and x2, and a gradient of the result."""
    n, c, c2, o, h, w = SHAPES[shape]
    weight = torch.randn(o, c + c2, 3, 3) / math.sqrt(9 * (c + c2))
    x2 = torch.randn(n, c2, h, w) if c2 else None
    given = [torch.randn(n, c, h, w), weight, torch.randn(o), x2]
    return [t if t is None or t.ndim < 4 else t.to(memory_format=LAYOUTS[layout]) for t in given], torch.randn(
        n, o, h, w
    )


def gradients(function: Any, tensors: list[Tensor | None], dy: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The result, and the gradients of all tensors that are given, computed in `dtype`."""
    leaves = [None if t is None else t.to(dtype).detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("native", "threads")
def test_result_and_gradients(shape: str, layout: str) -> None:
    torch.manual_seed(0)
    tensors, dy = make(shape, layout)

    def run(backend: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return gradients(lambda *given: conv3x3(*given, backend=backend), tensors, dy, dtype)

    with poisoned_memory():
        actual = run("native")
    mean, worst = (2 * error_factor("winograd4", worst=worst) for worst in (False, True))
    rms, largest = FLOORS[torch.float32]
    names = ("y", "dx", "dweight", "dbias", "dx2")
    for name, a, e, t in zip(names, actual, run("eager", torch.float64), run("eager"), strict=False):
        if shape in ("one_pixel", "two_by_three"):
            got = errors(a, e)
            assert got[0] < 3 * rms, name
            assert got[1] < 3 * largest, name
        else:
            assert_close(a, e, eager=t, factor=mean, max_factor=worst, name=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("native_bfloat16", "threads")
def test_result_and_gradients_in_bfloat16(shape: str, layout: str) -> None:
    """Of inputs and outputs; the weights stay in float32, and so do their gradients."""
    torch.manual_seed(0)
    tensors, dy = make(shape, layout)
    x, weight, bias, x2 = tensors
    given = [x.bfloat16(), weight, bias, None if x2 is None else x2.bfloat16()]  # type: ignore[union-attr]
    dy = dy.bfloat16()

    def run(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, ...]:
        of_data, of_parameters = dtypes
        kinds = (of_data, of_parameters, of_parameters, of_data)
        leaves = [
            None if t is None else t.to(kind).detach().requires_grad_() for t, kind in zip(given, kinds, strict=True)
        ]
        y = conv3x3(*leaves, backend=backend)  # type: ignore[arg-type]
        return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(of_data))

    half, single, double = torch.bfloat16, torch.float32, torch.float64
    with poisoned_memory():
        actual = run("native", (half, single))
    factor = 2 * error_factor("winograd2")
    expected, eager = run("eager", (double, double)), run("eager", (half, half))
    for name, a, e, t in zip(("y", "dx", "dweight", "dbias", "dx2"), actual, expected, eager, strict=False):
        assert a.dtype == (single if name in ("dweight", "dbias") else half), name
        if a.numel() < 16:  # too few for a mean
            assert errors(a, e)[1] <= max(factor * FLOORS[half][1], factor * errors(t, e)[1]), name
        else:
            assert_close(a, e, eager=t, factor=factor, dtype=half, name=name)


@pytest.mark.usefixtures("native_bfloat16")
def test_in_bfloat16_small_integers_are_exact() -> None:
    """Nothing is rounded where transformed values have eight bits: what is not exact is in the wrong place."""
    torch.manual_seed(0)
    for n, c, c2, o, h, w in SHAPES.values():
        x = torch.randint(-2, 3, (n, c, h, w)).bfloat16()
        x2 = torch.randint(-2, 3, (n, c2, h, w)).bfloat16() if c2 else None
        weight = 4.0 * torch.randint(-1, 2, (o, c + c2, 3, 3))
        whole = (x if x2 is None else torch.cat((x, x2), 1)).double()
        expected = torch.nn.functional.conv2d(whole, weight.double(), padding=1)
        assert torch.equal(conv3x3(x, weight, None, x2, backend="native"), expected.bfloat16())


@pytest.mark.usefixtures("native")
def test_gradients_are_those_of_the_result() -> None:
    """Of three convolutions in a row, by central differences along one direction, in the result's own precision."""
    torch.manual_seed(0)
    (x, weight, bias, _), dy = make("two_by_three")
    assert x is not None and weight is not None and bias is not None  # noqa: PT018
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    grads = torch.autograd.grad(_conv3x3(*leaves, None), leaves, dy)
    for i, grad in enumerate(grads):
        direction = torch.randn_like(grad)

        def at(step: float, i: int = i, direction: Tensor = direction) -> float:
            moved = [t.detach() + step * direction if j == i else t.detach() for j, t in enumerate(leaves)]
            return float((_conv3x3(*moved, None).double() * dy).sum())

        # y is linear in each argument, so a difference over any step is exact.
        assert (at(1.0) - at(-1.0)) / 2 == pytest.approx(float((grad.double() * direction).sum()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 3)])
@pytest.mark.usefixtures("native")
def test_only_what_is_wanted_has_a_gradient(wanted: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors, dy = make("two_sources")
    every = gradients(lambda *given: conv3x3(*given, backend="native"), tensors, dy, torch.float32)[1:]
    for i in wanted:
        tensors[i].requires_grad_()  # type: ignore[union-attr]
    conv3x3(*tensors, backend="native").backward(dy)  # type: ignore[arg-type]
    for i, (tensor, expected) in enumerate(zip(tensors, every, strict=True)):
        if i in wanted:
            assert torch.equal(tensor.grad, expected)  # type: ignore[union-attr, arg-type]
        else:
            assert tensor.grad is None  # type: ignore[union-attr]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("native")
def test_gradients_do_not_depend_on_threads(half: bool, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    tensors, dy = make("many_tiles")
    if half:
        request.getfixturevalue("native_bfloat16")

    def conv(x: Tensor, weight: Tensor, bias: Tensor, x2: Tensor) -> Tensor:
        given = (x.bfloat16(), weight, bias, x2.bfloat16()) if half else (x, weight, bias, x2)
        return conv3x3(*given, backend="native")

    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gradients(conv, tensors, dy, torch.float32))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("algorithm", ["winograd2", "winograd4"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("native", "threads")
def test_packing_is_that_of_sampling(algorithm: str, transposed: bool) -> None:
    torch.manual_seed(0)
    for layout in LAYOUTS.values():
        weight = torch.randn(70, 37, 3, 3).to(memory_format=layout)
        expected = packed_values(weight.transpose(0, 1).flip(2, 3) if transposed else weight, algorithm)
        packed = torch.full_like(expected, float("nan"))
        _native.conv3x3_pack(packed, weight, int(algorithm[-1]), transposed=transposed)
        torch.testing.assert_close(packed, expected, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("channels2", [0, 5, 40])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("native_bfloat16", "threads")
def test_packing_in_bfloat16(channels2: int, transposed: bool) -> None:
    """Pairs of channels in a word, of every 32 of a source those with even numbers first."""
    torch.manual_seed(0)
    for layout in LAYOUTS.values():
        weight = torch.randn(70, 77, 3, 3).to(memory_format=layout)
        seen = weight.transpose(0, 1).flip(2, 3) if transposed else weight
        outs, ins = seen.shape[:2]
        parts = [seen[:, : ins - channels2], seen[:, ins - channels2 :]]
        channels: list[int] = []  # of every value, -1 where there is none
        for begin, part in zip((0, ins - channels2), parts, strict=True):
            for first in range(0, part.shape[1], 32):
                places = [*range(first, first + 32, 2), *range(first + 1, first + 32, 2)]
                channels += [begin + place if place < part.shape[1] else -1 for place in places]
        panels = -(-outs // 32)
        padded = torch.zeros(panels * 32, ins + 1, 3, 3)
        padded[:outs, :ins] = seen
        g = _transforms(2)[1]
        points = torch.einsum("ai,bj,ocij->aboc", g, g, padded[:, channels].double()).flatten(0, 1)
        expected = points.unflatten(1, (panels, 32)).unflatten(3, (-1, 2)).permute(0, 1, 3, 2, 4)
        packed = torch.full((expected.numel() // 2,), float("nan"))
        options: dict[str, Any] = {"channels2": channels2, "bfloat16": True, "transposed": transposed}
        _native.conv3x3_pack(packed, weight, 2, **options)
        torch.testing.assert_close(packed.view(torch.bfloat16).double(), expected.flatten(), rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "c", "c2", "size", "groups"),
    [
        (1, 1, 0, (4, 4), 1),
        (2, 6, 0, (2, 3), 3),
        (2, 17, 13, (7, 9), 5),
        (1, 130, 0, (33, 5), 1),
        (5, 48, 16, (16, 9), 8),
    ],
)
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.usefixtures("native", "threads")
def test_gradients_of_group_norm(
    n: int, c: int, c2: int, size: tuple[int, int], groups: int, film: bool, half: bool
) -> None:
    torch.manual_seed(0)
    low = torch.bfloat16 if half else torch.float32
    all_, x2 = c + c2, torch.randn(n, c2, *size) if c2 else None
    rows = (None, *torch.randn(n, 2 * all_).chunk(2, 1)) if film else (torch.randn(n, all_), None, None)
    tensors = [torch.randn(n, c, *size) * 2 + 3, torch.randn(all_), torch.randn(all_), x2, *rows]
    tensors = [None if t is None else t.to(low) for t in tensors]
    dy = torch.randn(n, all_, *size).to(low)

    def run(backend: str, dtype: torch.dtype = low) -> tuple[Tensor, ...]:
        def norm(x: Tensor, weight: Tensor, bias: Tensor, x2: Any, time_bias: Any, scale: Any, shift: Any) -> Tensor:
            options = {"x2": x2, "time_bias": time_bias, "scale": scale, "shift": shift}
            return group_norm_silu(x, weight, bias, groups, **options, backend=backend)

        return gradients(norm, tensors, dy, dtype)

    with poisoned_memory():
        actual = run("native")
    for i, (a, e, t) in enumerate(zip(actual, run("eager", torch.float64), run("eager"), strict=True)):
        if a.numel() < 16:  # too few for a mean
            assert errors(a, e)[1] <= max(FLOORS[low][1], 2 * errors(t, e)[1]), f"result {i}"
        else:
            assert_close(a, e, eager=t, name=f"result {i}")


@pytest.mark.usefixtures("native")
def test_compiled_without_graph_breaks() -> None:
    torch.manual_seed(0)
    (x, weight, bias, x2), dy = make("two_sources")

    def both(x: Tensor, weight: Tensor, bias: Tensor, x2: Tensor) -> Tensor:
        h = conv3x3(x, weight, bias, x2)
        backend = "native" if why_not("native", "cpu", "group_norm_silu", h.dtype) is None else "eager"
        return group_norm_silu(h, bias, bias, 3, backend=backend)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    tensors: list[Tensor | None] = [x, weight, bias, x2]
    for a, b in zip(*(gradients(f, tensors, dy, torch.float32) for f in (compiled, both)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("native")
def test_ops_are_registered_as_torch_wants_them() -> None:
    torch.manual_seed(0)
    (x, weight, bias, x2), _ = make("two_sources", "channels_last")
    leaves = [t.requires_grad_() for t in (x, weight, bias, x2) if t is not None]
    torch.library.opcheck(torch.ops.fastddpm.conv3x3.default, tuple(leaves))
    vector = torch.ones(17, requires_grad=True)
    given = (leaves[0], vector, vector, 17, 1e-5, None, None, None, None, True, True)
    torch.library.opcheck(torch.ops.fastddpm.group_norm_silu.default, given)


@pytest.mark.usefixtures("native_bfloat16")
def test_ops_are_registered_as_torch_wants_them_in_bfloat16() -> None:
    torch.manual_seed(0)
    (x, weight, bias, x2), _ = make("two_sources", "channels_last")
    assert x is not None and weight is not None and bias is not None and x2 is not None  # noqa: PT018
    leaves = [t.requires_grad_() for t in (x.bfloat16(), weight, bias, x2.bfloat16())]
    torch.library.opcheck(torch.ops.fastddpm.conv3x3.default, tuple(leaves))


@pytest.mark.usefixtures("native")
def test_where_torch_is_faster_in_bfloat16_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, weight, bias, _), _ = make("two_by_three")
    assert x is not None
    half = x.bfloat16()
    for kind, reason in ((2, ""), (0, "has no AVX512-BF16")):
        monkeypatch.setattr(_native.get(), "bfloat16", kind)
        assert resolve_conv3x3(half, weight, bias) == "eager"
        assert resolve_conv3x3(x, weight, bias) == "native"
        if kind == 2:
            assert resolve_conv3x3(half, weight, bias, backend="native") == "native"
        else:
            with pytest.raises(BackendError, match=reason):
                resolve_conv3x3(half, weight, bias, backend="native")


def test_elsewhere_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    (x, weight, bias, x2), _ = make("two_sources")
    assert x is not None and weight is not None and bias is not None and x2 is not None  # noqa: PT018
    whole = torch.cat((x, x2), 1)
    expected = torch.nn.functional.conv2d(whole, weight, bias, padding=1)
    assert torch.equal(conv3x3(x, weight, bias, x2, backend="eager"), expected)
    half = [t.bfloat16() for t in (x, weight, bias, x2)]  # of the parameters as well, which native has in float32
    assert torch.equal(
        conv3x3(*half), torch.nn.functional.conv2d(torch.cat((half[0], half[3]), 1), half[1], half[2], padding=1)
    )
    with pytest.raises(BackendError, match="native kernels take parameters in torch.float32, not torch.bfloat16"):
        conv3x3(*half, backend="native")
    with pytest.raises(BackendError, match=r"native kernels compute in torch.float32 or torch.bfloat16, not"):
        conv3x3(x.half(), weight, bias, x2.half(), backend="native")
    with pytest.raises(BackendError, match=r"native kernels compute in torch.float32 or torch.bfloat16, not"):
        conv3x3(x, weight, bias, x2.bfloat16(), backend="native")
    monkeypatch.setattr("fastddpm_kernels.native.why_not", lambda: "there is no C++ compiler")
    assert torch.equal(conv3x3(x, weight, bias, x2), expected)
    with pytest.raises(BackendError, match="conv3x3: backend 'native' cannot run here: there is no C"):
        conv3x3(x, weight, bias, x2, backend="native")


@pytest.mark.usefixtures("native")
def test_nothing_in_nothing_out() -> None:
    weight = torch.ones(4, 3, 3, 3, requires_grad=True)
    y = conv3x3(torch.ones(0, 3, 5, 5), weight, backend="native")
    assert y.shape == (0, 4, 5, 5)
    y.sum().backward()
    assert not weight.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x is NoneType, must be a tensor"),
        ({"x": torch.ones(2, 3, 4)}, r"x has shape \(2, 3, 4\), must be \[N, C, H, W\]"),
        ({"weight": torch.ones(4, 3, 1, 1)}, r"weight has shape \(4, 3, 1, 1\), must be \[O, 3, 3, 3\]"),
        ({"bias": torch.ones(3)}, r"bias has shape \(3,\), must be \[4\], one per row of weight"),
        ({"x2": torch.ones(2, 1, 5, 5)}, r"x2 has shape \(2, 1, 5, 5\), must equal x's \(2, 3, 6, 6\)"),
        ({"backend": "triton"}, "backend is 'triton', must be 'auto' or one of native, eager, reference"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(2, 3, 6, 6), "weight": torch.ones(4, 3, 3, 3)}
    with pytest.raises((TypeError, ValueError), match=message):
        conv3x3(**{**given, **change})
