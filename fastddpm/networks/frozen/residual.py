"""Emit the residual blocks of DDPM's family of U-Nets, which several libraries have under different names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastddpm.networks.frozen.builder import Activation, Builder, add


@dataclass(frozen=True)
class ResidualBlock:
    """The layers of a block: norm1, activation, (resampling), conv1, time, norm2, activation, conv2, plus its input.

    Attributes:
        name: of the block; its columns in the row of the time table have this name.
        norm1, conv1, norm2, conv2: the layers.
        shortcut: a 1x1 convolution of the input, or None.
        activation: "silu", "gelu", "mish" or "relu".
        scale_shift: whether the time scales and shifts norm2's result; else it is added before norm2.
        resample: emits a change of resolution between norm1 and conv1 and of the input (given a name), or None.
        doubles: whether it is nearest-neighbour upsampling by two, which conv1 takes in.
        output_scale: divides the result.
    """

    name: str
    norm1: nn.GroupNorm
    conv1: nn.Conv2d
    norm2: nn.GroupNorm
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None
    activation: str
    scale_shift: bool
    resample: Callable[[Activation, str], Activation] | None = None
    doubles: bool = False
    output_scale: float = 1.0


class ResidualBuilder(Builder):
    """A `Builder` that knows DDPM's residual blocks and the layers that change the resolution."""

    def residual_block(self, block: ResidualBlock, x: Activation, skip: Activation | None = None) -> Activation:
        """Emit a block of concat(x, skip)."""
        name, act = block.name, block.activation
        if skip is not None and skip.residual is not None:
            self.complete(skip, f"{name}.skip")
        time = self.row[:, self.columns[name]]
        h = self.norm(block.norm1, x, skip, activation=act)  # from here on x has no pending residual
        conv1: Callable[..., Activation] = self.conv_same
        if block.resample is not None and block.doubles:
            x, conv1 = block.resample(x, name), self.conv_of_double
        elif block.resample is not None:
            h, x = block.resample(h, f"{name}.norm1"), block.resample(x, name)
        if block.scale_shift:
            h = conv1(block.conv1, h)
            scale, shift = time.expand(self.batch, -1).chunk(2, dim=1)
            h = self.norm(block.norm2, h, scale=scale, shift=shift, activation=act)
        elif self.m.fused or len(time) > 1:  # the bias of conv1 is in the row
            h = conv1(block.conv1, h, bias=None)
            h = self.norm(block.norm2, h, time_bias=time.expand(self.batch, -1), activation=act)
        else:
            h = self.norm(block.norm2, conv1(block.conv1, h, bias=time[0]), activation=act)
        h = self.conv_same(block.conv2, h)
        if block.shortcut is not None:
            y = self.shortcut(block.shortcut, x, skip, h)
        else:
            assert skip is None  # a skip would make the block's input wider than its output
            y = Activation(h.slot, add(h.bias, x.bias), x.slot)
        return self.divided(y, block.output_scale, name)

    def conv_same(self, layer: nn.Conv2d, x: Activation, **options: Any) -> Activation:
        """Emit a convolution that keeps the resolution; `options` as for `conv`."""
        return self.conv(layer, x, padding=layer.kernel_size[0] // 2, **options)

    def halved_by_conv(self, layer: nn.Conv2d, x: Activation, padding: int, name: str) -> Activation:
        """Emit a convolution of stride 2; with `padding` 0 the image gets a row below and a column to the right."""
        if padding != 0:
            self.complete(x, name)
            return self.conv(layer, x, stride=2, padding=padding)
        if self.m.native:
            self.complete(x, name)
            return self.conv(layer, x, stride=2, padding=0, below=1)
        channels, height, width = self.shapes[x.slot]
        padded = self.new(channels, height + 1, width + 1)
        self.bordered.append(padded)
        self.complete(x, f"{name}.pad", padded)
        return self.conv(layer, Activation(padded), stride=2, padding=0)

    def resampled(self, resample: Callable[[Tensor], Tensor], x: Activation, name: str) -> Activation:
        """Emit a change of resolution that keeps constants, so that the bias of `x` stays pending."""
        if x.residual is not None:
            self.complete(x, name)
        return replace(self.other(f"{name}.{resample.__name__}", [x.slot], resample), bias=x.bias)
