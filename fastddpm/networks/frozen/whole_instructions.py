"""The instructions of whole layers: a convolution with its norm and sums, an attention block, transformers' layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastddpm_kernels.attention_block import attention_block_
from fastddpm_kernels.conv import Norm, conv_, conv_epilogue_
from fastddpm_kernels.layer_norm_linear import layer_norm_linear_
from torch import Tensor

from fastddpm.networks.frozen.instructions import Machine, bound_once


class Slots(NamedTuple):
    """What a convolution reads and writes."""

    source: int
    target: int
    second: int | None = None
    residual: int | None = None
    shortcut: int | None = None
    shortcut2: int | None = None


class NormConstants(NamedTuple):
    """The norm before a convolution, without the statistics."""

    weight: Tensor
    bias: Tensor
    num_groups: int
    eps: float
    scale: Tensor | None
    shift: Tensor | None
    activation: str | None


def norm_of(m: Machine, slots: Slots, constants: NormConstants | None) -> Norm | None:
    """Return the norm of what a convolution reads, with its statistics."""
    if constants is None:
        return None
    second = None if slots.second is None else m.statistics[slots.second]
    return Norm(statistics=m.statistics[slots.source], statistics2=second, **constants._asdict())


def whole_conv(
    m: Machine, slots: Slots, weight: Tensor, outputs: int, size: tuple[int, int], norm: NormConstants | None,
    options: dict[str, Any],
) -> Callable[[], object]:  # fmt: skip
    """Convolve norm(concat(source, second)), add what is given, and leave the statistics that later layers ask for."""

    def bind() -> Callable[[], object]:
        x = m.slots[slots.source]
        images = {"x2": slots.second, "residual": slots.residual, "shortcut": slots.shortcut,
                  "shortcut2": slots.shortcut2}  # fmt: skip
        given: dict[str, Any] = {name: None if slot is None else m.slots[slot] for name, slot in images.items()}
        return conv_.bind(
            m.place(slots.target, x, outputs, size), x, weight, **given, **options, norm=norm_of(m, slots, norm),
            statistics=m.statistics.get(slots.target), workspace=m.workspace, allow_tf32=m.allow_tf32,
            backend=m.backend,
        )  # fmt: skip

    return bound_once(m, slots, bind)


def epilogue(
    m: Machine, slot: int, residual: int | None, bias: Tensor | None, time: Tensor | None
) -> Callable[[], object]:
    """Add residual, bias and a row of the time table to a slot, and leave its statistics."""

    def bind() -> Callable[[], object]:
        x = m.slots[slot]
        return conv_epilogue_.bind(
            x, x, bias=bias, residual=None if residual is None else m.slots[residual], time_bias=time,
            statistics=m.statistics[slot], backend=m.backend,
        )  # fmt: skip

    return bound_once(m, (slot, residual), bind)


def attention_block(
    m: Machine, source: int, target: int, norm: NormConstants, matrices: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Callable[[], object]:
    """Compute norm, attention of one head, projections and residual."""

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        return attention_block_.bind(
            m.place(target, x, x.shape[1]), x, norm.weight, norm.bias, norm.num_groups, *matrices, eps=norm.eps,
            given=m.statistics[source], statistics=m.statistics.get(target), allow_tf32=m.allow_tf32, backend=m.backend,
        )  # fmt: skip

    return bound_once(m, (source, target), bind)


def layer_norm_linear(
    m: Machine, source: int, target: int, weight: Tensor, sums: Tensor, bias: Tensor, eps: float, gate: bool
) -> Callable[[], object]:
    """Normalise the channels, multiply them by a matrix, and gate the result."""

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        y = m.place(target, x, len(weight) // (2 if gate else 1))
        return layer_norm_linear_.bind(
            y, x, weight, sums, bias, eps=eps, gate=gate, allow_tf32=m.allow_tf32, backend=m.backend
        )

    return bound_once(m, (source, target), bind)
