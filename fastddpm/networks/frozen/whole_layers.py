"""Emit whole layers: a convolution with the norm before it, everything that is added after it, and its statistics.

A norm inside a convolution needs the statistics of what it reads before the convolution begins. Whoever writes a slot
leaves them, if a later layer asks: `requests` notes who reads a slot, and `settle`, after the last layer, makes memory
for the statistics that were asked for. What another library wrote is measured by one more kernel, which also adds what
was pending.

A U-Net may have whole layers throughout ("full"), none ("parts": the vendor's convolutions with norms between them), or
those that a tuned table names ("auto").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastddpm_kernels import tuned
from fastddpm_kernels.attention_block import attention_block_launches
from fastddpm_kernels.conv import conv_launches, conv_workspace, statistics_shape, statistics_unit
from fastddpm_kernels.conv.packing import phase_weight
from fastddpm_kernels.conv.statistics import UNITS
from torch import Tensor, nn

from fastddpm.networks.frozen import whole_instructions as ops
from fastddpm.networks.frozen.builder import Activation, Builder
from fastddpm.networks.frozen.instructions import Instruction


class NormBefore(NamedTuple):
    """A norm that a convolution applies to what it reads.

    Attributes:
        layer: the norm.
        activation: "silu" or None.
        scale, shift: [N, C], FiLM, or None.
    """

    layer: nn.GroupNorm
    activation: str | None = "silu"
    scale: Tensor | None = None
    shift: Tensor | None = None


class Shortcut(NamedTuple):
    """A 1x1 convolution of concat(x, second) that is added to another one's result. Its bias is elsewhere."""

    x: Activation
    second: Activation | None
    weight: Tensor  # [O, D + D2]


