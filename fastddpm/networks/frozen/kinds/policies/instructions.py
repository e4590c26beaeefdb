"""Instructions that only diffusion policies need. A slot [N, C, 1, L] is a sequence [N, C, L]."""

from __future__ import annotations

from collections.abc import Callable

from fastddpm_kernels.conv1d import PackedWeight, conv1d_
from fastddpm_kernels.group_norm_mish import group_norm_mish_
from torch import Tensor

from fastddpm.networks.frozen.instructions import Machine, bound_once


def conv1d(
    m: Machine,
    source: int,
    second: int | None,
    target: int,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    stride: int,
    padding: int,
    transposed: bool,
) -> Callable[[], object]:
    """Convolve concat(source, second) into `target` of `shape` (C, 1, L), with bias."""

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        if not m.static:
            channels, _, length = shape
            m.slots[target] = x.new_empty(len(x), 1, length, channels).permute(0, 3, 1, 2)
        return conv1d_.bind(
            m.slots[target].squeeze(2), x.squeeze(2), weight, x2=None if second is None else m.slots[second].squeeze(2),
            bias=bias, stride=stride, padding=padding, transposed=transposed, backend=m.backend,
        )  # fmt: skip

    return bound_once(m, (target, source, second), bind)


def group_norm_mish(
    m: Machine,
    source: int,
    target: int,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: int | None,
) -> Callable[[], object]:
    """Apply group norm, Mish and FiLM to `source`, and add `residual`."""

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        return group_norm_mish_.bind(
            m.place(target, x, x.shape[1]), x, weight, bias, groups, eps=eps, scale=scale, shift=shift,
            residual=None if residual is None else m.slots[residual], backend=m.backend,
        )  # fmt: skip

    return bound_once(m, (source, target, residual), bind)
