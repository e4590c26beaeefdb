"""Emit the residual blocks of DDPM's family of U-Nets, which several libraries have under different names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastddpm.networks.frozen.builder import Activation
from fastddpm.networks.frozen.whole_layers import NormBefore, Shortcut, WholeBuilder


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


class ResidualBuilder(WholeBuilder):
    """A `Builder` that knows DDPM's residual blocks and the layers that change the resolution."""

    def residual_block(self, block: ResidualBlock, x: Activation, skip: Activation | None = None) -> Activation:
        """Emit a block of concat(x, skip)."""
        name, act = block.name, block.activation
        if skip is not None and skip.residual is not None:
            self.complete(skip, f"{name}.skip")
        time = self.row[:, self.columns[name]]
        scale, shift = time.expand(self.batch, -1).chunk(2, dim=1) if block.scale_shift else (None, None)
        added = None if block.scale_shift else time.expand(self.batch, -1)
        norm1, norm2 = NormBefore(block.norm1, act), NormBefore(block.norm2, act, scale, shift)
        direct = act == "silu" and (block.resample is None or block.doubles)  # conv1 reads what norm1 writes
        doubles = block.resample is not None and block.doubles
        kernel = block.conv1.kernel_size[0]
        if self.takes_whole(
            x, block.conv1.out_channels, kernel, skip, norm1 if direct else None, upsample=doubles
        ):  # fmt: skip
            h, x = self._whole_conv1(block, x, skip, norm1 if direct else None, doubles, added)
            added = None
        else:
            h = self.norm(block.norm1, x, skip, activation=act)  # from here on x has no pending residual
            conv1: Callable[..., Activation] = self.conv_same
            if block.resample is not None and block.doubles:
                x, conv1 = block.resample(x, name), self.conv_of_double
            elif block.resample is not None:
                h, x = block.resample(h, f"{name}.norm1"), block.resample(x, name)
            if block.scale_shift:
                h = conv1(block.conv1, h)
            elif self.m.fused or len(time) > 1:  # the bias of conv1 is in the row
                h = conv1(block.conv1, h, bias=None)
            else:
                h, added = conv1(block.conv1, h, bias=time[0]), None
        own = 0 if block.shortcut is None else block.shortcut.in_channels
        if self.takes_whole(
            h, block.conv2.out_channels, kernel, None, norm2 if act == "silu" else None, shortcut=own
        ):  # fmt: skip
            return self.divided(self._whole_conv2(block, h, norm2, added, x, skip), block.output_scale, name)
        h = self.norm(block.norm2, h, time_bias=added, scale=scale, shift=shift, activation=act)
        h = self.conv_same(block.conv2, h)
        if block.shortcut is not None:
            y = self.shortcut(block.shortcut, x, skip, h)
        else:
            assert skip is None  # a skip would make the block's input wider than its output
            y = Activation(h.slot, self.add(h.bias, x.bias), x.slot)
        return self.divided(y, block.output_scale, name)

    def _whole_conv1(
        self, block: ResidualBlock, x: Activation, skip: Activation | None, norm: NormBefore | None, doubles: bool,
        time: Tensor | None,
    ) -> tuple[Activation, Activation]:  # fmt: skip
        """Emit norm1 and conv1 with the row of the time table. Return the result and the block's input, resampled."""
        conv, name = block.conv1, self.names[block.conv1]
        bias = conv.bias if block.scale_shift else None  # else it is in the row
        h, second = x, skip
        if norm is None:
            h, second = self.norm(block.norm1, x, skip, activation=block.activation), None
            if block.resample is not None and not doubles:
                h = block.resample(h, f"{block.name}.norm1")
        h = self.whole_conv(
            name, h, lambda: conv.weight, conv.out_channels, kernel=conv.kernel_size[0],
            padding=conv.kernel_size[0] // 2, second=second, norm=norm, bias=bias, time=time, upsample=doubles,
        )  # fmt: skip
        return h, x if block.resample is None else block.resample(x, block.name)

    def _whole_conv2(
        self, block: ResidualBlock, h: Activation, norm: NormBefore, time: Tensor | None, x: Activation,
        skip: Activation | None,
    ) -> Activation:  # fmt: skip
        """Emit norm2 and conv2 with the block's input or its shortcut."""
        conv, name = block.conv2, self.names[block.conv2]
        before: NormBefore | None = norm
        if block.activation != "silu":
            h, before = self.norm(
                block.norm2, h, time_bias=time, scale=norm.scale, shift=norm.shift, activation=block.activation
            ), None  # fmt: skip
        elif time is not None:
            layer = norm.layer
            self.measure(h, (layer.num_channels // layer.num_groups, 0), name, time)
        shortcut = None
        if block.shortcut is not None:
            shortcut = Shortcut(x, skip, block.shortcut.weight.double().flatten(1))
        return self.whole_conv(
            name, h, lambda: conv.weight, conv.out_channels, kernel=conv.kernel_size[0],
            padding=conv.kernel_size[0] // 2, norm=before, residual=x.slot if shortcut is None else None,
            shortcut=shortcut,
            bias=self.bias_with(conv, block.shortcut, x, skip),
        )  # fmt: skip

    def conv_same(self, layer: nn.Conv2d, x: Activation, **options: Any) -> Activation:
        """Emit a convolution that keeps the resolution; `options` as for `conv`."""
        return self.conv(layer, x, padding=layer.kernel_size[0] // 2, **options)

    def halved_by_conv(self, layer: nn.Conv2d, x: Activation, padding: int, name: str) -> Activation:
        """Emit a convolution of stride 2; with `padding` 0 the image gets a row below and a column to the right."""
        if padding != 0:
            self.complete(x, name)
            return self.conv(layer, x, stride=2, padding=padding)
        if self.m.native or self.takes_whole(x, layer.out_channels, layer.kernel_size[0], stride=2):
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
