"""Test an op: run it on every backend, compare it with the reference in float64, and detect stray writes.

The tests and benchmarks of all ops share this. A test file holds a table of cases, and `check_op` runs each.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Run = Callable[[str, torch.dtype], dict[str, Tensor]]
Compare = Callable[[str, Tensor, Tensor, Tensor], None]

# Shapes [N, C, H, W] with the number of groups. A name says why the shape is hard. Small: the interpreter runs them.
SHAPES: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "plain": ((2, 64, 8, 8), 32),
    "channels_not_a_power_of_two": ((2, 96, 5, 7), 8),
    "twelve_channels_a_group": ((1, 48, 4, 4), 4),
    "one_group": ((2, 24, 3, 5), 1),
    "one_channel_a_group": ((2, 16, 4, 4), 16),
    "one_pixel": ((3, 32, 1, 1), 8),
    "one_row": ((2, 32, 1, 19), 4),
    "one_channel": ((2, 1, 16, 16), 1),
    "wide": ((1, 320, 3, 3), 32),
    "many_pixels": ((1, 8, 33, 31), 2),
    "empty_batch": ((0, 32, 4, 4), 8),
}

# The relative error that a result may always have in each dtype: a few units in the last place, since a value may be
# rounded once more than in the reference. [rms, max relative to the largest value]
FLOORS: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (3e-7, 2e-6),
    torch.float16: (5e-4, 2e-3),
    torch.bfloat16: (4e-3, 1.6e-2),
}


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the relative rms error and the largest error over the largest magnitude; `inf` where not finite."""
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.numel() == 0:
        return 0.0, 0.0
    if not bool(torch.isfinite(a).all()):
        return float("inf"), float("inf")
    difference = (a - e).abs()
    tiny = 1e-30
    rms = difference.square().mean().sqrt() / e.square().mean().sqrt().clamp_min(tiny)
    largest = difference.max() / e.abs().max().clamp_min(tiny)
    return float(rms), float(largest)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    eager: Tensor | None = None,
    factor: float = 2.0,
    max_factor: float | None = None,
    dtype: torch.dtype | None = None,
    name: str = "",
) -> None:
    """Assert that `actual` is as close to the truth `expected` as its dtype allows.

    Both the rms and the maximum error are bounded: by `FLOORS[dtype]`, or, where that is more, by `factor` times
    what `eager` (idiomatic torch in the same dtype, on the same inputs) loses against the same truth.

    Args:
        actual: the result under test.
        expected: the truth, usually computed in float64 from the same inputs.
        eager: torch's own result in `actual`'s dtype.
        factor: the allowed error, as a multiple of eager's.
        max_factor: the same for the largest error, if it is more: elements may lose unequally.
        dtype: whose floor applies; `actual.dtype` by default (name it where a float32 output is computed from
            half-precision intermediates).
        name: of the tensor, for the message.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    got = errors(actual, expected)
    floor = FLOORS[dtype or actual.dtype]
    granted = errors(eager, expected) if eager is not None else (0.0, 0.0)
    factors = (factor, factor if max_factor is None else max_factor)
    bounds = tuple(max(f, k * g) for f, k, g in zip(floor, factors, granted, strict=True))
    if got[0] <= bounds[0] and got[1] <= bounds[1]:
        return
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs().nan_to_num(float("inf"))
    where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    raise AssertionError(
        f"{name or 'result'} [{tuple(actual.shape)}, {actual.dtype}]: rms error {got[0]:.3g} (bound {bounds[0]:.3g}), "
        f"max {got[1]:.3g} (bound {bounds[1]:.3g}); worst at {where}: "
        f"{actual[where].item():.8g}, expected {expected[where].item():.8g}; "
        f"{int((difference > bounds[1] * float(expected.abs().max())).sum())} of {difference.numel()} beyond the bound"
    )


def assert_close_if_few(
    actual: Tensor,
    expected: Tensor,
    *,
    eager: Tensor,
    factor: float = 2.0,
    dtype: torch.dtype | None = None,
    name: str = "",
) -> None:
    """Call `assert_close`, but bound only the largest error of fewer than 16 values, which are too few for a mean."""
    if actual.numel() >= 16:
        assert_close(actual, expected, eager=eager, factor=factor, dtype=dtype, name=name)
        return
    assert actual.shape == expected.shape, name
    got, bound = errors(actual, expected)[1], max(FLOORS[dtype or actual.dtype][1], factor * errors(eager, expected)[1])
    assert got <= bound, f"{name}: max error {got:.3g} (bound {bound:.3g})"


def check_op(
    run: Run,
    backend: str,
    dtype: torch.dtype,
    *,
    rounds: float = 1.0,
    compare: Compare | None = None,
    threads: tuple[int, ...] = (3, 1),
) -> dict[str, Tensor]:
    """Compare every result of an op on a backend with that of `reference`, and return the backend's results.

    Memory that the backend allocates holds NaN. `native` must give the same bits for any number of threads. `eager` has
    no other torch result to compare with: in float64 it must equal the reference, and in `dtype` its error may be that
    of `rounds` roundings.

    Args:
        run: calls the op on the backend named, with its inputs cast to the dtype given, and returns results and
            gradients by name. The inputs must be exact in `dtype`. Names of gradients start with "d".
        backend: "eager", "triton" or "native".
        dtype: of the inputs.
        rounds: how many operations of `eager` round.
        compare: asserts that (name, actual, expected, eager) agree; `assert_close` with twice eager's error by default.
        threads: the numbers of threads that `native` runs on, one after the other.
    """
    expected = run("reference", torch.float64)
    if backend == "eager":
        actual, exact = run(backend, dtype), run(backend, torch.float64)
        for name, value in expected.items():
            assert_close(exact[name], value, name=f"{name} in float64")
            got, bound = errors(actual[name], value)[0], rounds * FLOORS[dtype][0]
            assert name.startswith("d") or got <= bound, f"{name}: rms error {got:.3g} (bound {bound:.3g})"
        return actual
    eager = run("eager", dtype)
    with poisoned_memory():
        if backend == "native":
            actual = same_on_any_threads(lambda: run(backend, dtype), threads)
        else:
            actual = run(backend, dtype)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if compare is None:
            assert_close(value, expected[name], eager=eager[name], name=name)
        else:
            compare(name, value, expected[name], eager[name])
    return actual


def gradients(results: dict[str, Tensor], leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the gradient of every given leaf, named "d" plus its name.

    The gradients of the results are multiples of 1 / 64 up to 2: exact in every dtype, and the same at every call.
    """
    generator = torch.Generator().manual_seed(1)
    given = {name: (torch.randint(-128, 129, y.shape, generator=generator) / 64).to(y) for name, y in results.items()}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    ends = {name: y for name, y in results.items() if y.requires_grad}
    grads = torch.autograd.grad(
        list(ends.values()), list(wanted.values()), [given[n] for n in ends], allow_unused=True, materialize_grads=True
    )
    for leaf, grad in zip(wanted.values(), grads, strict=True):
        assert grad.dtype == leaf.dtype
    return {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let torch and the native kernels use `count` threads within the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_on_any_threads(
    function: Callable[[], dict[str, Tensor]], threads: tuple[int, ...] = (3, 1)
) -> dict[str, Tensor]:
    """Return the result of `function` after checking that the number of threads changes no bit of it."""
    first: dict[str, Tensor] = {}
    for count in threads:
        with num_threads(count):
            results = function()
        first = first or results
        for name, value in results.items():
            assert torch.equal(value, first[name]), f"{name} is not the same on {threads[0]} and {count} threads"
    return first


def check_compiles(function: Callable[..., Any], *inputs: Tensor, exact: bool = True) -> None:
    """Compare a function with itself under `torch.compile(fullgraph=True)`: results, their strides, and gradients.

    Args:
        function: returns a tensor or a tuple of them, and may write to its inputs.
        inputs: leaves. Those that require a gradient are compared by it.
        exact: whether all bits must be equal. A compiler may add up a gradient's terms in another order.
    """
    found = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        own = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad) for x in inputs]
        results = call(*own)
        results = (results,) if isinstance(results, Tensor) else results
        leaves = {f" input {i}": x if x.requires_grad else None for i, x in enumerate(own)}
        named = {f"result {i}": y for i, y in enumerate(results)}
        grads = gradients(named, leaves) if any(x is not None for x in leaves.values()) else {}
        found.append({**named, **{f"input {i}": x for i, x in enumerate(own)}, **grads})
    torch._dynamo.reset()
    for name, plain in found[0].items():
        if exact:
            assert torch.equal(found[1][name], plain), name
        else:
            assert_close(found[1][name], plain.double(), name=name)
        assert name.startswith("d") or found[1][name].stride() == plain.stride(), name


