"""Map the weights of guided-diffusion's and improved-diffusion's networks to our names.

Their modules are numbered in the order of computation, so the meaning of a number depends on the network. One
convolution gives attention's queries, keys and values. Its channels are ordered by head ("legacy": [heads, 3,
channels]) or by kind ("new": [3, heads, channels]).
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
    """The tensor of theirs that one of ours comes from.

    Attributes:
        name: of their tensor.
        shape: of their tensor.
        part: 0, 1 or 2 for the queries, keys or values out of a tensor that holds all three; None: the whole.
        heads: the number of heads of that attention.
    """

    name: str
    shape: tuple[int, ...]
    part: int | None = None
    heads: int = 1


def encoder_names(model: nn.Module) -> dict[str, str]:
    """Return their names for the modules of the way down and the middle, keyed by ours."""
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
    """Return the names in a `UNetModel` for the modules of a `UNet`, keyed by ours."""
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


def sources(model: nn.Module, names: Mapping[str, str], *, along: bool = False) -> dict[str, Source]:
    """Return the source of every tensor of `model`, keyed by our names; `names` maps its modules to theirs.

    `along`: their convolutions are of sequences, [out, in, size] where ours are [out, in, 1, size].
    """
    result = {}
    for key, tensor in model.state_dict().items():
        ours = next(name for name in _prefixes(key) if name in names)
        module, (inner, kind) = model.get_submodule(ours), _split(key.removeprefix(f"{ours}."))
        shape, name = tuple(tensor.shape), names[ours]
        if along and len(shape) == 4:
            shape = (*shape[:2], shape[3])
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
        elif inner in ("qkv_proj", "c_proj") and kind == "weight":  # the classifier's attention
            shape = (*shape, 1)
        result[key] = Source(".".join(filter(None, (name, inner, kind))), shape)
    return result


def converted(
    state: Mapping[str, Tensor], found: Mapping[str, Source], *, new_order: bool, dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:  # fmt: skip
    """Return our state dict, made of copies; `new_order`: queries, keys and values are ordered by kind, not by head."""

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
    """Raise ValueError unless `state` has exactly the expected tensors, in their shapes.

    Args:
        where: the beginning of the message.
        flags: {flag: (given value, value that the weights show)}, where the two differ.
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
    """Return the flags that the weights of a `UNetModel` contradict: {flag: (given value, value the weights show)}.

    The weights do not show the heads, the order of attention or the diffusion.
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
    kinds = {"conv.weight": False, "in_layers.0.weight": True}  # upsampling layers: whether a residual block
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
    """Return the names of the modules around a tensor, the innermost first."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _split(name: str) -> tuple[str, str]:
    """Split a name at its last dot: "conv1.weight" gives ("conv1", "weight"), "weight" gives ("", "weight")."""
    inner, _, kind = name.rpartition(".")
    return inner, kind
