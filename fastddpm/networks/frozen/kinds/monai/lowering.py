"""Turn MONAI's `DiffusionModelUNet` into the instructions that compute it.

Keys and values of the context are instructions of the call: a step reads them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fastddpm.networks.frozen.builder import Activation
from fastddpm.networks.frozen.residual import ResidualBlock
from fastddpm.networks.frozen.transformer import TransformerBuilder
from fastddpm.networks.unet.layers import double, halve


class Lowering(TransformerBuilder):
    """A `DiffusionModelUNet` in two dimensions as instructions."""

    def lower(self) -> int:
        unet: Any = self.unet
        self._context = self.condition("context").slot if "context" in self.conditions else None
        x = self.conv(unet.conv_in.conv, Activation(self.INPUT), in_channels=self.shapes[self.INPUT][0])
        skips = [x]
        for block in unet.down_blocks:
            for resnet, attention in _pairs(block):
                x = self._resnet(resnet, x)
                if attention is not None:
                    x = self._attention(attention, x)
                skips.append(x)
            if block.downsampler is not None:
                x = self._downsample(block.downsampler, x)
                skips.append(x)
        middle = unet.middle_block
        x = self._attention(middle.attention, self._resnet(middle.resnet_1, x))
        x = self._resnet(middle.resnet_2, x)
        for block in unet.up_blocks:
            for resnet, attention in _pairs(block):
                x = self._resnet(resnet, x, skips.pop())
                if attention is not None:
                    x = self._attention(attention, x)
            if block.upsampler is not None:
                x = self._upsample(block.upsampler, x)
        norm, _, conv = unet.out
        return self.normed_conv_to_image(norm, conv.conv, x).slot

    def _resnet(self, block: Any, x: Activation, skip: Activation | None = None) -> Activation:
        resample = None
        if block.up or block.down:
            resample = partial(self.resampled, double if block.up else halve)
        shortcut = getattr(block.skip_connection, "conv", None)  # or an identity
        layers = ResidualBlock(
            self.names[block], block.norm1, block.conv1.conv, block.norm2, block.conv2.conv, shortcut, "silu", False,
            resample, block.up,
        )  # fmt: skip
        return self.residual_block(layers, x, skip)

    def _downsample(self, layer: Any, x: Activation) -> Activation:
        if hasattr(layer, "norm1"):
            return self._resnet(layer, x)
        return self.halved_by_conv(layer.op.conv, x, layer.op.conv.padding[0], self.names[layer])

    def _upsample(self, layer: Any, x: Activation) -> Activation:
        if hasattr(layer, "norm1"):
            return self._resnet(layer, x)
        self.complete(x, self.names[layer])
        return self.conv_of_double(layer.postconv.conv, x)

    def _attention(self, layer: Any, x: Activation) -> Activation:
        name = self.names[layer]
        h = self.norm(layer.norm, x, activation=None)
        if hasattr(layer, "attn"):
            out, project = self._attended(layer.attn, h.slot), layer.attn.out_proj
            if not layer.attn.include_fc:
                return Activation(out, x.bias, x.slot)
            bias = self.add(project.bias, x.bias)
            return self.pointwise(f"{name}.attn.out_proj", out, project.weight, bias, x.slot)
        proj_in, proj_out = layer.proj_in.conv, layer.proj_out.conv
        h = Activation(self.linear(f"{name}.proj_in", h.slot, proj_in.weight.flatten(1), proj_in.bias))
        blocks = list(layer.transformer_blocks)
        for block in blocks:
            h = self._transformer_block(block, h, last=block is blocks[-1])
        bias = self.add(proj_out.bias, x.bias)
        return self.pointwise(f"{name}.proj_out", h.slot, proj_out.weight.flatten(1), bias, x.slot)

    def _transformer_block(self, block: Any, h: Activation, *, last: bool) -> Activation:
        name = self.names[block]
        out = self._attended(block.attn1, self.layer_norm(block.norm1, h))
        h = self._projected(block.attn1, out, h) if block.attn1.include_fc else Activation(out, None, h.slot)
        h = self._projected(block.attn2, self._attended(block.attn2, self.layer_norm(block.norm2, h)), h)
        first, second = block.ff.linear1, block.ff.linear2
        gated = self.linear(f"{name}.ff.linear1", self.layer_norm(block.norm3, h), first.weight, first.bias)
        gated = self.geglu(f"{name}.ff.fn", gated)
        return self.linear_add(f"{name}.ff.linear2", gated, second.weight, second.bias, h, complete=last)

    def _projected(self, layer: Any, out: int, h: Activation) -> Activation:
        project = layer.out_proj
        return self.linear_add(f"{self.names[layer]}.out_proj", out, project.weight, project.bias, h)

    def _attended(self, layer: Any, source: int) -> int:
        """Emit attention to the context, or to the image itself where there is none, before its projection."""
        name, heads = self.names[layer], layer.num_heads
        combined = getattr(layer, "use_combined_linear", False)
        own = [layer.qkv] if combined else [layer.to_q, layer.to_k, layer.to_v]
        channels = layer.qkv.out_features // 3 if combined else layer.to_q.out_features
        crosses = hasattr(layer, "context_input_size")
        of_itself = f"{name}.to_qkv"
        if crosses and self._context is not None:
            if self.constants.refilling and any(key.startswith(of_itself) for key in self.constants.tensors):
                self.joined(of_itself, source, own)  # for programs without a context
            with self.once():
                pair = self.joined(f"{name}.to_kv", self._context, [layer.to_k, layer.to_v])
            return self.attend(name, self.joined(f"{name}.to_q", source, [layer.to_q]), channels, heads, pair)
        return self.attend(name, self.joined(of_itself, source, own), channels, heads)


def _pairs(block: Any) -> list[tuple[Any, Any]]:
    """Return the residual blocks of a block, each with the attention after it, or None."""
    attentions = list(getattr(block, "attentions", ())) or [None] * len(block.resnets)
    return list(zip(block.resnets, attentions, strict=True))