def check_refuses(function: Callable[..., Any], error: type[Exception], message: str, /, **arguments: Any) -> None:
    """Assert that a call raises `error` with a one-line message that contains the pattern `message`."""
    try:
        function(**arguments)
    except error as raised:
        text = str(raised)
    else:
        raise AssertionError(f"nothing is raised; expected {error.__name__} with {message!r}")
    assert "\n" not in text, text
    assert re.search(message, text), f"{text!r} does not match {message!r}"


def to_layout(x: Tensor, layout: str) -> Tensor:
    """Return x [N, C, ...] "contiguous", "channels_last" (of any rank), or "neither" (every second value of memory)."""
    if layout == "neither":
        return torch.stack((x, x), -1)[..., 0]
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x.contiguous()


class Guarded:
    """A tensor [N, C, ...] of NaN amid memory of sevens. `check` asserts that nothing around it was written."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: str = "contiguous",
    ) -> None:
        count, guard = torch.Size(shape).numel(), 64  # 64 values keep the alignment of an allocation in every dtype
        self.memory = torch.full((count + 2 * guard,), 7.0, dtype=dtype, device=device)
        self.guards = (self.memory[:guard], self.memory[count + guard :])
        inner = self.memory[guard : guard + count].fill_(float("nan"))
        last = layout == "channels_last"
        self.tensor = inner.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if last else inner.view(shape)

    def check(self) -> None:
        assert all(bool((guard == 7).all()) for guard in self.guards)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let `torch.empty` and similar functions return NaN (integers: the largest value), so missing writes show."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # a module whose attributes are properties: opaque to type checkers
    was_fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warn)
        deterministic.fill_uninitialized_memory = was_fill
