"""Turn fastddpm's U-Net into the instructions that compute it: the order of its layers, and which are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from fastddpm_kernels.attention_block import MOST_CHANNELS
from torch import Tensor

from fastddpm.networks.frozen import instructions as ops
from fastddpm.networks.frozen.builder import Activation
from fastddpm.networks.frozen.kinds.unet import folding
from fastddpm.networks.frozen.residual import ResidualBlock, ResidualBuilder
from fastddpm.networks.frozen.whole_layers import NormBefore
from fastddpm.networks.unet import layers
from fastddpm.networks.unet.layers import AdaResnetBlock, Block, ResnetBlock, double, halve
from fastddpm.networks.unet.model import UNet

_FILTERS: dict[Callable[..., Tensor], int] = {
    layers.fir_halve: 64,
    layers.fir_double: 16,
    layers.mirrored_halve: 64,
    layers.mirrored_double: 16,
}  # and the divisor of their taps


class Lowering(ResidualBuilder):
    """A `fastddpm.UNet` as instructions."""

    unet: UNet

    # Iterating over an nn.ModuleList gives plain `Module`s to the type checker: hence Any for the blocks.

    def lower(self) -> int:
        unet = self.unet
        x = Activation(self.INPUT)
        if unet.config.center_input_sample:
            x = self.other("center_input_sample", [x.slot], lambda v: 2 * v - 1)
        image: Activation | None = x  # what Skip blocks carry beside the state
        x = self.conv(unet.conv_in, x, in_channels=self.shapes[self.INPUT][0])
        skips = [x]
        for down in cast(Iterable[Block], unet.down_blocks):
            attentions = list(down.attentions)
            for resnet in down.resnets:
                x = self._resnet(resnet, x)
                if attentions:
                    x = self._attention(attentions.pop(0), x)
                skips.append(x)
            if isinstance(down, layers.SkipDownBlock) and down.resnet_down is not None:
                assert image is not None
                x, image = self._skip_down(down, x, image)
                skips.append(x)
            elif isinstance(down, layers.KDownBlock) and down.downsample:
                x = self._filtered(layers.mirrored_halve, x, self.names[down])
            elif isinstance(down, layers.DownBlock):
                for layer in down.downsamplers:
                    x = self._resnet(layer, x) if isinstance(layer, ResnetBlock) else self._downsample(layer, x)
                    skips.append(x)
        if unet.mid_block is not None:
            first, last = unet.mid_block.resnets
            x = self._resnet(first, x)
            for attention in unet.mid_block.attentions:
                x = self._attention(attention, x)
            x = self._resnet(last, x)
        image = None
        for up in cast(Iterable[Block], unet.up_blocks):
            of_skip, of_k = isinstance(up, layers.SkipUpBlock), isinstance(up, layers.KUpBlock)
            attentions = [] if of_skip else list(up.attentions)
            for i, resnet in enumerate(up.resnets):
                skip = skips.pop()
                x = self._resnet(resnet, x, None if of_k and i else skip)
                if attentions:
                    x = self._attention(attentions.pop(0), x)
            if isinstance(up, layers.SkipUpBlock):
                x, image = self._skip_up(up, x, image)
            elif isinstance(up, layers.KUpBlock) and up.upsample:
                x = self._filtered(layers.mirrored_double, x, self.names[up])
            elif isinstance(up, layers.UpBlock):
                for layer in up.upsamplers:
                    x = self._resnet(layer, x) if isinstance(layer, ResnetBlock) else self._upsample(layer, x)
        x = self.normed_conv_to_image(unet.conv_norm_out, unet.conv_out, x)
        if image is not None:
            x = self.other("conv_out.image", [x.slot, image.slot], torch.add)
        if unet.config.time_embedding_type == "fourier":
            m = self.m
            x = self.other(
                "conv_out.level", [x.slot], lambda v: v / m.timesteps.index_select(0, m.step), self.shapes[x.slot]
            )
        return x.slot

    def _skip_down(
        self, block: layers.SkipDownBlock, x: Activation, image: Activation
    ) -> tuple[Activation, Activation]:
        """Emit the end of a block of NCSN++: the state and the image, halved."""
        name, conv = self.names[block], block.skip_conv
        assert conv is not None
        image = self._filtered(layers.fir_halve, image, f"{name}.image")
        x = self._resnet(block.resnet_down, x)
        self.complete(x, f"{name}.sum")
        channels = conv.in_channels
        assert conv.bias is not None
        weight, bias = self.put(f"{name}.skip_conv.weight", conv.weight), self.put(f"{name}.skip_conv.bias", conv.bias)

        def added(v: Tensor, of: Tensor) -> Tensor:
            return v + F.conv2d(of[:, :channels], weight, bias)

        return self.other(f"{name}.skip_conv", [x.slot, image.slot], added, self.shapes[x.slot]), image

    def _skip_up(
        self, block: layers.SkipUpBlock, x: Activation, image: Activation | None
    ) -> tuple[Activation, Activation | None]:
        """Emit the end of a block of NCSN++: the state and the image, doubled, with what the block adds to it."""
        name = self.names[block]
        for attention in block.attentions:
            x = self._attention(attention, x)
        if image is not None:
            image = self._filtered(layers.fir_double, image, f"{name}.image")
        if block.resnet_up is not None:
            assert block.skip_norm is not None
            assert block.skip_conv is not None
            more = self.conv_to_image(block.skip_conv, self.norm(block.skip_norm, x))
            image = more if image is None else self.other(f"{name}.sum", [image.slot, more.slot], torch.add)
            x = self._resnet(block.resnet_up, x)
        return x, image

    def _filtered(self, resample: Callable[..., Tensor], x: Activation, name: str) -> Activation:
        """Emit a filter of `x`, which must be complete."""
        self.complete(x, name)
        (channels, height, width), divisor = self.shapes[x.slot], _FILTERS[resample]
        to = (channels, height // 2, width // 2) if divisor == 64 else (channels, 2 * height, 2 * width)

        def taps() -> Tensor:
            return layers.fir_kernel(torch.empty(0, channels, dtype=torch.float64)) / divisor

        kernel = self.put(f"filter.{channels}.{divisor}", taps)
        return self.other(f"{name}.{resample.__name__}", [x.slot], lambda v: resample(v, kernel), to)

    def _resnet(self, block: Any, x: Activation, skip: Activation | None = None) -> Activation:
        if isinstance(block, AdaResnetBlock):
            if skip is not None and skip.residual is not None:
                self.complete(skip, f"{self.names[block]}.skip")
            return self._ada_resnet(block, x, skip)
        resample: Callable[[Activation, str], Activation] | None = None
        if block.resample in ("up", "down"):
            resample = partial(self.resampled, double if block.resample == "up" else halve)
        elif block.resample is not None:
            resample = partial(self._filtered, layers.RESAMPLE[block.resample])
        return self.residual_block(
            ResidualBlock(
                self.names[block], block.norm1, block.conv1, block.norm2, block.conv2, block.conv_shortcut,
                block.activation, block.scale_shift, resample, block.resample == "up", block.output_scale,
            ),
            x, skip,
        )  # fmt: skip

    def _ada_resnet(self, block: AdaResnetBlock, x: Activation, skip: Activation | None) -> Activation:
        if skip is not None and block.conv_shortcut is None:  # the residual path is the concatenation itself
            name = self.names[block]
            self.complete(x, f"{name}.input")
            self.complete(skip, f"{name}.skip")
            x = self.other(f"{name}.concat", [x.slot, skip.slot], lambda *parts: torch.cat(parts, dim=1))
            skip = None
        h = self._ada_norm(block.norm1, x, skip, block.activation)
        h = self._ada_norm(block.norm2, self.conv(block.conv1, h), None, block.activation)
        h = self.conv(block.conv2, h)
        if block.conv_shortcut is not None:
            return self.shortcut(block.conv_shortcut, x, skip, h)
        assert skip is None
        return Activation(h.slot, self.add(h.bias, x.bias), x.slot)

    def _ada_norm(
        self, norm: layers.AdaGroupNorm, x: Activation, skip: Activation | None, activation: str
    ) -> Activation:
        scale, shift = self.row[:, self.columns[self.names[norm]]].expand(self.batch, -1).chunk(2, dim=1)
        return self.norm(norm, x, skip, scale=scale, shift=shift, activation=activation)

    def _attention(self, layer: Any, x: Activation) -> Activation:
        name, channels = self.names[layer], self.shapes[x.slot][0]
        norm = None if layer.group_norm is None else NormBefore(layer.group_norm, None)
        small = norm is not None and layer.heads == 1 and channels <= MOST_CHANNELS
        if norm is not None and small and self.takes_block(x, norm.layer):
            y = self.attention_block(name, norm.layer, x, partial(folding.attention_matrices, layer))
            return self.divided(y, layer.output_scale, name)
        weight, bias = folding.attention_projections(layer)
        whole = norm is not None and self.takes_whole(x, len(bias), 1, norm=norm)
        if whole:
            qkv = self.whole_pointwise(f"{name}.to_qkv", x, lambda: weight, len(bias), bias, norm=norm).slot
        else:
            if norm is None:
                self.complete(x, name)
            h = x if norm is None else self.norm(norm.layer, x, activation=None)
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
        elif whole:
            project = layer.to_out[0]
            y = self.whole_pointwise(
                f"{name}.to_out.0", Activation(out), lambda: project.weight, len(project.weight), project.bias,
                residual=x.slot,
            )  # fmt: skip
        else:
            projection = layer.to_out[0]
            y = self.pointwise(f"{name}.to_out.0", out, projection.weight, self.add(projection.bias, x.bias), x.slot)
        return self.divided(y, layer.output_scale, name)

    def _downsample(self, layer: Any, x: Activation) -> Activation:
        name = self.names[layer]
        if layer.conv is None:
            return self.resampled(halve, x, name)
        return self.halved_by_conv(layer.conv, x, layer.padding, name)

    def _upsample(self, layer: Any, x: Activation) -> Activation:
        if layer.conv is None:
            return self.resampled(double, x, self.names[layer])
        self.complete(x, self.names[layer])
        return self.conv_of_double(layer.conv, x)
