"""Turn a U-Net of EDM or PhysicsNeMo into the instructions that compute it.

A block multiplies its result by `skip_scale`, sqrt(1/2) in DDPM++ and NCSN++. No instruction does that: a scale waits
beside an activation, as biases and residuals do. Norms divide their epsilon by its square, and the convolutions that
add to the activation have it folded into their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.networks.frozen import instructions as ops
from fastddpm.networks.frozen.builder import Activation, Builder
from fastddpm.networks.frozen.kinds.edm.instructions import add_doubled
from fastddpm.networks.frozen.kinds.edm.parts import (
    attention_of,
    has_biased_variance,
    is_dhariwal,
    is_mean,
    probability_channels,
)
from fastddpm.networks.unet.layers import halve


@dataclass
class Scaled(Activation):
    """An activation whose scale is pending too: value = scale * (slot + residual's slot + bias)."""

    scale: float = 1.0


class Lowering(Builder):
    """A `SongUNet` or `DhariwalUNet` as instructions."""

    def lower(self) -> int:
        unet: Any = self.unet
        x = image = Scaled(self.INPUT)  # `image` is what NCSN++ carries beside the state
        skips: list[Scaled] = []
        for name, block in unet.enc.items():
            if "aux_down" in name:
                image = self._resampled(block, image)
            elif "aux_skip" in name:
                self._add_image(block, x, image)
            elif "aux_residual" in name:
                x = skips[-1] = image = self._with_residual(block, x, image)
            elif type(block).__name__ == "UNetBlock":
                x = self._block(block, x)
                skips.append(x)
            else:
                x = self._conv(block, x)
                skips.append(x)
        out: Activation | None = None
        normed: Activation = x
        blocks = list(unet.dec.items())
        for index, (name, block) in enumerate(blocks):
            if "aux_up" in name:
                assert out is not None
                out = self._resampled(block, Scaled(out.slot))
            elif "aux_norm" in name:
                normed = self._norm(block, x)
            elif "aux_conv" in name:
                more = self.conv_to_image(self._view(block), normed)
                out = more if out is None else self.other(f"{self.names[block]}.sum", [out.slot, more.slot], torch.add)
            else:
                skip = skips.pop() if self.shapes[x.slot][0] != block.in_channels else None
                following = next((b for _, b in blocks[index + 1 :] if hasattr(b, "conv0")), None)
                joins = following is not None and following.in_channels != block.out_channels
                x = self._block(block, x, skip, skips[-1].scale if joins else 1.0)
        if is_dhariwal(unet):
            out = self.conv_to_image(self._view(unet.out_conv), self._norm(unet.out_norm, x))
        assert out is not None
        return self._probabilities(out).slot

    def _block(self, block: Any, x: Scaled, skip: Scaled | None = None, wanted: float = 1.0) -> Scaled:
        """Emit a `UNetBlock` of concat(x, skip). Its result has the scale `wanted`, if the block can choose."""
        name, heads, scale = self.names[block], attention_of(block)[0], float(block.skip_scale)
        if skip is not None:
            x = self._rescaled(x, skip.scale, name)
            if skip.residual is not None:
                self.complete(skip, f"{name}.skip")
        h = self._norm(block.norm0, x, skip)  # from here on x has no pending residual
        first: Callable[..., Activation] = partial(self.conv, self._view(block.conv0))
        if block.conv0.up and is_mean(block.conv0):
            first = partial(self.conv_of_double, self._view(block.conv0))
        elif block.conv0.up or block.conv0.down:
            h = self._resampled(block.conv0, Scaled(h.slot))
        time = self.row[:, self.columns[name]]
        if block.adaptive_scale:
            gain, shift = time.expand(self.batch, -1).chunk(2, dim=1)
            h = self._norm(block.norm1, first(x=h), scale=gain, shift=shift)
        elif self.m.fused or len(time) > 1:  # the bias of conv0 is in the row
            h = self._norm(block.norm1, first(x=h, bias=None), time_bias=time.expand(self.batch, -1))
        else:
            h = self._norm(block.norm1, first(x=h, bias=time[0]))
        own = block.skip
        if own is None or own.weight is None:
            assert skip is None  # a skip would make the block's input wider than its output
            h = self.conv(self._view(block.conv1, 1 / x.scale), h)
            if own is not None:
                x = self._resampled(own, x)
            y = Scaled(h.slot, self.add(h.bias, x.bias), x.slot, scale * x.scale)
        else:
            target = wanted / scale if heads else wanted
            h = self.conv(self._view(block.conv1, scale / target), h)
            y = self._shortcut(own, x, skip, h, scale, target)
        return self._attention(block, y, scale) if heads else y

    def _shortcut(
        self, layer: Any, x: Scaled, skip: Scaled | None, h: Activation, scale: float, target: float
    ) -> Scaled:
        """Emit `h` plus the 1x1 convolution of concat(x, skip), whose result has the scale `target`."""
        view = self._view(layer, scale * x.scale / target, scale / target)
        if layer.down:
            x = self._resampled(layer, x)
        if not layer.up:
            return Scaled(self.shortcut(view, x, skip, h).slot, scale=target)
        # The convolution comes before doubling, on a quarter of the pixels; its bias after, for the filter's borders.
        assert skip is None
        if not is_mean(layer):
            self.complete(x, f"{self.names[layer]}.input")
        weight, name = view.weight.double().flatten(1), self.names[view]
        bias = self.add(h.bias, view.bias)
        if x.bias is not None:
            bias = self.add(bias, self.through(weight, x.bias))
        small = self.pointwise(name, x.slot, weight, None, None)
        if not is_mean(layer):
            return Scaled(h.slot, bias, self._resampled(layer, Scaled(small.slot)).slot, target)
        self.emit(f"{name}.double", "other", [small.slot, h.slot], [h.slot], add_doubled(self.m, small.slot, h.slot))
        return Scaled(h.slot, bias, scale=target)

    def _attention(self, block: Any, x: Scaled, scale: float) -> Scaled:
        heads, norm, to_qkv, to_out = attention_of(block)
        name, channels = self.names[block], to_qkv.in_channels
        h = self._norm(norm, x, activation=None)
        # The library's channels are [head, channel, (query, key, value)]; ours are all queries, then keys, then values.
        width = channels // heads
        weight = to_qkv.weight.double().reshape(heads, width, 3, channels).permute(2, 0, 1, 3).reshape(3, -1, channels)
        bias = _bias(to_qkv).reshape(heads, width, 3).permute(2, 0, 1).reshape(3, -1)
        out, of_out = to_out.weight.double().flatten(1) / x.scale, _bias(to_out) / x.scale
        if heads == 1:  # softmax(..) (V Wv) Wo is softmax(..) (V (Wv Wo)), and the weights of the softmax sum to one
            weight = torch.cat([weight[:2], (out @ weight[2])[None]])
            bias = torch.cat([bias[:2], (out @ bias[2] + of_out)[None]])
        qkv = self.linear(f"{name}.to_qkv", h.slot, weight.flatten(0, 1), bias.flatten())
        values = self.new(channels, *self.shapes[x.slot][1:])
        if not self.m.native:
            self.loose.add(values)
        _, rows, columns = self.shapes[qkv]
        self.emit(
            name, "attention", [qkv], [values], ops.attention(self.m, qkv, values, heads, width),
            flops=4 * self.pixels(qkv) * rows * columns * channels,
        )  # fmt: skip
        if heads == 1:
            return Scaled(values, x.bias, x.slot, scale * x.scale)
        y = self.pointwise(f"{name}.to_out", values, out, self.add(of_out, x.bias), x.slot)
        return Scaled(y.slot, scale=scale * x.scale)

    def _conv(self, layer: Any, x: Scaled) -> Scaled:
        """Emit the first convolution."""
        y = self.conv(self._view(layer), x, in_channels=self.shapes[x.slot][0])
        return Scaled(y.slot, y.bias)

    def _add_image(self, layer: Any, x: Scaled, image: Scaled) -> None:
        """Add the 1x1 convolution of the image to x, in place."""
        name = self.names[layer]
        self.complete(x, f"{name}.input")
        more = self.shapes[image.slot][0] - layer.in_channels
        weight = F.pad(layer.weight.double().flatten(1), (0, more)) / x.scale
        self.pointwise(name, image.slot, weight, _bias(layer) / x.scale, x.slot, target=x.slot)

    def _with_residual(self, layer: Any, x: Scaled, image: Scaled) -> Scaled:
        """Emit (x + filter(conv(image))) / sqrt(2), with filter and convolution as one convolution of stride 2."""
        name = self.names[layer]
        self.complete(image, f"{name}.image")
        if x.residual is not None:
            self.complete(x, f"{name}.input")
        taps = layer.resample_filter.double()
        weight = layer.weight.double()
        whole = F.conv_transpose2d(weight.flatten(0, 1)[:, None], taps)[:, 0].unflatten(0, weight.shape[:2])
        view = nn.Conv2d(layer.in_channels, layer.out_channels, whole.shape[-1], device="meta")
        factor = image.scale / x.scale
        view.weight = _constant(whole * factor)
        view.bias = None if layer.bias is None else _constant(layer.bias.double() / x.scale)
        self.names[view] = name
        padding = weight.shape[-1] // 2 + (taps.shape[-1] - 1) // 2
        y = self.conv(view, image, stride=2, padding=padding, in_channels=self.shapes[image.slot][0])
        return Scaled(y.slot, self.add(y.bias, x.bias), x.slot, x.scale * math.sqrt(0.5))

    def _resampled(self, layer: Any, x: Scaled) -> Scaled:
        """Emit the filter of a convolution that halves or doubles, alone."""
        name, channels = self.names[layer], self.shapes[x.slot][0]
        if layer.down and is_mean(layer):
            if x.residual is not None:
                self.complete(x, f"{name}.input")
            return Scaled(self.other(f"{name}.halve", [x.slot], halve).slot, x.bias, scale=x.scale)
        self.complete(x, f"{name}.input")
        padding = (layer.resample_filter.shape[-1] - 1) // 2
        factor = 4 if layer.up else 1
        taps = self.put(
            f"{name}.filter", lambda: layer.resample_filter.double().mul(factor).expand(channels, -1, -1, -1)
        )
        run = F.conv_transpose2d if layer.up else F.conv2d
        _, height, width = self.shapes[x.slot]
        shape = (channels, 2 * height, 2 * width) if layer.up else (channels, height // 2, width // 2)
        y = self.other(
            f"{name}.filter", [x.slot], lambda v: run(v, taps, stride=2, padding=padding, groups=channels), shape
        )
        return Scaled(y.slot, scale=x.scale)

    def _rescaled(self, x: Scaled, scale: float, name: str) -> Scaled:
        """Return x with another scale, multiplied if it has a different one."""
        if math.isclose(x.scale, scale, rel_tol=1e-12):
            return x
        self.complete(x, f"{name}.sum")
        factor = x.scale / scale
        return Scaled(self.other(f"{name}.scale", [x.slot], lambda v: v * factor).slot, scale=scale)

    def _norm(self, layer: Any, x: Activation, skip: Activation | None = None, **options: Any) -> Activation:
        """Emit the norm of concat(x, skip), with SiLU unless `options` say otherwise.

        PhysicsNeMo divides by the unbiased variance: weight and epsilon then depend on the number of pixels.
        """
        channels, (_, height, width) = len(layer.weight), self.shapes[x.slot]
        name, scale = self.names[layer], x.scale if isinstance(x, Scaled) else 1.0
        eps = layer.eps / scale**2
        if has_biased_variance(layer):
            return self.norm(self._norm_view(layer, name, eps), x, skip, **options)
        counts = [channels // layer.num_groups * height * width]
        if self.constants.refilling:  # all sizes that were used, this one last
            known = (key.removeprefix(f"{name}.of_").removesuffix(".weight") for key in self.constants.tensors)
            counts = [int(key) for key in known if key.isdecimal()] + counts[:1]
        result = Activation(x.slot)
        for count in counts:
            share = (count - 1) / count
            view = self._norm_view(layer, f"{name}.of_{count}", eps * share, math.sqrt(share))
            result = self.norm(view, x, skip, **options)
        return result

    def _norm_view(self, layer: Any, name: str, eps: float, factor: float = 1.0) -> nn.GroupNorm:
        view = nn.GroupNorm(layer.num_groups, len(layer.weight), eps, device="meta")
        view.weight = _constant(layer.weight.double() * factor)
        view.bias = _constant(layer.bias)
        self.names[view] = name
        return view

    def _view(self, layer: Any, factor: float = 1.0, of_bias: float | None = None) -> nn.Conv2d:
        """Return a convolution without resampling as torch's, its weight times `factor`, its bias times `of_bias`."""
        view = nn.Conv2d(layer.in_channels, layer.out_channels, layer.weight.shape[-1], bias=False, device="meta")
        view.weight = _constant(layer.weight if factor == 1 else layer.weight.double() * factor)
        if layer.bias is not None:
            view.bias = _constant(layer.bias.double() * (factor if of_bias is None else of_bias))
        self.names[view] = self.names[layer]
        return view

    def _probabilities(self, out: Activation) -> Activation:
        """Emit the softmax over the channels that are probabilities."""
        channels = probability_channels(self.unet)
        if not channels:
            return out
        unet: Any = self.unet
        factors = self.put("scalar", unet.scalar)

        def softmax(v: Tensor) -> Tensor:
            v = v.clone()
            v[:, channels] = (v[:, channels] * factors).softmax(dim=1)
            return v

        return self.other("scalar", [out.slot], softmax, self.shapes[out.slot])


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach(), requires_grad=False)


def _bias(layer: Any) -> Tensor:
    if layer.bias is None:
        return layer.weight.new_zeros(layer.out_channels, dtype=torch.float64)
    bias: Tensor = layer.bias.detach().double()
    return bias
