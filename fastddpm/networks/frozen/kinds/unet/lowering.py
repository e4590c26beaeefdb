"""From fastddpm's U-Net to the instructions that compute it: the order of its layers, and which become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from fastddpm.networks.frozen import instructions as ops
from fastddpm.networks.frozen.builder import Activation, Builder, add
from fastddpm.networks.frozen.kinds.unet import folding
from fastddpm.networks.unet.layers import DownBlock, ResnetBlock, UpBlock, double, halve
from fastddpm.networks.unet.model import UNet


class Lowering(Builder):
    """A `fastddpm.UNet` as instructions."""

    unet: UNet

    # What iterates over an nn.ModuleList gets modules of no particular type: hence Any for the blocks.

    def lower(self) -> int:
        unet = self.unet
        x = Activation(self.INPUT)
        if unet.config.center_input_sample:
            x = self.other("center_input_sample", [x.slot], lambda v: 2 * v - 1)
        x = self.conv(unet.conv_in, x, in_channels=self.shapes[self.INPUT][0])
        skips = [x]
        for down in cast(Iterable[DownBlock], unet.down_blocks):
            attentions = list(down.attentions)
            for resnet in down.resnets:
                x = self._resnet(resnet, x)
                if attentions:
                    x = self._attention(attentions.pop(0), x)
                skips.append(x)
            for layer in down.downsamplers:
                x = self._resnet(layer, x) if isinstance(layer, ResnetBlock) else self._downsample(layer, x)
                skips.append(x)
        if unet.mid_block is not None:
            first, last = unet.mid_block.resnets
            x = self._resnet(first, x)
            for attention in unet.mid_block.attentions:
                x = self._attention(attention, x)
            x = self._resnet(last, x)
        for up in cast(Iterable[UpBlock], unet.up_blocks):
            attentions = list(up.attentions)
            for resnet in up.resnets:
                x = self._resnet(resnet, x, skips.pop())
                if attentions:
                    x = self._attention(attentions.pop(0), x)
            for layer in up.upsamplers:
                x = self._resnet(layer, x) if isinstance(layer, ResnetBlock) else self._upsample(layer, x)
        x = self.norm(unet.conv_norm_out, x)
        out_channels = unet.config.out_channels
        # Whole vectors of channels: a convolution to three is otherwise a slow one, or padded by the library.
        padded = -(-out_channels // 8) * 8 if self.m.static and self.dtype.itemsize == 2 else out_channels
        x = self.conv(unet.conv_out, x, out_channels=padded)
        if x.bias is not None:
            bias = self.put("conv_out.pending", x.bias)
            self.emit("conv_out.bias", "other", [x.slot], [x.slot], ops.add_bias(self.m, x.slot, bias))
        return x.slot

    def _resnet(self, block: Any, x: Activation, skip: Activation | None = None) -> Activation:
        name = self.names[block]
        if skip is not None and skip.residual is not None:
            self.complete(skip, f"{name}.skip")
        time = self.row[:, self.columns[name]]
        h = self.norm(block.norm1, x, skip)  # from here on x has no pending residual
        conv1: Callable[..., Activation] = self.conv
        if block.resample == "down":
            h, x = self._resampled(h, halve, f"{name}.norm1"), self._resampled(x, halve, name)
        elif block.resample == "up":
            x, conv1 = self._resampled(x, double, name), self.conv_of_double
        if block.scale_shift:
            h = conv1(block.conv1, h)
            scale, shift = time.expand(self.batch, -1).chunk(2, dim=1)
            h = self.norm(block.norm2, h, scale=scale, shift=shift)
        elif self.m.fused or len(time) > 1:  # the bias of conv1 is in the row
            h = conv1(block.conv1, h, bias=None)
            h = self.norm(block.norm2, h, time_bias=time.expand(self.batch, -1))
        else:
            h = self.norm(block.norm2, conv1(block.conv1, h, bias=time[0]))
        h = self.conv(block.conv2, h)

        if block.conv_shortcut is not None:
            y = self.shortcut(block.conv_shortcut, x, skip, h)
        else:
            assert skip is None  # it would make the block's input wider than its output
            y = Activation(h.slot, add(h.bias, x.bias), x.slot)
        return self.divided(y, block.output_scale, name)

    def _attention(self, layer: Any, x: Activation) -> Activation:
        name = self.names[layer]
        if layer.group_norm is None:
            self.complete(x, name)
            h = x
        else:
            h = self.norm(layer.group_norm, x, activation=None)
        weight, bias = folding.attention_projections(layer)
        qkv = self.linear(f"{name}.to_qkv", h.slot, weight, bias)
        folded = folding.folds_output(layer)
        inner = layer.heads * layer.head_dim
        value_dim = (len(bias) - 2 * inner) // layer.heads
        out = self.new(layer.heads * value_dim, *self.shapes[x.slot][1:])
        if not self.m.native:
            self.loose.add(out)
        _, height, width = self.shapes[qkv]
        self.emit(
            name, "attention", [qkv], [out],
            ops.attention(self.m, qkv, out, layer.heads, layer.head_dim),
            flops=2 * self.pixels(qkv) * height * width * (inner + layer.heads * value_dim),
        )  # fmt: skip
        if folded:
            y = Activation(out, x.bias, x.slot)
        else:
            projection = layer.to_out[0]
            y = self.pointwise(f"{name}.to_out.0", out, projection.weight, add(projection.bias, x.bias), x.slot)
        return self.divided(y, layer.output_scale, name)

    def _downsample(self, layer: Any, x: Activation) -> Activation:
        name = self.names[layer]
        if layer.conv is None:
            return self._resampled(x, halve, name)
        if layer.padding != 0:
            self.complete(x, name)
            return self.conv(layer.conv, x, stride=2, padding=layer.padding)
        if self.m.native:
            self.complete(x, name)
            return self.conv(layer.conv, x, stride=2, padding=0, below=1)
        channels, height, width = self.shapes[x.slot]
        padded = self.new(channels, height + 1, width + 1)
        self.bordered.append(padded)
        self.complete(x, f"{name}.pad", padded)
        return self.conv(layer.conv, Activation(padded), stride=2, padding=0)

    def _upsample(self, layer: Any, x: Activation) -> Activation:
        if layer.conv is None:
            return self._resampled(x, double, self.names[layer])
        self.complete(x, self.names[layer])
        return self.conv_of_double(layer.conv, x)

    def _resampled(self, x: Activation, resample: Callable[[Tensor], Tensor], name: str) -> Activation:
        """Emit `halve` or `double` of `x`. Its pending bias stays pending: it is the same in every pixel."""
        if x.residual is not None:
            self.complete(x, name)
        return replace(self.other(f"{name}.{resample.__name__}", [x.slot], resample), bias=x.bias)
