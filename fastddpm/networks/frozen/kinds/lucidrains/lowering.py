"""Turn a `Unet` of denoising_diffusion_pytorch into the instructions that compute it.

Its norms stand after the convolutions. A norm reads one convolution, and FiLM, SiLU and the block's residual follow
the norm. So only the bias of a convolution is ever pending.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.networks.frozen.builder import Activation, Builder
from fastddpm.networks.frozen.instructions import native_conv
from fastddpm.networks.frozen.kinds.lucidrains import instructions as ops


class Lowering(Builder):
    """A `Unet`, plain or class-conditional, as instructions."""

    def lower(self) -> int:
        unet: Any = self.unet
        x = self._convolved(unet.init_conv, Activation(self.INPUT), in_channels=self.shapes[self.INPUT][0])
        first, skips = x, []
        for block1, block2, attention, down in unet.downs:
            x = self._resnet(block1, x)
            skips.append(x)
            x = self._attention(attention, self._resnet(block2, x))
            skips.append(x)
            x = self._down(down, x)
        x = self._resnet(unet.mid_block1, x)
        x = self._attention(unet.mid_attn, x)
        x = self._resnet(unet.mid_block2, x)
        for block1, block2, attention, up in unet.ups:
            x = self._resnet(block1, x, skips.pop())
            x = self._attention(attention, self._resnet(block2, x, skips.pop()))
            if isinstance(up, nn.Sequential):
                convolution: Any = up[1]
                x = self.conv_of_double(convolution, x)
                self.complete(x, self.names[up])
            else:
                x = self._convolved(up, x)
        x = self._resnet(unet.final_res_block, x, first)
        return self._linear(unet.final_conv, x).slot

    def _resnet(self, block: Any, x: Activation, skip: Activation | None = None) -> Activation:
        name = self.names[block]
        scale, shift = self.row[:, self.columns[name]].expand(self.batch, -1).chunk(2, dim=1)
        h = self.rms_norm(block.block1.norm, self._conv_of_both(block.block1.proj, x, skip), scale=scale, shift=shift)
        h = self.conv(block.block2.proj, h)
        if isinstance(block.res_conv, nn.Identity):
            return self.rms_norm(block.block2.norm, h, residual=x)
        return self.shortcut(block.res_conv, x, skip, self.rms_norm(block.block2.norm, h))

    def _conv_of_both(self, layer: nn.Conv2d, x: Activation, skip: Activation | None) -> Activation:
        """Emit a 3x3 convolution of concat(x, skip)."""
        if skip is None:
            return self.conv(layer, x)
        name, (channels, height, width) = self.names[layer], self.shapes[x.slot]
        if not self.m.native:
            both = self.new(channels + self.shapes[skip.slot][0], height, width)
            run = ops.concatenate(self.m, x.slot, skip.slot, both)
            self.emit(f"{name}.cat", "other", [x.slot, skip.slot], [both], run)
            return self.conv(layer, Activation(both))
        shape = (layer.out_channels, layer.in_channels, 3)
        channels2 = self.shapes[skip.slot][0]
        packed = self.packed(f"{name}.weight", lambda: layer.weight, shape, (height, width), 1, 1, channels2=channels2)
        bias, pending = self.bias_of(layer, layer.bias)
        target = self.new(layer.out_channels, height, width)
        numel = layer.weight.numel()
        self.emit(
            name, "conv", [x.slot, skip.slot], [target],
            native_conv(self.m, x.slot, target, packed, bias, second=skip.slot),
            flops=2 * self.pixels(target) * numel, weights=numel,
        )  # fmt: skip
        return Activation(target, pending)

    def _attention(self, layer: Any, x: Activation) -> Activation:
        if type(layer).__name__ == "Residual":  # the class-conditional U-Net's
            norm, layer = layer.fn.norm, layer.fn.fn
        else:
            norm = layer.norm
        h = self.rms_norm(norm, x, activation=None)
        if type(layer).__name__ == "Attention":
            out = self._full_attention(layer, h)
            return self._linear(layer.to_out, out, residual=x)
        projection, norm = layer.to_out
        out = self._linear_attention(layer, h, projection)
        return self.rms_norm(norm, out, residual=x, activation=None)

    def _full_attention(self, layer: Any, x: Activation) -> Activation:
        name, inner = self.names[layer], layer.to_qkv.out_channels // 3
        _, height, width = self.shapes[x.slot]
        weight = self.put(f"{name}.to_qkv", layer.to_qkv.weight.flatten(1).T)
        memory = self.put(f"{name}.memory", torch.cat(self._memory(layer), dim=1))
        keys = height * width + len(memory)
        rows, target = self.new(3 * inner, keys, 1), self.new(inner, height, width)
        self.emit(
            name, "attention", [x.slot], [target, rows],
            ops.attention(self.m, x.slot, target, rows, weight, memory, layer.heads),
            kernels=4 if len(memory) else 3, weights=weight.numel() + memory.numel(),
            flops=2 * self.pixels(x.slot) * (weight.numel() + 2 * keys * inner),
        )  # fmt: skip
        return Activation(target)

    def _linear_attention(self, layer: Any, x: Activation, projection: nn.Conv2d) -> Activation:
        name, heads, inner = self.names[layer], layer.heads, layer.to_qkv.out_channels // 3
        channels, height, width = self.shapes[x.slot]
        parts = zip(("to_q", "to_k", "to_v"), layer.to_qkv.weight.chunk(3), strict=True)
        memory = zip(("mem_k", "mem_v"), self._memory(layer), strict=True)
        projections = ops.Projections(
            *(self.put(f"{name}.{part}", weight.flatten(1).T) for part, weight in parts),
            *(self.put(f"{name}.{part}", rows) for part, rows in memory),
        )
        # Attention scales its queries; scaling the output projection instead is equivalent.
        weight = self.put(f"{name}.to_out", lambda: projection.weight.double().flatten(1).T * (inner // heads) ** -0.5)
        mask = None
        if self.m.fused and not self.m.native:
            block = torch.ones(inner // heads, inner // heads)
            mask = self.put(f"{name}.mask", lambda: torch.block_diag(*[block] * heads))
        bias, pending = self.bias_of(projection, projection.bias, self.dtype)
        count = len(projections.memory_key)
        keys = height * width + count
        scratch = ops.Scratch(
            self.new(inner, height, width), self.new(inner, keys, 1), self.new(inner, keys, 1),
            self.new(inner, height, width), self.new(inner, keys, 1),
        )  # fmt: skip
        target = self.new(channels, height, width)
        across = inner if mask is not None else inner // heads  # features that each feature is multiplied with
        products = (3 * channels + across + channels) * inner  # per pixel
        self.emit(
            name, "attention", [x.slot], [target, *scratch],
            ops.linear_attention(self.m, x.slot, target, projections, scratch, heads, mask, weight, bias),
            kernels=11 if count else 9, weights=4 * channels * inner + 2 * count * inner,
            flops=2 * self.pixels(x.slot) * products + 2 * self.batch * inner * across * channels,
        )  # fmt: skip
        return Activation(target, pending)

    def _memory(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Return the learned keys and values that every position also attends to, [M, heads * head_dim] each."""
        inner = layer.to_qkv.out_channels // 3
        if not hasattr(layer, "mem_kv"):
            empty = layer.to_qkv.weight.new_empty(0, inner)
            return empty, empty
        order = (0, 3, 1, 2) if type(layer).__name__ == "LinearAttention" else (0, 2, 1, 3)
        keys, values = layer.mem_kv.permute(order).flatten(2)
        return keys, values

    def _down(self, layer: Any, x: Activation) -> Activation:
        if not isinstance(layer, nn.Sequential):
            return self._convolved(layer, x, stride=layer.stride[0])
        # Pixels to channels, then a 1x1 convolution: that equals a 2x2 convolution of stride 2.
        own: Any = layer[1]
        folded = nn.Conv2d(own.in_channels // 4, own.out_channels, 2, 2, device="meta")
        folded.weight = nn.Parameter(own.weight.detach().unflatten(1, (-1, 2, 2)).flatten(3), requires_grad=False)
        folded.bias = own.bias
        self.names[folded] = self.names[own]
        return self._convolved(folded, x, stride=2)

    def _convolved(self, layer: Any, x: Activation, **options: Any) -> Activation:
        """Emit a convolution with its bias."""
        y = self.conv(layer, x, padding=layer.padding[0], **options)
        self.complete(y, self.names[layer])
        return y

    def _linear(self, layer: nn.Conv2d, x: Activation, residual: Activation | None = None) -> Activation:
        """Emit a 1x1 convolution plus `residual`, and overwrite `residual`, which nothing reads afterwards."""
        slot = None if residual is None else residual.slot
        return self.pointwise(self.names[layer], x.slot, layer.weight.flatten(1), layer.bias, slot, target=slot)

    def rms_norm(
        self, layer: Any, x: Activation, *, scale: Tensor | None = None, shift: Tensor | None = None,
        residual: Activation | None = None, activation: str | None = "silu",
    ) -> Activation:  # fmt: skip
        """Emit the RMS norm of `x` with its pending bias, FiLM and activation, and add `residual` last."""
        name = self.names[layer]
        bias = None if x.bias is None else self.put(f"{name}.pending", x.bias, self.vector_dtype)
        target = self.new(*self.shapes[x.slot])
        slot = None if residual is None else residual.slot
        self.emit(
            name, "norm", [x.slot] + ([] if slot is None else [slot]), [target],
            ops.rms_norm(
                self.m, x.slot, target, slot, self.put(f"{name}.weight", layer.g.flatten(), self.vector_dtype), bias,
                scale, shift, activation,
            ),
        )  # fmt: skip
        return Activation(target)


class SequenceLowering(Lowering):
    """A `Unet1D` as instructions, on sequences as images of height 1."""

    def conv(self, layer: Any, x: Activation, *, stride: int = 1, padding: int = 1, **more: Any) -> Activation:
        """Emit a convolution along the sequence, with its bias."""
        assert x.residual is None
        assert x.bias is None
        name, (_, _, length) = self.names[layer], self.shapes[x.slot]
        weight = self.put(f"{name}.weight", lambda: layer.weight.unsqueeze(2))
        bias = self.put(f"{name}.bias", layer.bias)
        target = self.new(layer.out_channels, 1, (length + 2 * padding - layer.kernel_size[0]) // stride + 1)
        run = ops.conv_of_sequence(self.m, x.slot, target, weight, bias, stride, padding)
        self.emit(
            name, "conv", [x.slot], [target], run,
            flops=2 * self.pixels(target) * weight.numel(), weights=weight.numel(),
        )  # fmt: skip
        return Activation(target)

    def conv_of_double(self, layer: Any, x: Activation, *, bias: Tensor | str | None = "own") -> Activation:
        """Emit a convolution of a sequence twice as long."""
        double = self.other(f"{self.names[layer]}.double", [x.slot], lambda value: value.repeat_interleave(2, dim=3))
        return self.conv(layer, double)

    def _conv_of_both(self, layer: Any, x: Activation, skip: Activation | None) -> Activation:
        if skip is None:
            return self.conv(layer, x)
        channels, _, length = self.shapes[x.slot]
        both = self.new(channels + self.shapes[skip.slot][0], 1, length)
        run = ops.concatenate(self.m, x.slot, skip.slot, both)
        self.emit(f"{self.names[layer]}.cat", "other", [x.slot, skip.slot], [both], run)
        return self.conv(layer, Activation(both))
