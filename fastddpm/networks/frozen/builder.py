"""Emit single layers as instructions, for the `lowering` of every kind of U-Net.

Two additions wait until a kernel does them at no cost. A *pending bias* is a constant per channel that a slot still
lacks: convolutions leave theirs out, the next norm adds it to its means, or the next 1x1 convolution or residual
addition adds it as it writes. A *pending residual* is a slot that must still be added: the next norm adds it as it
reads. In plain torch (`fused` False) convolutions keep their bias, which costs nothing there.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from fastddpm_kernels import tuned
from fastddpm_kernels.conv import (
    ALGORITHMS,
    PackedWeight,
    choose_algorithm,
    likely_tile,
    packed_values,
    possible_algorithms,
)
from fastddpm_kernels.conv.packing import why_not_tile
from fastddpm_kernels.conv.upsampling import transposed_weight
from fastddpm_kernels.group_norm_silu import group_norm_silu_launches, group_norm_silu_workspace
from fastddpm_kernels.native.memory import give_back
from torch import Tensor, nn

from fastddpm.networks.frozen import instructions as ops
from fastddpm.networks.frozen.instructions import Instruction, Machine
from fastddpm.networks.weights import release

if TYPE_CHECKING:
    from fastddpm.networks.frozen.frozen_unet import FrozenUNet


@dataclass
class Activation:
    """A slot and the additions that are pending: value = slot + residual's slot + bias."""

    slot: int
    bias: Tensor | None = None  # float64 [C]
    residual: int | None = None


