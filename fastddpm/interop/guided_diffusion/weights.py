"""The weights of guided-diffusion's and improved-diffusion's networks, by their names and by ours.

Their modules are numbered in the order of computation; what a number means follows from the network. Attention's
queries, keys and values are one convolution there, whose channels stand by head ("legacy": [heads, 3, channels]) or by
kind ("new": [3, heads, channels]).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastddpm.common.checks import listed
from fastddpm.interop.guided_diffusion.flags import Flags
from fastddpm.networks.unet.layers import Attention, Downsample, ResnetBlock

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
_PARTS = {"to_q": 0, "to_k": 1, "to_v": 2}


class Source(NamedTuple):
    """Where a tensor of ours comes from.

    Attributes:
        name: of theirs.
        shape: of theirs.
        part: which of queries, keys and values (0, 1, 2) it is of one that holds all three; None: the whole.
        heads: of that attention.
    """

    name: str
    shape: tuple[int, ...]
    part: int | None = None
    heads: int = 1


def encoder_names(model: nn.Module) -> dict[str, str]:
    """What the modules of the way down and the middle are called there, by our names."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    number = 1
    for level, block in enumerate(model.get_submodule("down_blocks").children()):
        ours = f"down_blocks.{level}"
        for index in range(len(block.get_submodule("resnets"))):  # type: ignore[arg-type]
            names[f"{ours}.resnets.{index}"] = f"input_blocks.{number}.0"
            names[f"{ours}.attentions.{index}"] = f"input_blocks.{number}.1"
            number += 1
        names[f"{ours}.downsamplers.0"] = f"input_blocks.{number}.0"
        number += 1
    return names


def unet_names(unet: nn.Module) -> dict[str, str]:
    """What the modules of a `UNet` are called in a `UNetModel`, by our names."""
    names = encoder_names(unet) | {"class_embedding": "label_emb", "conv_norm_out": "out.0", "conv_out": "out.2"}
    number = 0
    for level, block in enumerate(unet.get_submodule("up_blocks").children()):
        ours, attends = f"up_blocks.{level}", len(block.get_submodule("attentions")) > 0  # type: ignore[arg-type]
        for index in range(len(block.get_submodule("resnets"))):  # type: ignore[arg-type]
            names[f"{ours}.resnets.{index}"] = f"output_blocks.{number}.0"
            names[f"{ours}.attentions.{index}"] = f"output_blocks.{number}.1"
            number += 1
        names[f"{ours}.upsamplers.0"] = f"output_blocks.{number - 1}.{1 + attends}"
    return names


def sources(model: nn.Module, names: Mapping[str, str]) -> dict[str, Source]:
    """Where every tensor of `model` comes from, by our names; `names` are those of its modules."""
    result = {}
    for key, tensor in model.state_dict().items():
        ours = next(name for name in _prefixes(key) if name in names)
        module, (inner, kind) = model.get_submodule(ours), _split(key.removeprefix(f"{ours}."))
        shape, name = tuple(tensor.shape), names[ours]
        if isinstance(module, Attention):
            if inner in _PARTS:
                shape = (3 * shape[0], *shape[1:])
            if kind == "weight" and inner != "group_norm":  # a one-dimensional convolution
                shape = (*shape, 1)
            name = f"{name}.{_ATTENTION[inner]}"
            result[key] = Source(f"{name}.{kind}", shape, _PARTS.get(inner), module.heads)
            continue
        if isinstance(module, ResnetBlock):
            inner = _RESNET[inner]
        elif isinstance(module, Downsample):
            inner = "op"
        elif inner in ("qkv_proj", "c_proj") and kind == "weight":  # of the classifier's attention
            shape = (*shape, 1)
        result[key] = Source(".".join(filter(None, (name, inner, kind))), shape)
    return result


