"""Turn a `UNet2DConditionModel` into the instructions that compute it.

Keys and values of the text, with all that comes before them, are instructions of the call: a step reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.networks.frozen import instructions as ops
from fastddpm.networks.frozen.builder import Activation
from fastddpm.networks.frozen.instructions import Instruction
from fastddpm.networks.frozen.kinds.condition.embeddings import arguments_of
from fastddpm.networks.frozen.residual import ResidualBlock
from fastddpm.networks.frozen.transformer import TransformerBuilder
from fastddpm.networks.frozen.whole_layers import NormBefore

ACTIVATIONS: dict[type, str] = {nn.SiLU: "silu", nn.GELU: "gelu", nn.Mish: "mish", nn.ReLU: "relu"}
LARGE = 2**26  # weights, from which on their memory counts
DISCARD = -10000.0  # diffusers' score of a token that a mask discards


def residuals_of(unet: nn.Module) -> dict[str, Any]:
    """Return the residual blocks by name."""
    return {name: layer for name, layer in unet.named_modules() if type(layer).__name__ == "ResnetBlock2D"}


def halve(x: Tensor) -> Tensor:
    """Average 2x2 pixels."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """Repeat every pixel in both directions."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Lowering(TransformerBuilder):
    """A `UNet2DConditionModel` as instructions."""

    unet: Any

    def lower(self) -> int:
        self._text_slot: int | None = None
        self._masks: dict[str, Tensor] = {}
        self.compact = sum(weight.numel() for weight in self.unet.parameters()) > LARGE
        unet = self.unet
        x = Activation(self.INPUT)
        if unet.config.center_input_sample:
            x = self.other("center_input_sample", [x.slot], lambda v: 2 * v - 1)
        x = self.conv_same(unet.conv_in, x, in_channels=self.shapes[self.INPUT][0])
        skips = [x]
        for block in unet.down_blocks:
            attentions = list(getattr(block, "attentions", ()))
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
                if attentions:
                    x = self._attention(attentions.pop(0), x)
                skips.append(x)
            for layer in block.downsamplers or ():
                x = self._resnet(layer, x) if type(layer).__name__ == "ResnetBlock2D" else self._downsample(layer, x)
                skips.append(x)
        controlled = "mid_block_additional_residual" in self.conditions
        if unet.mid_block is not None:
            first, *more = unet.mid_block.resnets
            x = self._resnet(first, x)
            attentions = list(unet.mid_block.attentions) or [None] * len(more)
            for attention, resnet in zip(attentions, more, strict=True):
                x = self._resnet(resnet, x if attention is None else self._attention(attention, x))
        if controlled:
            skips = [self._given(f"down_block_additional_residuals.{i}", skip) for i, skip in enumerate(skips)]
            x = self._given("mid_block_additional_residual", x)
        forced = any(size % 2**unet.num_upsamplers for size in self.shapes[self.INPUT][1:])
        for block in unet.up_blocks:
            attentions = list(getattr(block, "attentions", ()))
            for resnet in block.resnets:
                x = self._resnet(resnet, x, skips.pop())
                if attentions:
                    x = self._attention(attentions.pop(0), x)
            for layer in block.upsamplers or ():
                if type(layer).__name__ == "ResnetBlock2D":
                    x = self._resnet(layer, x)
                else:
                    x = self._upsample(layer, x, self.shapes[skips[-1].slot][1:] if forced else None)
        return self.normed_conv_to_image(unet.conv_norm_out, unet.conv_out, x, ACTIVATIONS[type(unet.conv_act)]).slot

    def affordable(self, algorithm: str, size: tuple[int, int], *, upsample: bool) -> str:
        """See `Builder.affordable`.

        Winograd's algorithm stores its weights in 1.8 or 4 times the memory (1 or 1.6 times that of "direct" after
        upsampling). Large U-Nets have nearly all their weights at the low resolutions: there memory is worth more.
        """
        pixels = self.shapes[self.INPUT][1] * self.shapes[self.INPUT][2]
        fewer = pixels / max(size[0] * size[1], 1)
        return algorithm if not self.compact or fewer < (8 if upsample else 2) else "direct"

    def _given(self, name: str, x: Activation) -> Activation:
        """Emit the sum of `x` and a condition that may change at every step."""
        self.complete(x, name)
        target = self.new(*self.shapes[x.slot])
        given = self.conditions[name]
        if tuple(given.shape[1:]) != self.shapes[x.slot]:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, must have {(self.batch, *self.shapes[x.slot])}")
        self.emit(name, "other", [x.slot], [target], ops.add_given(self.m, x.slot, given, target))
        return Activation(target)

    def _resnet(self, block: Any, x: Activation, skip: Activation | None = None) -> Activation:
        resample: Callable[[Activation, str], Activation] | None = None
        if block.up or block.down:
            resample = partial(self.resampled, double if block.up else halve)
        if skip is not None and self.shapes[skip.slot][1:] != self.shapes[x.slot][1:]:
            sizes = "x".join(map(str, self.shapes[self.INPUT][1:]))
            raise ValueError(f"inputs are {sizes} pixels, both must be multiples of {2**self.unet.num_upsamplers}")
        y = self.residual_block(
            ResidualBlock(
                self.names[block], block.norm1, block.conv1, block.norm2, block.conv2, block.conv_shortcut,
                ACTIVATIONS[type(block.nonlinearity)], block.time_embedding_norm == "scale_shift", resample, block.up,
                block.output_scale_factor,
            ),
            x, skip,
        )  # fmt: skip
        self.done(block)
        return y

    def _downsample(self, layer: Any, x: Activation) -> Activation:
        name = self.names[layer]
        if not layer.use_conv:
            return self.resampled(halve, x, name)
        y = self.halved_by_conv(layer.conv, x, layer.padding, name)
        self.done(layer)
        return y

    def _upsample(self, layer: Any, x: Activation, size: tuple[int, ...] | None) -> Activation:
        """Emit an upsampling by two, or to the size of the skip connection that follows."""
        name = self.names[layer]
        _, height, width = self.shapes[x.slot]
        conv = layer.conv if layer.name == "conv" else layer.Conv2d_0
        self.complete(x, name)
        if not layer.use_conv:
            size = (2 * height, 2 * width) if size is None else size
            return self.other(f"{name}.size", [x.slot], lambda v: F.interpolate(v, size=size, mode="nearest"))
        plain = f"{self.names[conv]}.plain"
        if self.constants.refilling and any(key.startswith(plain) for key in self.constants.tensors):
            self.conv_same(conv, x, key="plain")
        if size is None or tuple(size) == (2 * height, 2 * width):
            y = self.conv_of_double(conv, x)
        else:
            x = self.other(f"{name}.size", [x.slot], lambda v: F.interpolate(v, size=size, mode="nearest"))
            y = self.conv_same(conv, x, key="plain")
        self.done(layer)
        return y

    def _attention(self, layer: Any, x: Activation) -> Activation:
        if type(layer).__name__ == "Attention":
            return self._simple_attention(layer, x)
        name, proj_in, blocks = self.names[layer], layer.proj_in, list(layer.transformer_blocks)
        norm, width = NormBefore(layer.norm, None), proj_in.weight.shape[0]
        whole = self.takes_whole(x, width, 1, norm=norm)
        if whole:
            h = self.whole_pointwise(f"{name}.proj_in", x, lambda: proj_in.weight, width, proj_in.bias, norm=norm)
        else:
            normed = self.norm(layer.norm, x, activation=None)
            h = Activation(self.linear(f"{name}.proj_in", normed.slot, proj_in.weight.flatten(1), proj_in.bias))
        for block in blocks[:-1]:
            h, gated = self._transformer_block(block, h)
            project = block.ff.net[2]
            h = self.linear_add(f"{self.names[block]}.ff.net.2", gated, project.weight, project.bias, h)
            self.done(block)
        h, gated = self._transformer_block(blocks[-1], h)
        y = (self._ends_whole if whole else self._ends)(layer, blocks[-1], h, gated, x)
        self.done(blocks[-1])
        self.done(layer)
        return y

    def _ends(self, layer: Any, block: Any, h: Activation, gated: int, x: Activation) -> Activation:
        """Emit the last product of the last block, and the projection that is added to `x`."""
        name, project = self.names[layer], block.ff.net[2]
        h = self.linear_add(
            f"{self.names[block]}.ff.net.2", gated, project.weight, project.bias, h, complete=True
        )  # fmt: skip
        bias = self.add(layer.proj_out.bias, x.bias)
        return self.pointwise(f"{name}.proj_out", h.slot, layer.proj_out.weight.flatten(1), bias, x.slot)

    def _ends_whole(self, layer: Any, block: Any, h: Activation, gated: int, x: Activation) -> Activation:
        """Emit the same as one product of h and the gated layer: nothing but a sum is between the two."""
        project, out = block.ff.net[2], layer.proj_out

        def weight() -> Tensor:
            outer = out.weight.double().flatten(1)
            return torch.cat((outer, outer @ project.weight.double()), dim=1)

        bias = out.weight.double().flatten(1) @ project.bias.double()
        return self.whole_pointwise(
            f"{self.names[layer]}.proj_out", h, weight, len(out.weight), self.add(bias, out.bias), residual=x.slot,
            second=Activation(gated),
        )  # fmt: skip

    def _transformer_block(self, block: Any, h: Activation) -> tuple[Activation, int]:
        """Emit a block but for its last product. Return the slots of what that is added to, and of what it reads."""
        name = self.names[block]
        for norm, attention, crosses in (
            (block.norm1, block.attn1, block.only_cross_attention),
            (block.norm2, block.attn2, True),
        ):
            if attention is None:
                continue
            own = self.names[attention]
            channels, heads = attention.inner_dim, attention.heads
            if crosses and attention.is_cross_attention:
                projected = self.normed_linear(norm, h, f"{own}.to_q", [attention.to_q])
                mask = self._mask("encoder_attention_mask") if attention is block.attn2 else None
                out = self.attend(own, projected, channels, heads, self._text_pair(attention), mask)
            else:
                layers = [attention.to_q, attention.to_k, attention.to_v]
                projected = self.normed_linear(norm, h, f"{own}.to_qkv", layers)
                out = self.attend(own, projected, channels, heads)
            project = attention.to_out[0]
            h = self.linear_add(f"{own}.to_out.0", out, project.weight, project.bias, h)
        return h, self.normed_linear(block.norm3, h, f"{name}.ff.net.0.proj", [block.ff.net[0].proj], gate=True)

    def _simple_attention(self, attention: Any, x: Activation) -> Activation:
        """Emit one attention to the text and, unless `only_cross_attention`, to the image."""
        name, project = self.names[attention], attention.to_out[0]
        channels = attention.inner_dim
        h = self.norm(attention.group_norm, x, activation=None)
        own = [attention.to_q] if attention.only_cross_attention else [attention.to_q, attention.to_k, attention.to_v]
        projected = self.joined(f"{name}.to_qkv", h.slot, own)
        pair = self._text_pair(attention)
        mask = self._mask("attention_mask" if "attention_mask" in self.conditions else "encoder_attention_mask")
        if mask is not None:
            _, height, width = self.shapes[x.slot]
            refused = attention.only_cross_attention or height * width == mask.shape[1]
            if refused and not self.constants.refilling:
                raise ValueError(f"a mask of tokens is given, which diffusers does not take for its layer {name}")
            mask = self._padded_mask(mask, height * width)
        out = self.attend(name, projected, channels, attention.heads, pair, mask)
        y = self.pointwise(f"{name}.to_out.0", out, project.weight, self.add(project.bias, x.bias), x.slot)
        self.done(attention)
        return y

    # What a call computes once.

    def _text(self) -> int:
        """Emit the text as attention reads it, before its projections; once for all layers."""
        if self._text_slot is None:
            unet = self.unet
            if unet.encoder_hid_proj is None:
                self._text_slot = self.condition("encoder_hidden_states").slot
                return self._text_slot

            def projected() -> Tensor:
                text, added = arguments_of(unet, self.conditions)
                out: Tensor = unet.process_encoder_hidden_states(text, added)
                return out.to(self.device)

            _, tokens, channels = projected().shape
            target = self.new(channels, 1, tokens)

            def run() -> None:
                self.m.slots[target].permute(0, 2, 3, 1).copy_(projected().unsqueeze(1))

            with self.once():
                self.emit("encoder_hid_proj", "other", [], [target], run)
            self._text_slot = target
        return self._text_slot

    def _text_pair(self, attention: Any) -> int:
        """Emit keys and values of the text for one layer, side by side."""
        name, text = self.names[attention], self._text()
        added = attention.added_kv_proj_dim is not None
        layers = [attention.add_k_proj, attention.add_v_proj] if added else [attention.to_k, attention.to_v]
        with self.once():
            norm = attention.norm_cross
            if isinstance(norm, nn.LayerNorm):
                text = self.layer_norm(norm, Activation(text))
            elif norm is not None:
                text = self.norm(norm, Activation(text), activation=None).slot
            return self.joined(f"{name}.to_kv", text, layers)

    def _mask(self, name: str) -> Tensor | None:
        """Emit what is added to the scores of the text's tokens, or return None without a mask."""
        if name not in self.conditions:
            return None
        if name not in self._masks:
            mask = self.conditions[name]
            scores = torch.zeros(mask.shape, dtype=self.vector_dtype, device=self.device)

            def run() -> None:
                scores.copy_((1 - mask.to(scores.dtype)) * DISCARD)

            self._emit_once(name, run)
            self._masks[name] = scores
        return self._masks[name]

    def _padded_mask(self, mask: Tensor, more: int) -> Tensor:
        """Return a mask with zeros for keys that follow."""
        key = f"{more} more"
        if key not in self._masks:
            padded = mask.new_zeros(len(mask), mask.shape[1] + more)
            self._emit_once(f"mask.{more}", lambda: padded[:, : mask.shape[1]].copy_(mask))
            self._masks[key] = padded
        return self._masks[key]

    def _emit_once(self, name: str, run: Callable[[], object]) -> None:
        self.call_instructions.append(Instruction(name, "other", (), (), 1, 0, 0, run))
