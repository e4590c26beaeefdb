"""Emit the layers of transformers inside U-Nets: layer norm, attention to a text and to the image, GEGLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastddpm_kernels import tuned
from torch import Tensor, nn

from fastddpm.networks.frozen import instructions as ops
from fastddpm.networks.frozen import whole_instructions as whole
from fastddpm.networks.frozen.builder import Activation
from fastddpm.networks.frozen.residual import ResidualBuilder


class TransformerBuilder(ResidualBuilder):
    """A `Builder` that knows the layers of transformers. Pixels, and tokens of a text, are positions of an image."""

    def layer_norm(self, layer: nn.LayerNorm, x: Activation) -> int:
        """Emit a layer norm of `x`, whose slot holds the sum with its residual afterwards. Return the norm's slot."""
        assert x.bias is None
        name, channels = self.names[layer], self.shapes[x.slot][0]
        target, residual = self.new(*self.shapes[x.slot]), x.residual
        own = {"weight": layer.weight, "bias": layer.bias}
        plain = {"weight": torch.ones(channels), "bias": torch.zeros(channels)}
        weight, bias = (
            self.put(f"{name}.{key}", plain[key] if given is None else given, self.vector_dtype)
            for key, given in own.items()
        )
        self.emit(
            name, "norm", [x.slot] + ([] if residual is None else [residual]),
            [target] + ([] if residual is None else [x.slot]),
            ops.layer_norm(self.m, x.slot, target, residual, weight, bias, layer.eps),
        )  # fmt: skip
        x.residual = None
        return target

    def normed_linear(
        self, norm: nn.LayerNorm, h: Activation, name: str, layers: Sequence[nn.Linear], *, gate: bool = False
    ) -> int:
        """Emit a layer norm of `h` and linear layers of its result, side by side, with GEGLU if `gate`.

        The slot of `h` holds the sum with its residual afterwards. Return the slot of the result.
        """
        outputs = sum(layer.out_features for layer in layers) // (2 if gate else 1)
        if h.residual is not None or not self.takes_normed_linear(h, outputs, gate):
            normed = self.layer_norm(norm, h)
            if not gate:
                return self.joined(name, normed, layers)
            (layer,) = layers
            return self.geglu(name.removesuffix(".proj"), self.linear(name, normed, layer.weight, layer.bias))
        target = self.new(outputs, *self.shapes[h.slot][1:])

        def weight() -> Tensor:
            joined = torch.cat(tuple(layer.weight for layer in layers))
            return joined if norm.weight is None else joined.double() * norm.weight.double()

        def bias() -> Tensor:
            shift = None if norm.bias is None else norm.bias.double()
            parts = []
            for layer in layers:
                own = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
                parts.append(own.double() if shift is None else own.double() + layer.weight.double() @ shift)
            return torch.cat(parts)

        own = self.put(f"{name}.normed", weight)
        sums = self.put(f"{name}.sums", lambda: own.double().sum(1), self.vector_dtype)
        self.emit(
            name, "pointwise", [h.slot], [target],
            whole.layer_norm_linear(
                self.m, h.slot, target, own, sums, self.put(f"{name}.normed_bias", bias, self.vector_dtype), norm.eps,
                gate,
            ),
            flops=2 * self.pixels(target) * own.numel(), weights=own.numel(),
        )  # fmt: skip
        return target

    def takes_normed_linear(self, h: Activation, outputs: int, gate: bool) -> bool:
        """Return whether a layer norm and a product are one kernel, by the fusion or the tuned table."""
        shape = (self.pixels(h.slot), self.shapes[h.slot][0], outputs, int(gate), int(self.m.allow_tf32))
        choice = tuned.choice("layer_norm_linear", self.device, self.dtype, shape)
        if self.fusion != "auto":
            return self.fusion == "full"
        return self._noted(choice is not None and choice["implementation"] == "one")

    def attend(
        self, name: str, source: int, channels: int, heads: int, pair: int | None = None, mask: Tensor | None = None
    ) -> int:
        """Emit the attention of `source`'s first channels to `pair` and to its others, as `ops.cross_attention`."""
        _, height, width = self.shapes[source]
        target = self.new(channels, height, width)
        keys = 0 if pair is None else self.shapes[pair][1] * self.shapes[pair][2]
        keys += height * width if self.shapes[source][0] > channels else 0
        self.emit(
            name, "attention", [source] + ([] if pair is None else [pair]), [target],
            ops.cross_attention(self.m, source, target, heads, channels, pair, mask),
            flops=4 * self.pixels(source) * keys * channels,
        )  # fmt: skip
        return target

    def geglu(self, name: str, source: int) -> int:
        """Emit GEGLU of the channels."""
        channels, height, width = self.shapes[source]
        target = self.new(channels // 2, height, width)
        self.emit(name, "other", [source], [target], ops.geglu(self.m, source, target))
        return target

    def joined(self, name: str, source: int, layers: Sequence[nn.Linear]) -> int:
        """Emit linear layers of one input as one product; their results lie side by side."""
        weight = torch.cat(tuple(layer.weight for layer in layers))
        bias = None if layers[0].bias is None else torch.cat(tuple(layer.bias for layer in layers))
        return self.linear(name, source, weight, bias)

    def linear_add(
        self, name: str, source: int, weight: Tensor, bias: Tensor | None, h: Activation, *, complete: bool = False
    ) -> Activation:
        """Emit a product that is added to `h`, which must be complete and which nothing else reads afterwards.

        Where the vendor's product does not add, the sum waits for the next norm, unless it has to be `complete`.
        """
        assert h.residual is None
        assert h.bias is None
        if self.m.native or complete or self.fusion == "full":
            return self.pointwise(name, source, weight, bias, h.slot, target=h.slot)
        return Activation(self.linear(name, source, weight, bias), None, h.slot)