class WholeBuilder(Builder):
    """A `Builder` that may merge a convolution with its neighbours.

    Attributes:
        requests: for every slot, the group size and the first channel of each norm inside a convolution that reads it.
        measured: slots whose statistics are written together with them, or were asked of a kernel of their own.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.requests: dict[int, list[tuple[int, int]]] = {}
        self.measured: set[int] = set()
        self._late: list[tuple[Instruction, Callable[[], tuple[int, int]]]] = []

    def settle(self) -> None:
        """Make memory for statistics; then count the launches of whole layers, and what they need of the workspace."""
        wide = torch.promote_types(self.dtype, torch.float32)
        for slot, norms in self.requests.items():
            shape = self.batch, *self.shapes[slot]
            form = statistics_shape(shape, statistics_unit(shape[1], *norms))
            self.m.statistics[slot] = torch.zeros(form, dtype=wide, device=self.device)
        if self.m.backend == "triton":
            for instruction, needs in self._late:
                instruction.kernels, workspace = needs()
                self.workspace_numel = max(self.workspace_numel, workspace)

    def takes_whole(
        self, x: Activation, outputs: int, kernel: int, second: Activation | None = None,
        norm: NormBefore | None = None, *, stride: int = 1, upsample: bool = False, shortcut: int = 0,
    ) -> bool:  # fmt: skip
        """Return whether a convolution is emitted whole, by the fusion that was asked for or the tuned table.

        Args:
            x, outputs, kernel, second, norm, stride, upsample: of the convolution.
            shortcut: channels of its shortcut.
        """
        if self.fusion != "auto":
            return self.fusion == "full"
        channels, height, width = self.shapes[x.slot]
        groups = 0 if norm is None else norm.layer.num_groups
        shape = (
            self.batch, height, width, channels, 0 if second is None else self.shapes[second.slot][0],
            outputs, kernel, stride, int(upsample), groups,
            int(norm is not None and norm.activation == "silu"), shortcut,
        )  # fmt: skip
        for unit in (0, *UNITS):  # which later layers decide; a table has one
            key = (*shape, unit, int(self.m.allow_tf32))
            choice = tuned.choice("fused_conv", self.device, self.dtype, key)
            if choice is not None:
                return self._noted(choice.get("implementation") != "vendor")
        return False

    def takes_block(self, x: Activation, norm: nn.GroupNorm) -> bool:
        """Return whether an attention of one head is emitted whole, by the fusion or the tuned table."""
        channels, height, width = self.shapes[x.slot]
        shape = (self.batch, height * width, channels, norm.num_groups, int(self.m.allow_tf32))
        choice = tuned.choice("attention_block", self.device, self.dtype, shape)
        if self.fusion != "auto":
            return self.fusion == "full"
        return self._noted(choice is not None and choice["implementation"] == "block")

    def _noted(self, whole: bool) -> bool:
        self.mixed |= whole
        return whole

    def whole_conv(
        self, name: str, x: Activation, weight: Callable[[], Tensor], outputs: int, *, kernel: int = 3,
        second: Activation | None = None, norm: NormBefore | None = None, bias: Tensor | None = None,
        time: Tensor | None = None, residual: int | None = None, shortcut: Shortcut | None = None, stride: int = 1,
        padding: int = 1, below: int | None = None, upsample: bool = False, key: str = "weight",
    ) -> Activation:  # fmt: skip
        """Emit a convolution of norm(concat(x, second)), plus all that is given, complete.

        Args:
            name: of the layer.
            x, second: what it reads; complete without a norm, else completed here.
            weight: returns [O, I, k, k].
            outputs: O.
            norm: before the convolution; padding is zero after it.
            bias: [O], or None.
            time: [N, O], a row of the time table, or None.
            residual: a slot that is added.
            shortcut: whose result is added.
            below: rows and columns of zeros below and to the right, if not `padding`.
            upsample: convolve `x` upsampled by two.
            key: of the weight among the constants, after the layer's name.
        """
        sources = [x] + ([] if second is None else [second])
        if norm is not None:
            begin, size = 0, norm.layer.num_channels // norm.layer.num_groups
            for source in sources:
                self.measure(source, (size, begin), name)
                begin += self.shapes[source.slot][0]
        assert all(source.residual is None and source.bias is None for source in sources)
        _, height, width = self.shapes[x.slot]
        more = padding + (padding if below is None else below) - kernel
        target = self.new(
            outputs, *(2 * s if upsample else (s + more) // stride + 1 for s in (height, width))
        )  # fmt: skip
        reads = [source.slot for source in sources]
        inputs = sum(self.shapes[slot][0] for slot in reads)
        numel = outputs * inputs * kernel**2
        options: dict[str, Any] = {"stride": stride, "padding": padding, "upsample": upsample}
        options["bias"] = None if bias is None else self.put(f"{name}.whole_bias", bias, self.vector_dtype)
        options["time_bias"] = time
        own_norm = None if norm is None else self._constants_of(norm)
        slots = ops.Slots(x.slot, target, None if second is None else second.slot, residual)
        if shortcut is not None:
            other = None if shortcut.second is None else shortcut.second.slot
            slots = slots._replace(shortcut=shortcut.x.slot, shortcut2=other)
            options["shortcut_weight"] = self.put(f"{name}.shortcut", shortcut.weight)
            numel += shortcut.weight.numel()
        own = self.put(f"{name}.phases", lambda: phase_weight(weight())) if upsample else self.put(
            f"{name}.{key}", weight
        )  # fmt: skip
        reads = [slot for slot in (*slots[:1], *slots[2:]) if slot is not None]
        taps = 4 / 9 if upsample else 1
        self.emit(
            name, "conv" if kernel > 1 else "pointwise", reads, [target],
            ops.whole_conv(self.m, slots, own, outputs, self.shapes[target][1:], own_norm, options),
            flops=int(2 * self.pixels(target) * numel * taps), weights=own.numel(),
        )  # fmt: skip
        self.measured.add(target)

        def needs() -> tuple[int, int]:
            y, given = self._stand_in(target), {**options, "allow_tf32": self.m.allow_tf32}
            for option, slot in (("x2", slots.second), ("residual", residual), ("shortcut", slots.shortcut),
                                 ("shortcut2", slots.shortcut2)):  # fmt: skip
                given[option] = None if slot is None else self._stand_in(slot)
            given["norm"] = ops.norm_of(self.m, slots, own_norm)
            given["statistics"] = self.m.statistics.get(target)
            operands = (y, self._stand_in(x.slot), own)
            return conv_launches(*operands, **given), conv_workspace(*operands, **given)

        self._late.append((self.instructions[-1], needs))
        return Activation(target)

    def measure(self, x: Activation, norm: tuple[int, int], name: str, time: Tensor | None = None) -> None:
        """Ask for the statistics of `x`; add what is pending, and a row of the time table, if that is left to do.

        Args:
            norm: the channels of a group, and where `x` begins in what the norm reads.
            name: of the layer that reads them.
        """
        self.requests.setdefault(x.slot, []).append(norm)
        if x.slot in self.measured and x.residual is None and x.bias is None and time is None:
            return
        bias = None if x.bias is None else self.put(f"{name}.pending.{norm[1]}", x.bias, self.vector_dtype)
        reads = [x.slot] + ([] if x.residual is None else [x.residual])
        self.emit(f"{name}.measure", "residual", reads, [x.slot], ops.epilogue(self.m, x.slot, x.residual, bias, time))
        self.measured.add(x.slot)
        x.residual = x.bias = None

    def conv(
        self, layer: nn.Conv2d, x: Activation, *, bias: Tensor | str | None = "own", stride: int = 1, padding: int = 1,
        in_channels: int | None = None, out_channels: int | None = None, below: int | None = None,
        key: str = "weight",
    ) -> Activation:  # fmt: skip
        """See `Builder.conv`. What a whole convolution returns is complete."""
        outputs = out_channels or layer.out_channels
        if not self.takes_whole(x, outputs, layer.kernel_size[0], stride=stride):
            return super().conv(
                layer, x, bias=bias, stride=stride, padding=padding, in_channels=in_channels,
                out_channels=out_channels, below=below, key=key,
            )  # fmt: skip
        values = layer.bias if isinstance(bias, str) else bias
        return self.whole_conv(
            self.names[layer], x, functools.partial(_padded, layer.weight, outputs, in_channels), outputs,
            kernel=layer.kernel_size[0], bias=None if values is None else _padded(values, outputs), stride=stride,
            padding=padding, below=below, key=key,
        )  # fmt: skip

    def conv_of_double(self, layer: nn.Conv2d, x: Activation, *, bias: Tensor | str | None = "own") -> Activation:
        """See `Builder.conv_of_double`."""
        if not self.takes_whole(x, layer.out_channels, 3, upsample=True):
            return super().conv_of_double(layer, x, bias=bias)
        values = layer.bias if isinstance(bias, str) else bias
        name = self.names[layer]
        return self.whole_conv(name, x, lambda: layer.weight, layer.out_channels, bias=values, upsample=True)

    def normed_conv_to_image(
        self, norm: nn.GroupNorm, layer: nn.Conv2d, x: Activation, activation: str = "silu"
    ) -> Activation:
        """Emit a norm, its activation and the convolution to the channels of an image, complete."""
        before = NormBefore(norm, activation)
        outputs = self.image_channels(layer)
        if activation != "silu" or not self.takes_whole(x, outputs, layer.kernel_size[0], norm=before):
            return self.conv_to_image(layer, self.norm(norm, x, activation=activation))
        return self.whole_conv(
            self.names[layer], x, functools.partial(_padded, layer.weight, outputs), outputs,
            kernel=layer.kernel_size[0], padding=layer.kernel_size[0] // 2, norm=before,
            bias=None if layer.bias is None else _padded(layer.bias, outputs),
        )  # fmt: skip

    def whole_pointwise(
        self, name: str, x: Activation, weight: Callable[[], Tensor], outputs: int, bias: Tensor | None, *,
        norm: NormBefore | None = None, residual: int | None = None, second: Activation | None = None,
    ) -> Activation:  # fmt: skip
        """Emit a 1x1 convolution of norm(concat(x, second)), complete, with bias and a residual.

        `weight` returns [outputs, C + C2].
        """
        return self.whole_conv(
            name, x, lambda: weight().flatten(1)[:, :, None, None], outputs, kernel=1, padding=0, norm=norm, bias=bias,
            residual=residual, second=second, key="whole",
        )  # fmt: skip

    def attention_block(
        self, name: str, norm: nn.GroupNorm, x: Activation, matrices: Callable[[], tuple[Tensor, ...]]
    ) -> Activation:
        """Emit norm, self-attention of one head, projections and residual, complete.

        Args:
            name: of the layer.
            norm: before the projections.
            x: the input, completed here.
            matrices: returns those of `fastddpm_kernels.attention_block.fold`.
        """
        channels, height, width = self.shapes[x.slot]
        self.measure(x, (channels // norm.num_groups, 0), name)
        target, folded = self.new(channels, height, width), functools.cache(matrices)
        kept = [
            self.put(
                f"{name}.block.{part}", functools.partial(_part, folded, i), None if i in (0, 2) else self.vector_dtype
            )
            for i, part in enumerate(("scores", "scores_bias", "values", "values_bias"))
        ]
        own_norm = self._constants_of(NormBefore(norm, None))
        self.emit(
            name, "attention", [x.slot], [target],
            ops.attention_block(self.m, x.slot, target, own_norm, (kept[0], kept[1], kept[2], kept[3])),
            flops=4 * self.pixels(x.slot) * channels * (channels + height * width), weights=2 * channels**2,
        )  # fmt: skip
        self.measured.add(target)

        def needs() -> tuple[int, int]:
            return attention_block_launches(self._stand_in(x.slot), self.m.statistics.get(target)), 0

        self._late.append((self.instructions[-1], needs))
        return Activation(target)

    def bias_with(self, layer: nn.Conv2d, shortcut: nn.Conv2d | None, x: Activation, skip: Activation | None) -> Any:
        """Return the sum of the biases of a convolution, its shortcut, and what is pending in what that reads."""
        if shortcut is None:
            return self.add(layer.bias, x.bias)
        bias, width = self.add(layer.bias, shortcut.bias), self.shapes[x.slot][0]
        weight = shortcut.weight.double().flatten(1)
        for part, activation in ((weight[:, :width], x), (weight[:, width:], skip)):
            if activation is not None and activation.bias is not None:
                bias = self.add(bias, self.through(part, activation.bias))
        return bias

    def _constants_of(self, norm: NormBefore) -> ops.NormConstants:
        layer, name = norm.layer, self.names[norm.layer]
        ones, zeros = (functools.partial(make, layer.num_channels) for make in (torch.ones, torch.zeros))
        return ops.NormConstants(
            self.put(f"{name}.weight", layer.weight if layer.affine else ones, self.vector_dtype),
            self.put(f"{name}.bias", layer.bias if layer.affine else zeros, self.vector_dtype),
            layer.num_groups, layer.eps, norm.scale, norm.shift, norm.activation,
        )  # fmt: skip

    def _stand_in(self, slot: int) -> Tensor:
        """Return a tensor with the shape and device of a slot's and hardly any memory."""
        return torch.empty(1, dtype=self.dtype, device=self.device).expand(self.batch, *self.shapes[slot])


def _padded(values: Tensor, outputs: int, inputs: int | None = None) -> Tensor:
    """Return a weight or bias with zeros for further channels."""
    more = outputs - len(values)
    if values.ndim == 1:
        return F.pad(values, (0, more))
    return F.pad(values, (0, 0, 0, 0, 0, (inputs or values.shape[1]) - values.shape[1], 0, more))


def _part(parts: Callable[[], tuple[Tensor, ...]], index: int) -> Tensor:
    return parts()[index]
