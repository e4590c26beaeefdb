"""Turn the U-Net of a diffusion policy into the instructions that compute it.

Each convolution is followed by one kernel for group norm, Mish, FiLM and the block's residual. The concatenation with a
skip connection is read in place. Sequences are images of height 1.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from fastddpm_kernels.conv1d import PackedWeight, packed_values
from torch import Tensor, nn

from fastddpm.networks.frozen.builder import Activation, Builder
from fastddpm.networks.frozen.kinds.policies import instructions as ops


class Parts(NamedTuple):
    """The layers of a residual block: two of convolution, norm and Mish; and whether FiLM has a factor."""

    first: Any
    second: Any
    scales: bool


class Lowering(Builder):
    """A `ConditionalUnet1D` of diffusion_policy as instructions."""

    def lower(self) -> int:
        unet: Any = self.unet
        x, skips = self.INPUT, []
        local = None
        if "local_cond" in self.conditions:  # the second encoder's result is added nowhere in the library
            local = self._block(unet.local_cond_encoder[0], self._local_cond())
        for level, (first, second, down) in enumerate(unet.down_modules):
            x = self._block(first, x)
            if level == 0 and local is not None:
                self.complete(Activation(x, residual=local), "local_cond.sum")
            x = self._block(second, x)
            skips.append(x)
            x = self._resampled(down, x)
        for block in unet.mid_modules:
            x = self._block(block, x)
        for first, second, up in unet.up_modules:
            x = self._block(first, x, skips.pop())
            x = self._resampled(up, self._block(second, x))
        last = unet.final_conv[0].block
        return self._conv(unet.final_conv[1], self._norm(last[1], self._conv(last[0], x)))

    def _parts(self, block: Any) -> Parts:
        first, second = block.blocks
        return Parts(first.block, second.block, block.cond_predict_scale)

    def _resampled(self, layer: Any, x: int) -> int:
        return x if isinstance(layer, nn.Identity) else self._conv(getattr(layer, "conv", layer), x)

    def _local_cond(self) -> int:
        slot = self.condition("local_cond").slot
        if self.shapes[slot][2] != self.shapes[self.INPUT][2] and not self.constants.refilling:
            length, own = self.shapes[self.INPUT][2], self.shapes[slot][2]
            raise ValueError(f"local_cond has {own} positions, must have {length}, as the samples")
        return slot

    def _block(self, block: Any, x: int, skip: int | None = None) -> int:
        parts, row = self._parts(block), self.row[:, self.columns[self.names[block]]].expand(self.batch, -1)
        scale, shift = row.chunk(2, dim=1) if parts.scales else (None, row)
        h = self._norm(parts.first[1], self._conv(parts.first[0], x, skip), scale, shift)
        residual = x
        if not isinstance(block.residual_conv, nn.Identity):
            residual = self._conv(block.residual_conv, x, skip)
        return self._norm(parts.second[1], self._conv(parts.second[0], h), residual=residual)

    def _conv(self, layer: Any, x: int, second: int | None = None) -> int:
        """Emit a convolution of concat(x, second), transposed or not, with its bias."""
        name, (channels, _, length) = self.names[layer], self.shapes[x]
        transposed = isinstance(layer, nn.ConvTranspose1d)
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        target = self.new(
            layer.out_channels, 1, 2 * length if transposed else (length + 2 * padding - kernel) // stride + 1
        )
        channels2 = layer.in_channels - channels
        weight: Tensor | PackedWeight
        if (backend := self.m.backend) in ("native", "triton"):
            values = self.put(
                f"{name}.weight.{backend}",
                functools.partial(
                    packed_values, layer.weight, backend, transposed=transposed, dtype=self.dtype, channels2=channels2
                ),
            )
            sizes = (layer.in_channels, layer.out_channels, kernel)
            weight = PackedWeight(values, backend, *sizes, transposed, channels2)
        else:
            weight = self.put(f"{name}.weight", layer.weight)
        bias = None if layer.bias is None else self.put(f"{name}.bias", layer.bias, self.vector_dtype)
        reads, numel = [x] if second is None else [x, second], layer.weight.numel()
        positions = self.pixels(x if transposed else target)
        self.emit(
            name, "conv", reads, [target],
            ops.conv1d(self.m, x, second, target, weight, bias, self.shapes[target], stride, padding, transposed),
            flops=2 * positions * numel, weights=numel,
        )  # fmt: skip
        return target

    def _norm(
        self, layer: nn.GroupNorm, x: int, scale: Tensor | None = None, shift: Tensor | None = None,
        residual: int | None = None,
    ) -> int:  # fmt: skip
        """Emit group norm, Mish, FiLM and the addition of a residual."""
        name, target = self.names[layer], self.new(*self.shapes[x])
        weight, bias = (
            self.put(f"{name}.{part}", getattr(layer, part), self.vector_dtype) for part in ("weight", "bias")
        )
        self.emit(
            name, "norm", [x] if residual is None else [x, residual], [target],
            ops.group_norm_mish(self.m, x, target, weight, bias, layer.num_groups, layer.eps, scale, shift, residual),
        )  # fmt: skip
        return target


class LeRobotLowering(Lowering):
    """A `DiffusionConditionalUnet1d` of lerobot as instructions."""

    def _parts(self, block: Any) -> Parts:
        return Parts(block.conv1.block, block.conv2.block, block.use_film_scale_modulation)