def converted(
    state: Mapping[str, Tensor], found: Mapping[str, Source], *, new_order: bool, dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:  # fmt: skip
    """Our state dict, of copies. `new_order`: whether queries, keys and values stand by kind, not by head."""

    def ours(source: Source) -> Tensor:
        tensor = state[source.name]
        if tensor.ndim == 3:
            tensor = tensor.squeeze(2)
        if source.part is None:
            return tensor
        order = (3, source.heads) if new_order else (source.heads, 3)
        return tensor.unflatten(0, (*order, -1)).select(0 if new_order else 1, source.part).flatten(0, 1)

    return {name: ours(source).to(device, dtype, copy=True).contiguous() for name, source in found.items()}


def check(
    where: str, state: Mapping[str, Tensor], found: Mapping[str, Source], flags: Mapping[str, tuple[object, object]]
) -> None:
    """Raises ValueError unless `state` has the tensors named, in their shapes, and no others.

    Args:
        where: what the message begins with.
        flags: what the weights tell of flags that were given otherwise: (given, theirs).
    """
    expected = {source.name: source.shape for source in found.values()}
    shared = expected.keys() & state.keys()
    shapes = {
        f"{name} {list(state[name].shape)} in place of {list(expected[name])}"
        for name in shared
        if tuple(state[name].shape) != expected[name]
    }
    wrong = {"missing": expected.keys() - shared, "unexpected": state.keys() - shared, "of another shape": shapes}
    problems = [f"{what}: {listed(names)}" for what, names in wrong.items() if names]
    if not problems:
        return
    hint = ", ".join(f"{name}={theirs!r} (not {given!r})" for name, (given, theirs) in flags.items())
    advice = f"; the weights are those of {hint}" if hint else ""
    raise ValueError(f"{where} does not fit its flags{advice}; {'; '.join(problems)}")


def told_by_weights(state: Mapping[str, Tensor], flags: Flags) -> dict[str, tuple[object, object]]:
    """Flags that the weights of a `UNetModel` contradict: (given, what the weights tell).

    Heads, the order of attention and the diffusion cannot be told.
    """
    told: dict[str, tuple[object, object]] = {}

    def tell(name: str, given: object, theirs: object) -> None:
        if theirs != given:
            told[name] = given, theirs

    def rows(name: str) -> int:
        return len(state[name]) if name in state and state[name].ndim else 0

    if (first := state.get("time_embed.0.weight")) is None or first.ndim != 2:
        return told
    channels = first.shape[1]
    tell("num_channels", flags.num_channels, channels)
    tell("class_cond", flags.class_cond, "label_emb.weight" in state)
    if (reads := state.get("input_blocks.0.0.weight")) is not None and reads.ndim > 1:
        tell("in_channels", flags.in_channels, reads.shape[1] // (1 if flags.small_size is None else 2))
        tell("learn_sigma", flags.learn_sigma, rows("out.2.bias") == 2 * flags.in_channels)
    if convolved := rows("input_blocks.1.0.in_layers.2.bias"):
        film = rows("input_blocks.1.0.emb_layers.1.bias") == 2 * convolved
        tell("use_scale_shift_norm", flags.use_scale_shift_norm, film)
    blocks = sum(f"output_blocks.{number}.0.in_layers.0.weight" in state for number in range(len(state)))
    kinds = {"conv.weight": False, "in_layers.0.weight": True}  # what upsamples, and whether it is a residual block
    ups = [
        (number, by_resnet)
        for number in range(blocks)
        for kind, by_resnet in kinds.items()
        if any(f"output_blocks.{number}.{place}.{kind}" in state for place in (1, 2))
    ]
    if not ups:
        return told
    layers, by_resnet = ups[0]
    tell("num_res_blocks", flags.num_res_blocks, layers)
    tell("resblock_updown", flags.resblock_updown, by_resnet)
    if blocks != (len(ups) + 1) * (layers + 1):
        return told
    levels = range(len(ups), -1, -1)
    widths = [rows(f"output_blocks.{level * (layers + 1)}.0.out_layers.3.bias") for level in levels]
    tell("channel_mult", _text(flags.channel_mult), _text([width / channels for width in widths]))
    attends = {
        level for level, block in enumerate(levels) if f"output_blocks.{block * (layers + 1)}.1.qkv.weight" in state
    }
    if attends != flags.attention_levels:
        theirs = ",".join(str(flags.image_size // 2**level) for level in sorted(attends))
        tell("attention_resolutions", ",".join(map(str, flags.attention_resolutions)), theirs)
    return told


def _text(multiples: object) -> str:
    return ",".join(f"{multiple:g}" for multiple in multiples)  # type: ignore[attr-defined]


def _prefixes(key: str) -> list[str]:
    """The names of the modules around a tensor, the innermost first."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _split(name: str) -> tuple[str, str]:
    """("conv1", "weight") of "conv1.weight", ("", "weight") of "weight"."""
    inner, _, kind = name.rpartition(".")
    return inner, kind