class Builder(ABC):
    """The instructions of a U-Net for one batch size and image size, emitted layer by layer.

    Attributes:
        instructions: of a step, in order.
        call_instructions: of a call, in order, emitted inside `once`.
        conditions: the tensors that the call gives, [N, ...] by name, on their places.
        shapes: (C, H, W) of every slot.
        bordered: slots whose last row and column must stay zero.
        loose: slots that get new memory at every run, since their operations cannot write to given memory.
        workspace_numel: the float32 elements of scratch memory that an instruction needs.
    """

    INPUT = 0
    compact = False  # whether native convolutions transform weights at every step rather than keep more than there are

    def __init__(
        self, frozen: FrozenUNet, machine: Machine, row: Tensor, batch: int, size: tuple[int, int], in_channels: int,
        conditions: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Prepare to emit instructions; `lower` emits them.

        Args:
            frozen: the frozen U-Net whose instructions and weights these are.
            machine: the state that the instructions run on.
            row: [1 or N, sum C], the buffer for the time projections of a step.
            batch: N.
            size: (height, width).
            in_channels: of the input; those beyond the U-Net's are zero.
            conditions: that the call gives; their memory stays, their values change between calls.
        """
        self.unet, self.constants, self.columns = frozen.unet, frozen.constants, frozen.columns
        self.m, self.row, self.batch = machine, row, batch
        self.names = {module: name for name, module in self.unet.named_modules()}
        self.device, self.dtype, self.weight_dtype = frozen.device, frozen.dtype, frozen.weight_dtype
        self.releasing = frozen.releasing
        self.cached = frozen.cached
        self.conditions = conditions
        self.instructions: list[Instruction] = []
        self.call_instructions: list[Instruction] = []
        self.shapes: list[tuple[int, int, int]] = [(in_channels, *size)]
        self.bordered: list[int] = []
        self.loose: set[int] = set()
        self.vector_dtype = row.dtype  # of values per channel: biases, scales
        self.workspace_numel = 0
        self.fusion = frozen.fusion
        self.mixed = False  # whether some layers are whole by a tuned table, and others parts
        # The names of the biases that a vector is the sum of, by its identity. Sums are kept: an identity is one's own.
        self._terms: dict[int, tuple[str, ...]] = {
            id(p): (name,) for name, p in self.unet.named_parameters() if p.ndim == 1
        }
        self._sums: list[Tensor] = []

    @abstractmethod
    def lower(self) -> int:
        """Emit the instructions of the whole U-Net. Return the slot of its output, whose first channels count."""

    def settle(self) -> None:  # noqa: B027 (nothing by default)
        """Complete what depends on later layers; after `lower`."""

    @contextmanager
    def once(self) -> Iterator[None]:
        """Emit instructions that run once per call, in `Program.load`, and not at every step.

        They read conditions and each other's slots. Every slot that they write has memory of its own for as long as
        the program lives, so the instructions of steps may read it and must not write it.
        """
        of_step, self.instructions = self.instructions, self.call_instructions
        try:
            yield
        finally:
            self.instructions = of_step

    def condition(self, name: str) -> Activation:
        """Emit, once per call, the copy of a condition into a slot, and return it.

        [N, C] becomes (C, 1, 1), a sequence [N, L, C] becomes (C, 1, L), and [N, C, H, W] stays.
        """
        given = self.conditions[name]
        while given.ndim < 4:
            given = given.unsqueeze(1)
        image = given if self.conditions[name].ndim == 4 else given.permute(0, 3, 1, 2)
        with self.once():
            target = self.new(*image.shape[1:])
            self.emit(name, "other", [], [target], ops.copy_from(self.m, image, target))
        return Activation(target)

    def conv(
        self, layer: nn.Conv2d, x: Activation, *, bias: Tensor | str | None = "own", stride: int = 1, padding: int = 1,
        in_channels: int | None = None, out_channels: int | None = None, below: int | None = None,
        key: str = "weight",
    ) -> Activation:  # fmt: skip
        """Emit a convolution.

        Args:
            layer: the layer with the weights; further channels get zero weights.
            x: the input, complete.
            bias: "own" for the layer's, or the bias to use instead.
            key: of the weight among the constants, after the layer's name.
            below: rows and columns of zeros below and to the right, if not `padding`; native convolutions only.
        """
        assert x.residual is None
        assert x.bias is None
        name, size = self.names[layer], layer.kernel_size[0]
        values = layer.bias if isinstance(bias, str) else bias
        more_in = (in_channels or layer.in_channels) - layer.in_channels
        more_out = (out_channels or layer.out_channels) - layer.out_channels
        if more_out and values is not None:
            values = F.pad(values, (0, more_out))
        outputs, inputs = layer.out_channels + more_out, layer.in_channels + more_in
        _, height, width = self.shapes[x.slot]
        more = padding + (padding if below is None else below) - size
        target = self.new(outputs, (height + more) // stride + 1, (width + more) // stride + 1)

        def padded() -> Tensor:
            weight: Tensor = layer.weight
            return F.pad(weight, (0, 0, 0, 0, 0, more_in, 0, more_out)) if more_in or more_out else weight

        if isinstance(bias, str):
            own, pending = self.bias_of(layer, values)
        else:  # a row of the time table, read at every run
            own, pending = values, None
        if self.m.native:
            packed = self.packed(f"{name}.{key}", padded, (outputs, inputs, size), (height, width), stride, padding)
            run = ops.native_conv(self.m, x.slot, target, packed, own, stride, padding)
        else:
            assert below is None
            run = ops.conv(self.m, x.slot, target, self.put(f"{name}.{key}", padded), own, stride, padding)
        numel = outputs * inputs * size**2
        self.emit(name, "conv", [x.slot], [target], run, flops=2 * self.pixels(target) * numel, weights=numel)
        return Activation(target, pending)

    def conv_to_image(self, layer: nn.Conv2d, x: Activation) -> Activation:
        """Emit a convolution to the channels of an image, complete; the channels may be padded."""
        name = self.names[layer]
        x = self.conv(layer, x, out_channels=self.image_channels(layer), padding=layer.kernel_size[0] // 2)
        if x.bias is not None:
            bias = self.put(f"{name}.pending", x.bias)
            self.emit(f"{name}.bias", "other", [x.slot], [x.slot], ops.add_bias(self.m, x.slot, bias))
            x.bias = None
        return x

    def image_channels(self, layer: nn.Conv2d) -> int:
        """Return the channels of a convolution to an image, in whole vectors: with three it is slow, or cuDNN pads."""
        out: int = layer.out_channels
        return -(-out // 8) * 8 if self.m.static and self.dtype.itemsize == 2 else out

    def conv_of_double(self, layer: nn.Conv2d, x: Activation, *, bias: Tensor | str | None = "own") -> Activation:
        """Emit a 3x3 convolution of `x` upsampled by two; `bias` as for `conv`."""
        assert x.residual is None
        assert x.bias is None
        name = self.names[layer]
        _, height, width = self.shapes[x.slot]
        target = self.new(layer.out_channels, 2 * height, 2 * width)
        own, pending = self.bias_of(layer, layer.bias) if isinstance(bias, str) else (bias, None)
        if self.m.native:
            shape = (layer.out_channels, layer.in_channels, 3)
            packed = self.packed(f"{name}.weight", lambda: layer.weight, shape, (height, width), 1, 1, True)
            run = ops.native_conv(self.m, x.slot, target, packed, own)
            self.emit(
                name, "conv", [x.slot], [target], run, flops=8 * self.pixels(target) * shape[0] * shape[1],
                weights=layer.weight.numel(),
            )  # fmt: skip
            return Activation(target, pending)
        plain, transposed = self._ways_to_double(layer, (height, width), f"{name}.plain", f"{name}.weight")
        if transposed:
            self.loose.add(target)
            source, weight = x.slot, self.put(f"{name}.weight", lambda: transposed_weight(layer.weight))
            run = ops.upsample(self.m, source, target, weight, own)
        if plain:
            source, weight = self.new(layer.in_channels, 2 * height, 2 * width), self.put(f"{name}.plain", layer.weight)
            self.emit(f"{name}.double", "other", [x.slot], [source], ops.double(self.m, x.slot, source))
            run = ops.conv(self.m, source, target, weight, own, 1, 1)
        self.emit(
            name, "conv", [source], [target], run, flops=2 * self.pixels(source) * weight.numel(),
            weights=weight.numel(),
        )  # fmt: skip
        return Activation(target, pending)

    def norm(
        self, layer: nn.GroupNorm, x: Activation, second: Activation | None = None, *, time_bias: Tensor | None = None,
        scale: Tensor | None = None, shift: Tensor | None = None, activation: str | None = "silu",
    ) -> Activation:  # fmt: skip
        """Emit the norm of concat(x, second), complete. Afterwards the slot of `x` holds the sum with its residual.

        An `activation` other than SiLU becomes a separate instruction.
        """
        name = self.names[layer]
        own, height, width = self.shapes[x.slot]
        channels = layer.num_channels
        if x.bias is not None or (second is not None and second.bias is not None):
            assert time_bias is None
            known = x.bias if x.bias is not None else second.bias if second is not None else None
            zeros = torch.zeros(channels, dtype=torch.float64, device=None if known is None else known.device)
            parts = [zeros[:own] if x.bias is None else x.bias]
            if second is not None:
                parts.append(zeros[own:] if second.bias is None else second.bias)
            pending = self.put(f"{name}.pending", torch.cat(parts), self.vector_dtype)
            time_bias = pending.expand(self.batch, -1)
        target = self.new(channels, height, width)
        launches = 1
        if self.m.fused:
            like = torch.empty(self.batch, height, width, own, dtype=self.dtype, device=self.device).permute(0, 3, 1, 2)
            launches = group_norm_silu_launches(like, channels, layer.num_groups)
            self.workspace_numel = max(
                self.workspace_numel, group_norm_silu_workspace(like, channels, layer.num_groups)
            )
        residual = x.residual
        weight = layer.weight if layer.affine else functools.partial(torch.ones, channels)
        bias = layer.bias if layer.affine else functools.partial(torch.zeros, channels)
        fused = activation if activation == "silu" else None
        reads = [x.slot] + [a for a in (None if second is None else second.slot, residual) if a is not None]
        self.emit(
            name, "norm", reads, [target] + ([x.slot] if residual is not None else []),
            ops.norm(
                self.m, x.slot, target, None if second is None else second.slot, residual,
                self.put(f"{name}.weight", weight, self.vector_dtype),
                self.put(f"{name}.bias", bias, self.vector_dtype),
                layer.num_groups, layer.eps, time_bias, scale, shift, fused,
            ),
            kernels=launches,
        )  # fmt: skip
        x.residual = None
        if activation != fused:
            assert activation is not None
            self.emit(f"{name}.{activation}", "other", [target], [target], ops.activate(self.m, target, activation))
        return Activation(target)

    def shortcut(self, layer: nn.Conv2d, x: Activation, skip: Activation | None, h: Activation) -> Activation:
        """Emit a 1x1 convolution of concat(x, skip) that is added to `h` in place, with every pending bias."""
        width = self.shapes[x.slot][0]
        weight = layer.weight.flatten(1)
        bias = self.add(layer.bias, h.bias)
        for part, activation in ((weight[:, :width], x), (weight[:, width:], skip)):
            if activation is not None and activation.bias is not None:
                bias = self.add(bias, self.through(part, activation.bias))
        second = None if skip is None else skip.slot
        return self.pointwise(self.names[layer], x.slot, weight, bias, h.slot, second, h.slot)

    def pointwise(
        self, name: str, source: int, weight: Tensor, bias: Tensor | None, residual: int | None,
        second: int | None = None, target: int | None = None,
    ) -> Activation:  # fmt: skip
        width = self.shapes[source][0]
        if target is None:
            target = self.new(len(weight), *self.shapes[source][1:])
        reads = [slot for slot in (source, second, residual) if slot is not None]
        if self.m.native:
            shape = (*weight.shape, 1)
            packed = self.packed(
                f"{name}.weight", lambda: weight[:, :, None, None], shape, self.shapes[source][1:],
                channels2=weight.shape[1] - width,
            )  # fmt: skip
            own = None if bias is None else self.put(f"{name}.bias", bias, self.vector_dtype)
            self.emit(
                name, "pointwise", reads, [target],
                ops.native_conv(self.m, source, target, packed, own, 1, 0, second, residual),
                flops=2 * self.pixels(target) * weight.numel(), weights=weight.numel(),
            )  # fmt: skip
            return Activation(target)
        first = self.put(f"{name}.first", weight[:, :width])
        other = None if second is None else self.put(f"{name}.second", weight[:, width:])
        own = None if bias is None else self.put(f"{name}.bias", bias, self.vector_dtype)
        self.emit(
            name, "pointwise", reads, [target],
            ops.pointwise(self.m, source, target, first, own, second, other, residual),
            flops=2 * self.pixels(target) * weight.numel(), weights=weight.numel(),
        )  # fmt: skip
        return Activation(target)

    def linear(self, name: str, source: int, weight: Tensor, bias: Tensor | None) -> int:
        """Emit a 1x1 convolution with bias, by the vendor's matrix product or the native one. Return its slot."""
        if self.m.native:
            return self.pointwise(name, source, weight, bias, None).slot
        target = self.new(len(weight), *self.shapes[source][1:])
        own = None if bias is None else self.put(f"{name}.bias", bias)
        self.emit(
            name, "pointwise", [source], [target],
            ops.linear(self.m, source, target, self.put(f"{name}.weight", weight.T), own),
            flops=2 * self.pixels(target) * weight.numel(), weights=weight.numel(),
        )  # fmt: skip
        return target

    def complete(self, x: Activation, name: str, padded: int | None = None) -> None:
        """Emit the pending additions of `x`, in place; also write the result to `padded`, if given."""
        if x.residual is None and x.bias is None and padded is None:
            return
        bias = None
        if x.bias is not None:
            bias = self.put(f"{name}.pending", x.bias, self.vector_dtype)
        reads = [x.slot] + ([] if x.residual is None else [x.residual])
        self.emit(
            name, "residual", reads, [x.slot] + ([] if padded is None else [padded]),
            ops.residual_add(self.m, x.slot, x.residual, bias, padded),
        )  # fmt: skip
        x.residual = x.bias = None

    def divided(self, x: Activation, divisor: float, name: str) -> Activation:
        if divisor == 1:
            return x
        self.complete(x, f"{name}.sum")
        return self.other(f"{name}.output_scale", [x.slot], lambda v: v / divisor)

    def other(
        self, name: str, sources: list[int], function: Callable[..., Tensor], shape: tuple[int, int, int] | None = None
    ) -> Activation:
        """Emit a function in plain torch. Its result has `shape` (C, H, W), or the shape that meta tensors give."""
        if shape is None:
            operands = [torch.empty(1, *self.shapes[slot], device="meta") for slot in sources]
            _, channels, height, width = function(*operands).shape
            shape = (channels, height, width)
        target = self.new(*shape)
        self.loose.add(target)
        self.emit(name, "other", sources, [target], ops.other(self.m, sources, target, function))
        return Activation(target)

    # Bookkeeping.

    def bias_of(
        self, layer: nn.Conv2d, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the bias that the convolution adds (in `dtype`, or convolutions' own) and the one left pending."""
        if bias is None:
            return None, None
        if self.m.fused and not self.m.native:
            return None, bias.double()
        if dtype is None and self.m.native:
            dtype = self.vector_dtype
        return self.put(f"{self.names[layer]}.bias", bias, dtype), None

    def packed(
        self, name: str, weight: Callable[[], Tensor], shape: tuple[int, int, int], size: tuple[int, int],
        stride: int = 1, padding: int = 0, upsample: bool = False, channels2: int = 0,
    ) -> PackedWeight:  # fmt: skip
        """Return the weight of a native convolution, packed for the algorithm that suits an input of `size`.

        The packed weight is kept for every algorithm that some size has used.

        Args:
            shape: (output channels, input channels, kernel size).
            channels2: how many of the input channels come from a second source.
        """
        outputs, inputs, kernel = shape
        algorithm = choose_algorithm(
            self.batch, *size, inputs, outputs, kernel=kernel, stride=stride, padding=padding, upsample=upsample,
            dtype=self.dtype, stored=self.weight_dtype, cached=self.cached,
        )  # fmt: skip
        written = (2 * size[0], 2 * size[1]) if upsample else size
        algorithm = self.affordable(algorithm, written, upsample=upsample)
        if algorithm not in possible_algorithms(upsample, self.dtype):
            algorithm = "direct"
        if self.constants.complete and f"{name}.{algorithm}" not in self.constants.tensors:
            algorithm = next((kind for kind in ALGORITHMS if f"{name}.{kind}" in self.constants.tensors), algorithm)
        kinds = [algorithm]
        if self.constants.refilling:  # nothing will run, so sizes do not matter
            kinds = [kind for kind in ALGORITHMS if f"{name}.{kind}" in self.constants.tensors]
        values = torch.empty(0)  # while weights are refilled that no size has used
        for kind in kinds:
            values = self.constants.put_packed(
                f"{name}.{kind}",
                functools.partial(_packed, weight, kind, upsample, self.dtype, channels2, self.weight_dtype),
            )
        own, tile = [algorithm, *kinds][-1], 0
        if self.compact and own == "direct" and (kernel, stride, padding, upsample) == (3, 1, 1, False):
            tile = likely_tile(self.batch, *size, inputs, outputs, self.dtype)
        weight_ = PackedWeight(values, own, inputs, outputs, kernel, upsample, channels2, tile)
        return replace(weight_, tile=0) if tile and why_not_tile(weight_) else weight_

    def affordable(self, algorithm: str, size: tuple[int, int], *, upsample: bool) -> str:
        """Return the algorithm of a native convolution to images of `size`, or one whose packed weights are smaller."""
        return algorithm

    def done(self, module: nn.Module) -> None:
        """Note that constants hold all weights of a module: where they are to be released, its own go."""
        if self.releasing:
            release(module)
            give_back()

    def _ways_to_double(self, layer: nn.Conv2d, size: tuple[int, int], *weights: str) -> tuple[bool, bool]:
        """Return whether to double an input of `size` and convolve it, and whether to use a transposed convolution.

        Exactly one is True, by the tuned choice. While weights are refilled, each is True whose `weights` exist.
        """
        if self.constants.refilling:
            plain, transposed = (name in self.constants.tensors for name in weights)
            return plain, transposed or not plain
        choice = None
        if self.m.static:
            shape = (self.batch, *size, layer.in_channels, layer.out_channels, int(self.m.allow_tf32))
            choice = tuned.choice("upsample_conv", self.device, self.dtype, shape)
        plain = choice is not None and choice["implementation"] == "plain"
        return plain, not plain

    def put(self, name: str, values: Tensor | Callable[[], Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Store values. Sums of biases are named by what they are of: that differs from plan to plan."""
        terms = self._terms.get(id(values), (name,))
        return self.constants.put(name if terms == (name,) else f"{name}[{'+'.join(terms)}]", values, dtype)

    def add(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        """Return the sum of two biases in float64. Either may be missing."""
        given = [v for v in (a, b) if v is not None]
        if not given:
            return None
        total = sum((v.double() for v in given[1:]), given[0].double())
        return self._named(total, tuple(term for v in given for term in self._terms.get(id(v), ("?",))))

    def through(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the product of a matrix and a bias, in float64."""
        return self._named(
            weight.double() @ bias.double(), tuple(f"*{term}" for term in self._terms.get(id(bias), ("?",)))
        )

    def _named(self, values: Tensor, terms: tuple[str, ...]) -> Tensor:
        self._sums.append(values)
        self._terms[id(values)] = terms
        return values

    def new(self, channels: int, height: int, width: int) -> int:
        self.shapes.append((channels, height, width))
        return len(self.shapes) - 1

    def pixels(self, slot: int) -> int:
        _, height, width = self.shapes[slot]
        return self.batch * height * width

    def emit(
        self, name: str, kind: str, reads: list[int], writes: list[int], run: Callable[[], object], *,
        kernels: int = 1, flops: int = 0, weights: int = 0,
    ) -> None:  # fmt: skip
        elements = sum(self.pixels(slot) * self.shapes[slot][0] for slot in [*reads, *writes]) + weights
        size = self.shapes[writes[0]][1:] if writes else None
        self.instructions.append(
            Instruction(
                name, kind, tuple(reads), tuple(writes), kernels, flops, elements * self.dtype.itemsize, run, size
            )
        )


def _packed(
    weight: Callable[[], Tensor], algorithm: str, upsample: bool, dtype: torch.dtype, channels2: int,
    stored: torch.dtype | None, values: Tensor | None,
) -> Tensor:  # fmt: skip
    return packed_values(weight(), algorithm, upsample, dtype=dtype, channels2=channels2, stored=stored, values=values)
