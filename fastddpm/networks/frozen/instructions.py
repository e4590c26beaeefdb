"""The instructions of a frozen U-Net: each reads and writes numbered slots, and knows its cost.

A slot holds one activation, [N, C, H, W] in channels-last order. With CUDA or native kernels it is a place in one
preallocated block of memory that every step reuses. Ops on such slots are bound at the first run, which checks their
operands and looks up tuned choices; later runs only launch. Elsewhere each instruction puts its result into the slot
and the last reader clears it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastddpm_kernels.attention import attention_, attention_by_torch
from fastddpm_kernels.conv import PackedWeight, conv_
from fastddpm_kernels.conv.upsampling import cudnn_conv, cudnn_conv_transpose, double_
from fastddpm_kernels.cross_attention import cross_attention_
from fastddpm_kernels.geglu import geglu_
from fastddpm_kernels.group_norm_silu import group_norm_silu, group_norm_silu_
from fastddpm_kernels.layer_norm import layer_norm_
from fastddpm_kernels.pointwise_conv import pointwise_conv_
from fastddpm_kernels.residual_add import residual_add_
from torch import Tensor


@dataclass
class Instruction:
    """One step of a frozen U-Net.

    Attributes:
        name: the layer of the U-Net that it computes, or computes a part of.
        kind: "time", "conv", "norm", "pointwise", "attention", "residual" or "other".
        reads, writes: slots. A slot that is written in place is in both.
        kernels: the number of kernels that it launches on CUDA.
        flops: multiplications and additions of its matrix products and convolutions.
        bytes: the traffic if each operand, weights included, is read once and each result written once.
        run: runs it.
        size: (height, width) of its result; None for the time table.
    """

    name: str
    kind: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    kernels: int
    flops: int
    bytes: int
    run: Callable[[], object] = field(repr=False)
    size: tuple[int, int] | None = None


@dataclass
class Machine:
    """The state that instructions run on.

    Attributes:
        fused: whether the fused kernels run, which write to given memory; else plain torch.
        static: whether every slot has its place before the first run (CUDA with cuDNN, and native kernels).
        backend: of the fused kernels: "triton", "native", "eager" or "reference".
        allow_tf32: whether float32 products may be rounded to TF32.
        slots: the activations.
        fixed: the slots whose place in memory is the same at every run.
        statistics: those of a slot's blocks, for the convolutions that normalise what they read.
        workspace: scratch for the fused kernels, float32.
        timesteps: int64 [S], those of the rows of the table.
        step: int64 [1], the table row of the present run.
    """

    fused: bool
    static: bool
    backend: str
    allow_tf32: bool = False
    slots: list[Any] = field(default_factory=list)
    fixed: set[int] = field(default_factory=set)
    statistics: dict[int, Tensor] = field(default_factory=dict)
    workspace: Tensor | None = None
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0))
    step: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def native(self) -> bool:
        """Whether convolutions run on the native backend, which adds biases and residuals as it writes."""
        return self.backend == "native"

    def place(self, slot: int, like: Tensor, channels: int, size: tuple[int, int] | None = None) -> Tensor:
        """Return the memory for the result of a fused kernel: the slot's own, or new memory of the size of `like`."""
        if not self.static and slot not in self.fixed:
            n, _, *own = like.shape
            h, w = size or own
            self.slots[slot] = like.new_empty(n, h, w, channels).permute(0, 3, 1, 2)
        return self.slots[slot]


def bound_once(
    m: Machine, slots: Sequence[int | None], bind: Callable[[], Callable[[], object]]
) -> Callable[[], object]:
    """Return a function that runs the op from `bind`, bound once if all `slots` are fixed, else at every run."""
    launch: Callable[[], object] | None = None

    def run() -> None:
        nonlocal launch
        if launch is not None:
            launch()
            return
        made = bind()
        if all(slot is None or slot in m.fixed for slot in slots):
            launch = made
        made()

    return run


