"""The plan of every block of a U-Net, by its type: widths, groups, attention, and how it changes the resolution.

Blocks are of three families. Plain ones have `norm_num_groups` groups. "Skip" blocks are those of NCSN++ (Song et
al. 2021, arXiv:2011.13456): groups of about four channels, sums divided by sqrt(2), resampling through a FIR filter,
and a second path that carries the image itself from level to level. "K" blocks are those of k-diffusion's U-Net
(Karras et al. 2022, arXiv:2206.00364): groups of 32 channels, norms scaled and shifted by the time embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastddpm.networks.unet.config import UNetConfig

K_GROUP_SIZE = 32
SKIP_ATTENTION_GROUPS = 32
SKIP_IMAGE_CHANNELS = 3  # channels of the second path of Skip blocks


@dataclass(frozen=True)
class ResnetPlan:
    """The widths of a residual block and the groups of its two norms."""

    in_channels: int
    out_channels: int
    groups: int
    groups_out: int


@dataclass(frozen=True)
class BlockPlan:
    """The plan of one block on the way down or up.

    Attributes:
        family: "plain", "skip" or "k".
        channels: its width.
        resnets: its residual blocks, in order.
        attentions: how many of them, counted from the last, have attention after them.
        attention_groups: groups of the attention's norm.
        head_dim: channels per attention head; None for all of them.
        resample: "conv", "resnet", "plain" (means or repeated pixels), "fir" or "k"; None keeps the resolution.
    """

    family: str
    channels: int
    resnets: tuple[ResnetPlan, ...]
    attentions: int
    attention_groups: int
    head_dim: int | None
    resample: str | None


def family_of(kind: str) -> str:
    """Return the family of a type of block."""
    if kind.startswith("K"):
        return "k"
    return "skip" if "Skip" in kind else "plain"


def plan_down(c: UNetConfig) -> list[BlockPlan]:
    """Return the blocks on the way down, in order."""
    plans, before = [], c.block_out_channels[0]
    for i, (out, kind) in enumerate(zip(c.block_out_channels, c.down_block_types, strict=True)):
        ins = [before] + [out] * (c.layers_per_block - 1)
        family, last = family_of(kind), i == len(c.block_out_channels) - 1
        plans.append(
            BlockPlan(
                family, out,
                tuple(ResnetPlan(n, out, _groups(c, family, n), _groups(c, family, out)) for n in ins),
                len(ins) if "Attn" in kind else 0,
                SKIP_ATTENTION_GROUPS if family == "skip" else _groups(c, family, out),
                c.head_dims[i],
                None if last else _resample(kind, family, c.downsample_type),
            )
        )  # fmt: skip
        before = out
    return plans


def plan_up(c: UNetConfig) -> list[BlockPlan]:
    """Return the blocks on the way up, in order."""
    plans, widths, layers = [], c.block_out_channels[::-1], c.layers_per_block
    for i, (out, kind) in enumerate(zip(widths, c.up_block_types, strict=True)):
        below, above = widths[max(i - 1, 0)], widths[min(i + 1, len(widths) - 1)]
        family, last = family_of(kind), i == len(widths) - 1
        resnets = []
        if family == "k":
            for j in range(layers):
                n, to = 2 * out if j == 0 else out, above if j == layers - 1 else out
                resnets.append(ResnetPlan(n, to, n // K_GROUP_SIZE, out // K_GROUP_SIZE))
        else:
            for j in range(layers + 1):
                own, skip = below if j == 0 else out, above if j == layers else out
                groups = _groups(c, family, own + skip)
                if kind == "AttnSkipUpBlock2D":  # as in diffusers
                    groups = min(own + skip // 4, 32)
                resnets.append(ResnetPlan(own + skip, out, groups, _groups(c, family, out)))
        attentions = 0
        if "Attn" in kind:  # a Skip block has one attention, after its last residual block
            attentions = 1 if family == "skip" else len(resnets)
        plans.append(
            BlockPlan(
                family, out, tuple(resnets), attentions,
                SKIP_ATTENTION_GROUPS if family == "skip" else _groups(c, family, out),
                c.head_dims[len(widths) + 1 + i],
                None if last else _resample(kind, family, c.upsample_type),
            )
        )  # fmt: skip
    return plans


def uneven_norms(c: UNetConfig) -> Iterator[tuple[str, int, int]]:
    """Find norms whose groups do not divide their channels.

    Yields:
        The block's type, the channels and the groups; 0 groups where the channels are too few for one.
    """
    kinds = [*c.down_block_types, *c.up_block_types]
    for kind, block in zip(kinds, plan_down(c) + plan_up(c), strict=True):
        norms = [(r.in_channels, r.groups) for r in block.resnets]
        norms += [(r.out_channels, r.groups_out) for r in block.resnets]
        if block.attentions:
            norms.append((block.channels, block.attention_groups))
        if block.resample in ("fir", "resnet"):
            norms.append((block.channels, _groups(c, block.family, block.channels)))
        for channels, groups in norms:
            if groups < 1 or channels % groups:
                yield kind, channels, groups


def misfit(c: UNetConfig) -> tuple[str, str] | None:
    """Return the field whose block types do not fit together, and what they must be; None if all fit.

    It follows the widths and resolutions of the states, of the skips that the way down leaves for the way up, and of
    the image that Skip blocks carry.
    """
    x, image = (c.block_out_channels[0], 0), 0  # x is (channels, how often halved); image only the latter
    left = [x]
    for i, block in enumerate(plan_down(c)):
        for resnet in block.resnets:
            x = (resnet.out_channels, x[1])
            left.append(x)
        if block.resample is None:
            continue
        if block.family == "skip":
            if image != x[1]:
                return "down_block_types", f"such that no other block comes before a Skip one, number {i}"
            image += 1
        x = (x[0], x[1] + 1)
        if block.family != "k":
            left.append(x)
    carried: int | None = None
    for i, block in enumerate(plan_up(c)):
        if len(left) < len(block.resnets):
            return "up_block_types", f"such that number {i} finds {len(block.resnets)} states left by the way down"
        for j, resnet in enumerate(block.resnets):
            skip = left.pop()
            if block.family == "k" and j > 0:
                if x[0] != resnet.in_channels:
                    return _unfit(i, x[0], resnet.in_channels)
            elif skip[1] != x[1]:
                return "up_block_types", f"such that number {i} finds states of its own resolution left by the way down"
            elif x[0] + skip[0] != resnet.in_channels:
                return _unfit(i, x[0] + skip[0], resnet.in_channels)
            x = (resnet.out_channels, x[1])
        if block.family == "skip":
            carried = None if carried is None else carried - 1
            if block.resample is not None:
                if carried not in (None, x[1]):
                    return "up_block_types", f"such that no other block stands between Skip ones, before number {i}"
                carried = x[1]
        if block.resample is not None:
            x = (x[0], x[1] - 1)
    if carried not in (None, 0):
        return "up_block_types", "such that no other block follows a Skip one"
    if x[0] != c.block_out_channels[0]:
        return "up_block_types", f"such that the last gives {c.block_out_channels[0]} channels"
    return None


def carries_image(c: UNetConfig) -> tuple[bool, bool]:
    """Return whether Skip blocks carry the image on the way down, and on the way up."""
    down, up = (any(b.family == "skip" and b.resample is not None for b in way) for way in (plan_down(c), plan_up(c)))
    return down, up


def _unfit(i: int, found: int, wanted: int) -> tuple[str, str]:
    return "up_block_types", f"such that number {i}, which reads {wanted} channels, does not find {found}"


def _resample(kind: str, family: str, by: str) -> str:
    """Return how a block of that type changes the resolution; `by` is `downsample_type` or `upsample_type`."""
    if family != "plain":
        return {"skip": "fir", "k": "k"}[family]
    if kind.startswith("Resnet") or (kind.startswith("Attn") and by == "resnet"):
        return "resnet"
    return "plain" if by in ("pool", "nearest") else "conv"


def _groups(c: UNetConfig, family: str, channels: int) -> int:
    if family == "k":
        return channels // K_GROUP_SIZE
    if family == "plain" and c.norm_num_groups is not None:
        return c.norm_num_groups
    return min(channels // 4, 32)
