"""The configuration of a U-Net: the fields of diffusers' UNet2DModel and a few more, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

from fastddpm.common.files import read_json
from fastddpm.networks.unet.plan import (
    K_GROUP_SIZE,
    SKIP_IMAGE_CHANNELS,
    carries_image,
    family_of,
    misfit,
    plan_down,
    uneven_norms,
)

CLASS_NAME = "UNet2DModel"
MOST = 2**24  # upper bound of any integer: more channels, pixels or steps than a machine can hold

# The supported values of fields for which diffusers has more.
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet", "pool"),
    "upsample_type": ("conv", "resnet", "nearest"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}
_BLOCK_CHOICES = {
    "down_block_types": (
        *("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        *("SkipDownBlock2D", "AttnSkipDownBlock2D", "KDownBlock2D"),
    ),
    "up_block_types": (
        *("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        *("SkipUpBlock2D", "AttnSkipUpBlock2D", "KUpBlock2D"),
    ),
}
# Keyed by the name in a config, which may be in upper or lower case.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "mish": "mish", "gelu": "gelu", "relu": "relu"}
# Fields that diffusers does not have, with their defaults. They keep their plain names in a config.json, so that
# diffusers warns that it ignores them; `null_class` does not, because it changes nothing that diffusers computes.
_OWN: dict[str, Any] = {"null_class": None, "timestep_channels": None, "timestep_scale": 1.0}
MOST_LAYERS = 2**8  # of a block: thousands take minutes to make
_POSITIVE = ("in_channels", "out_channels")
_POSITIVE_OR_NONE = (
    "norm_num_groups",
    "time_embedding_dim",
    "attn_norm_num_groups",
    "num_class_embeds",
    "num_train_timesteps",
    "timestep_channels",
)
# Fields that diffusers' EMAModel adds when it saves a model.
_OF_AVERAGING = (
    *("decay", "min_decay", "optimization_step", "update_after_step"),
    *("use_ema_warmup", "inv_gamma", "power"),
)
_Findings = Iterator[tuple[str, bool, str]]
_FLAGS = ("center_input_sample", "flip_sin_to_cos", "add_attention")


@dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' UNet2DModel with its defaults, and fields that other libraries' U-Nets need.

    `block_out_channels` are the widths of the levels, each at half the resolution of the one before. None means:

        time_embedding_dim: 4 * block_out_channels[0].
        attention_head_dim: one head of all channels.
        norm_num_groups (only in a U-Net of Skip or K blocks alone): a quarter of the channels and at most 32.
        attn_norm_num_groups (the mid block's attention): as many as its other norms; with "scale_shift" no norm.
        mid_block_type: no mid block.

    `sample_size` (pixels) does not change the network. `num_train_timesteps` changes it only where the time embedding
    is "learned". diffusers documents the other fields.

    With `time_embedding_type` "fourier" the timesteps are noise levels (Song et al. 2021). The network divides its
    output by them, so a level of 0 gives NaN.

    As in diffusers, the type of a block without attention says how it changes the resolution:
    "ResnetDownsampleBlock2D" and "ResnetUpsampleBlock2D" use a residual block, "DownBlock2D" and "UpBlock2D" a
    convolution. Blocks with attention follow `downsample_type` and `upsample_type`, "resnet" or "conv".

    Beyond diffusers:
        downsample_type "pool", upsample_type "nearest": 2x2 means and repeated pixels, without a convolution, in
            blocks with and without attention.
        attention_head_dim: also a tuple with one entry for every down block, the mid block and every up block.
        timestep_channels: the number of sinusoids of the timestep; None for block_out_channels[0].
        timestep_scale: a factor of the timestep, multiplied in float32 before the sinusoids.
        null_class: the label, one of `num_class_embeds`, that means "no class", for classifier-free guidance. It is
            named `_null_class` in config.json, because diffusers ignores names with an underscore.

    Raises:
        ValueError: a value is wrong, or diffusers supports it and fastddpm does not; the message names each such
            field, its value and what is supported.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (*["AttnUpBlock2D"] * 3, "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | tuple[int, ...] | None = 8
    norm_num_groups: int | None = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    null_class: int | None = None
    timestep_channels: int | None = None
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(value))
        for check in (self._check_types, self._check_blocks, self._check_heads, self._check_fit):
            wrong: dict[str, str] = {}
            for name, valid, what in check():
                if not valid:
                    wrong.setdefault(name, f"{name} is {getattr(self, name)!r}, must be {what}")
            if wrong:  # report all problems of this stage together, so that a file is mended in one go
                raise ValueError("; ".join(wrong.values()))

    @property
    def embedding_channels(self) -> int:
        """The channels of the time (and class) embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def sinusoid_channels(self) -> int:
        """The number of values per timestep that the time embedding reads."""
        if self.time_embedding_type == "fourier":
            return 2 * self.block_out_channels[0]
        return self.timestep_channels or self.block_out_channels[0]

    @property
    def activation(self) -> str:
        """The activation after the norms of residual blocks: "silu", "mish", "gelu" or "relu"."""
        return _ACTIVATIONS[self.act_fn.lower()]

    @property
    def reads_raw_embedding(self) -> bool:
        """Whether some blocks also read the embedding before its activation; those of the K family do."""
        return any(family_of(kind) == "k" for kind in (*self.down_block_types, *self.up_block_types))

    @property
    def smallest_size(self) -> int:
        """The least height and width of an input; both must be multiples of 2 ** (levels - 1)."""
        factor = 2 ** (len(self.block_out_channels) - 1)
        # The filter of K blocks mirrors one pixel at the border, which needs an image of at least two.
        k = any(family_of(kind) == "k" for kind in self.up_block_types[:-1])
        return 2 * factor if k else factor

    @property
    def head_dims(self) -> tuple[int | None, ...]:
        """The channels per attention head in every down block, the mid block and every up block; None: all of them."""
        dims = self.attention_head_dim
        return dims if isinstance(dims, tuple) else (dims,) * (2 * len(self.block_out_channels) + 1)

    @property
    def not_in_diffusers(self) -> list[str]:
        """The fields with values that diffusers' UNet2DModel does not support."""
        names = [name for name, default in _OWN.items() if name != "null_class" and getattr(self, name) != default]
        names += [name for name in ("downsample_type", "upsample_type") if getattr(self, name) in ("pool", "nearest")]
        return names + ["attention_head_dim"] * isinstance(self.attention_head_dim, tuple)

    @property
    def has_classes(self) -> bool:
        """Whether the U-Net takes class labels."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def mid_groups(self) -> int:
        """The number of groups in the norms of the mid block's residual blocks."""
        return self.norm_num_groups or min(self.block_out_channels[-1] // 4, 32)

    @property
    def out_groups(self) -> int:
        """The number of groups in the last norm."""
        return self.norm_num_groups or min(self.block_out_channels[0] // 4, 32)

    @property
    def mid_attention_groups(self) -> int | None:
        """The number of groups in the norm of the mid block's attention; None: it has no norm."""
        if self.attn_norm_num_groups is not None:
            return self.attn_norm_num_groups
        return self.mid_groups if self.resnet_time_scale_shift == "default" else None

    def replace(self, **fields: Any) -> UNetConfig:
        """Return a copy with new values for the named fields.

        Raises:
            ValueError: a field is unknown or its value is not supported; the message names all of them.
        """
        known = [field.name for field in dataclasses.fields(self)]
        unknown = [f"{name} ({value!r})" for name, value in fields.items() if name not in known]
        problems: list[str] = []
        try:
            made = dataclasses.replace(self, **{name: value for name, value in fields.items() if name in known})
        except ValueError as error:
            problems.append(str(error))
        if unknown:
            are = "is no field" if len(unknown) == 1 else "are no fields"
            problems.append(f"{', '.join(unknown)} {are} of a U-Net, which are: {', '.join(known)}")
        if problems:
            raise ValueError("; ".join(problems))
        return made

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> UNetConfig:
        """Build a config from the content of a config.json that diffusers or `to_dict` wrote.

        Raises:
            ValueError: the content is not a UNet2DModel's, or has unknown fields or unsupported values.
        """
        name = config.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise ValueError(f"_class_name is {name!r}, must be {CLASS_NAME!r}")
        fields = {name: v for name, v in config.items() if not name.startswith("_") and name not in _OF_AVERAGING}
        for kinds in _BLOCK_CHOICES:
            if isinstance(fields.get(kinds), (list, tuple)):  # "UNetRes..." in the oldest files
                fields[kinds] = tuple(str(kind).removeprefix("UNetRes") for kind in fields[kinds])
        fields.setdefault("null_class", config.get("_null_class"))
        return cls().replace(**fields)

    @classmethod
    def of_diffusers(cls, config: dict[str, Any]) -> UNetConfig:
        """Build a config from that of a UNet2DModel in memory, and read each value as diffusers does.

        Raises:
            ValueError: as `from_dict`, or blocks with attention would use "pool" or "nearest".
        """
        config = dict(config)
        for name, kinds in (("downsample_type", "down_block_types"), ("upsample_type", "up_block_types")):
            value = config.get(name, "conv")
            attends = any(kind.removeprefix("UNetRes").startswith("Attn") for kind in (config.get(kinds) or ())[:-1])
            if value is None or (value not in ("conv", "resnet") and not attends and name in config):
                config[name] = "conv"  # the value that diffusers uses, or does not look at
            elif value not in ("conv", "resnet"):
                raise ValueError(f"{name} is {value!r}, must be 'conv' or 'resnet': else nothing is resampled there")
        return cls.from_dict(config)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> UNetConfig:
        """Read a config.json.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: as `from_dict`, or the file is not JSON; the message names the file.
        """
        content = read_json(path)
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json.

        Tuples become lists, `_class_name` is added, and the null class is named `_null_class`. Fields that diffusers
        does not have appear only where they differ from the default.
        """
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        for name, default in _OWN.items():
            if fields[name] == default:
                del fields[name]
        if "null_class" in fields:
            fields["_null_class"] = fields.pop("null_class")
        return {"_class_name": CLASS_NAME, **fields}

    # Each check yields (field, whether it is valid, what it may be), and may rely on the checks before it.

    def _check_types(self) -> _Findings:
        for name, choices in _CHOICES.items():
            yield name, getattr(self, name) in choices, "one of " + ", ".join(map(repr, choices))
        act, known = self.act_fn, ", ".join(map(repr, _ACTIVATIONS))
        yield "act_fn", isinstance(act, str) and act.lower() in _ACTIVATIONS, f"one of {known}"
        for name in _FLAGS:
            yield name, isinstance(getattr(self, name), bool), "True or False"
        for name in _POSITIVE:
            yield name, _is_int(getattr(self, name), 1), f"a positive integer up to {MOST}"
        layers = self.layers_per_block
        yield "layers_per_block", _is_int(layers, 1) and layers <= MOST_LAYERS, f"an integer from 1 to {MOST_LAYERS}"
        for name in _POSITIVE_OR_NONE:
            value = getattr(self, name)
            yield name, value is None or _is_int(value, 1), f"a positive integer up to {MOST}, or None"
        size = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,) * 2
        pair = len(size) == 2 and all(_is_int(n, 1) for n in size)
        yield "sample_size", self.sample_size is None or pair, f"a positive integer up to {MOST}, a pair, or None"
        padding, dropout, eps = self.downsample_padding, self.dropout, self.norm_eps
        yield "downsample_padding", _is_int(padding, 0), "0 or 1"
        yield "dropout", _is_number(dropout) and 0 <= dropout < 1, "a number from 0 to below 1"
        yield "norm_eps", _is_number(eps) and eps > 0, "a positive number"
        scale = self.mid_block_scale_factor
        yield "mid_block_scale_factor", _is_number(scale) and scale != 0, "a number other than 0"
        scale = self.timestep_scale
        yield "timestep_scale", _is_number(scale) and 0 < scale < math.inf, "a positive number"
        valid = scale == 1 or self.class_embed_type != "timestep"
        yield "timestep_scale", valid, "1 where class_embed_type is 'timestep': labels are not scaled"
        positional = self.time_embedding_type == "positional"
        of_type = f"where time_embedding_type is {self.time_embedding_type!r}"
        yield "timestep_scale", scale == 1 or positional, f"1 {of_type}"
        yield "timestep_channels", self.timestep_channels is None or positional, f"None {of_type}"
        valid = self.num_train_timesteps is not None or self.time_embedding_type != "learned"
        yield "num_train_timesteps", valid, f"given {of_type}: it has an embedding for each"
        widths = self.block_out_channels
        valid = isinstance(widths, tuple) and len(widths) > 0 and all(_is_int(n, 1) for n in widths)
        yield "block_out_channels", valid, f"a non-empty sequence of positive integers up to {MOST}"

    def _check_blocks(self) -> _Findings:
        widths, groups = self.block_out_channels, self.norm_num_groups
        for name, choices in _BLOCK_CHOICES.items():
            kinds = getattr(self, name)
            valid = isinstance(kinds, tuple) and len(kinds) == len(widths) and set(kinds) <= set(choices)
            names = " or ".join(map(repr, choices))
            yield name, valid, f"a sequence of {names}, as many as block_out_channels ({len(widths)})"
        if groups is not None:
            uneven = [n for n in self._grouped_widths() if n % groups]
            yield "block_out_channels", not uneven, f"multiples of norm_num_groups, {groups}"
        if self.mid_block_type is not None and self.add_attention:
            valid = self.attn_norm_num_groups is None or widths[-1] % self.attn_norm_num_groups == 0
            yield "attn_norm_num_groups", valid, f"None or a divisor of the last width, {widths[-1]}"
        dims, count = self.head_dims, 2 * len(widths) + 1
        valid = len(dims) == count and all(dim is None or _is_int(dim, 1) for dim in dims)
        valid = valid and (self.attention_head_dim is None or None not in dims)
        what = f"a positive integer, None, or {count} positive integers, of the down, mid and up blocks"
        yield "attention_head_dim", valid, what
        half = self.sinusoid_channels // 2
        name = "timestep_channels" if self.timestep_channels is not None else "block_out_channels"
        yield name, half > 0, "at least 2, for a sine and a cosine of the timestep (of block_out_channels the first)"
        valid = half < 1 or (_is_number(self.freq_shift) and self.freq_shift < half)
        yield "freq_shift", valid, f"a number below {half}, the number of frequencies"
        if self.null_class is not None:
            labels = self.num_class_embeds if self.class_embed_type is None else None
            valid = labels is not None and _is_int(self.null_class, 0) and self.null_class < labels
            yield "null_class", valid, f"None or a label below num_class_embeds ({labels})"

    def _grouped_widths(self) -> set[int]:
        """Return the widths whose norms have `norm_num_groups`; ignore block types that are not one per width."""
        widths = self.block_out_channels
        grouped = {widths[0], *([widths[-1]] if self.mid_block_type is not None else [])}
        for kinds, way in ((self.down_block_types, widths), (self.up_block_types, widths[::-1])):
            if isinstance(kinds, tuple) and len(kinds) == len(widths):
                of_plain = [i for i, kind in enumerate(kinds) if family_of(str(kind)) == "plain"]
                grouped |= {way[j] for i in of_plain for j in (max(i - 1, 0), i)}
        return grouped

    def _check_fit(self) -> _Findings:
        """Check that blocks fit together and that norms have groups of equal size.

        diffusers fails only in the first call of the network.
        """
        kinds = (*self.down_block_types, *self.up_block_types)
        families = {family_of(kind) for kind in kinds}
        valid = self.norm_num_groups is not None or "plain" not in families
        yield "norm_num_groups", valid, "a positive integer: only Skip and K blocks choose their groups themselves"
        if not valid:
            return
        padding = self.downsample_padding
        yield "downsample_padding", padding <= 1 or not self._convolves_down(), "0 or 1"
        unfit = misfit(self)
        if unfit is not None:
            yield unfit[0], False, unfit[1]
        for kind, channels, groups in uneven_norms(self):
            of = f"groups of {K_GROUP_SIZE}" if family_of(kind) == "k" else f"{groups} equal groups"
            yield "block_out_channels", False, f"such that {of} divide the {channels} channels in {kind}"
        down, up = carries_image(self)
        yield "in_channels", not down or self.in_channels == SKIP_IMAGE_CHANNELS, "3 with Skip blocks"
        yield "out_channels", not up or self.out_channels == SKIP_IMAGE_CHANNELS, "3 with Skip blocks"
        widths = self.block_out_channels
        ends = [(widths[0], self.out_groups)]
        if self.mid_block_type is not None:
            ends.append((widths[-1], self.mid_groups))
        for width, groups in ends:
            valid = groups > 0 and width % groups == 0
            yield "block_out_channels", valid, f"such that {groups} equal groups divide {width} channels"

    def _convolves_down(self) -> bool:
        return any(block.resample == "conv" for block in plan_down(self))

    def _check_heads(self) -> _Findings:
        """Check that no head is wider than a level with attention; as in diffusers, a width may leave a remainder."""
        widths, dims = self.block_out_channels, self.head_dims
        mid = self.mid_block_type is not None and self.add_attention
        attends = ["Attn" in kind for kind in self.down_block_types] + [mid]
        attends += ["Attn" in kind for kind in self.up_block_types]
        for dim, width, used in zip(dims, (*widths, widths[-1], *widths[::-1]), attends, strict=True):
            valid = dim is None or not used or dim <= width
            yield "attention_head_dim", valid, f"None or at most {width}, a width with attention"


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30