def conv(
    m: Machine, source: int, target: int, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> Callable[[], object]:
    """Convolve. On CUDA leave out the bias, which would be a separate kernel there."""

    def run_static() -> None:
        cudnn_conv(m.slots[source], weight, stride, padding, m.allow_tf32, m.slots[target])

    def run() -> None:
        m.slots[target] = channels_last(F.conv2d(m.slots[source], weight, bias, stride, padding))

    return run_static if m.static else run


def native_conv(
    m: Machine,
    source: int,
    target: int,
    weight: PackedWeight,
    bias: Tensor | None,
    stride: int = 1,
    padding: int = 1,
    second: int | None = None,
    residual: int | None = None,
) -> Callable[[], object]:
    """Convolve concat(source, second) with the native backend and add residual, which may be the target."""

    def bind() -> Callable[[], object]:
        return conv_.bind(
            m.slots[target], m.slots[source], weight, x2=None if second is None else m.slots[second], bias=bias,
            residual=None if residual is None else m.slots[residual], stride=stride, padding=padding,
            upsample=weight.upsample, backend="native",
        )  # fmt: skip

    return bound_once(m, (target, source, second, residual), bind)


def upsample(m: Machine, source: int, target: int, weight: Tensor, bias: Tensor | None) -> Callable[[], object]:
    """Upsample by two and convolve by 3x3, as one transposed convolution (`transposed_weight`).

    Where a tuned table says that `double` and a plain convolution are faster, the builder uses these.
    """

    def run() -> None:
        x = m.slots[source]
        if m.static:
            m.slots[target] = cudnn_conv_transpose(x, weight, m.allow_tf32)
        else:
            m.slots[target] = channels_last(F.conv_transpose2d(x, weight, bias, stride=2, padding=1))

    return run


def double(m: Machine, source: int, target: int) -> Callable[[], object]:
    """Upsample by two (nearest neighbour), in one copy."""

    return bound_once(m, (source, target), lambda: partial(double_, m.slots[target], m.slots[source]))


def norm(
    m: Machine,
    source: int,
    target: int,
    second: int | None,
    residual: int | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Callable[[], object]:
    """Apply group norm, FiLM and SiLU to concat(source + residual, second); the sum replaces `source`."""
    rows = {"time_bias": time_bias, "scale": scale, "shift": shift}

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        added = None if residual is None else m.slots[residual]
        return group_norm_silu_.bind(
            m.place(target, x, len(weight)), x, weight, bias, groups, eps=eps,
            x2=None if second is None else m.slots[second], residual=added, total=None if added is None else x, **rows,
            activation=activation, backend=m.backend, workspace=m.workspace,
        )  # fmt: skip

    def run() -> None:
        x = m.slots[source]
        if residual is not None:
            x = x.add_(m.slots[residual])
        x2 = None if second is None else m.slots[second]
        m.slots[target] = group_norm_silu(
            x, weight, bias, groups, eps=eps, x2=x2, **rows, activation=activation, backend=m.backend
        )

    return bound_once(m, (source, target, second, residual), bind) if m.fused else run


def pointwise(
    m: Machine,
    source: int,
    target: int,
    weight: Tensor,
    bias: Tensor | None,
    second: int | None = None,
    weight2: Tensor | None = None,
    residual: int | None = None,
) -> Callable[[], object]:
    """Convolve concat(source, second) by 1x1 and add residual, which may be the target."""

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        return pointwise_conv_.bind(
            m.slots[target] if residual == target else m.place(target, x, len(weight)), x, weight,
            x2=None if second is None else m.slots[second], weight2=weight2, bias=bias,
            residual=None if residual is None else m.slots[residual], allow_tf32=m.allow_tf32, backend=m.backend,
        )  # fmt: skip

    return bound_once(m, (source, target, second, residual), bind)


def linear(m: Machine, source: int, target: int, weight: Tensor, bias: Tensor | None) -> Callable[[], object]:
    """Convolve by 1x1, with bias, by the vendor's matrix product. `weight` is [I, O]."""

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        rows, out = rows_of(x), rows_of(m.place(target, x, weight.shape[1]))
        if bias is None:
            return lambda: torch.mm(rows, weight, out=out)
        return lambda: torch.addmm(bias, rows, weight, out=out)

    return bound_once(m, (source, target), bind)


def attention(m: Machine, source: int, target: int, heads: int, head_dim: int) -> Callable[[], object]:
    """Compute softmax(q k / sqrt(head_dim)) v from [q, k, v], the channels of `source`."""

    def bind() -> Callable[[], object]:
        return attention_.bind(m.slots[target], m.slots[source], heads, head_dim)

    def run() -> None:
        m.slots[target] = attention_by_torch(m.slots[source], heads, head_dim)

    return bound_once(m, (source, target), bind) if m.native else run


def layer_norm(
    m: Machine, source: int, target: int, residual: int | None, weight: Tensor, bias: Tensor, eps: float
) -> Callable[[], object]:
    """Normalise the channels of source + residual; the sum replaces `source`."""

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        return layer_norm_.bind(
            m.place(target, x, x.shape[1]), x, weight, bias, eps=eps,
            residual=None if residual is None else m.slots[residual], total=None if residual is None else x,
            backend=m.backend if m.fused else "eager",
        )  # fmt: skip

    return bound_once(m, (source, target, residual), bind)


def geglu(m: Machine, source: int, target: int) -> Callable[[], object]:
    """Multiply the first half of the channels by the GELU of the second."""

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        return geglu_.bind(m.place(target, x, x.shape[1] // 2), x, backend=m.backend if m.fused else "eager")

    return bound_once(m, (source, target), bind)


def cross_attention(
    m: Machine, source: int, target: int, heads: int, channels: int, pair: int | None, mask: Tensor | None
) -> Callable[[], object]:
    """Attend from the first channels of `source` to the keys and values of `pair` and those that follow in `source`.

    Args:
        channels: of the queries. If `source` has no more, it attends to `pair` alone.
        pair: slot of [N, 2 channels, ..], or None.
        mask: [N, keys], added to the scores, or None.
    """

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        own = x[:, channels:] if x.shape[1] > channels else None
        first, second = (own, None) if pair is None else (m.slots[pair], own)
        assert first is not None
        return cross_attention_.bind(
            m.place(target, x, channels), x[:, :channels], first, heads, own=second, mask=mask,
            backend=m.backend if m.backend in ("native", "reference") else "eager",
        )  # fmt: skip

    return bound_once(m, (source, target, pair), bind)


def add_given(m: Machine, source: int, values: Tensor, target: int) -> Callable[[], object]:
    """Add values [N, C, H, W], which stay where they are and may change at every step."""

    def run() -> None:
        x = m.slots[source]
        torch.add(x, values, out=m.place(target, x, x.shape[1]))

    return run


def residual_add(
    m: Machine, source: int, residual: int | None, bias: Tensor | None, padded: int | None
) -> Callable[[], object]:
    """Add residual and bias to source; also write the sum to `padded`, if given, with zeros below and to the right."""

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        return residual_add_.bind(
            x if padded is None else m.slots[padded], x, residual=None if residual is None else m.slots[residual],
            bias=bias, total=None if padded is None else x, backend="eager" if m.native else m.backend,
        )  # fmt: skip

    def run() -> None:
        x = m.slots[source]
        if residual is not None:
            x.add_(m.slots[residual])
        if bias is not None:
            x.add_(bias.view(-1, 1, 1))
        if padded is not None:
            m.slots[padded] = F.pad(x, (0, 1, 0, 1))

    return bound_once(m, (source, residual, padded), bind) if m.fused else run


def other(m: Machine, sources: Sequence[int], target: int, function: Callable[..., Tensor]) -> Callable[[], object]:
    """Run any function in plain torch, for rare layers."""

    def run() -> None:
        m.slots[target] = channels_last(function(*(m.slots[slot] for slot in sources)))

    return run


def copy_from(m: Machine, values: Tensor, target: int) -> Callable[[], object]:
    """Copy values [N, C, H, W], which stay where they are, in whatever dtype and order they have."""
    return lambda: m.slots[target].copy_(values)


_ACTIVATE: dict[str, Callable[[Tensor], object]] = {
    "mish": partial(F.mish, inplace=True),
    "gelu": torch.ops.aten.gelu_,
    "relu": torch.relu_,
}


def activate(m: Machine, target: int, activation: str) -> Callable[[], object]:
    """Apply "mish", "gelu" or "relu" in place."""
    function = _ACTIVATE[activation]
    return lambda: function(m.slots[target])


def add_bias(m: Machine, target: int, bias: Tensor) -> Callable[[], object]:
    """Add a bias [C] in place."""
    shaped = bias.view(-1, 1, 1)

    def run() -> None:
        m.slots[target].add_(shaped)

    return run


def channels_last(x: Tensor) -> Tensor:
    """Return `x`, copied unless it is channels-last."""
    return x.contiguous(memory_format=torch.channels_last)


def rows_of(x: Tensor) -> Tensor:
    """Return [N, C, H, W], channels-last, as a matrix [N * H * W, C] in the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
