"""What a U-Net is made of: the fields of diffusers' UNet2DModel, checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from os import PathLike
from typing import Any

from fastddpm._files import read_json

CLASS_NAME = "UNet2DModel"

# The values of a field that are supported, where diffusers knows more.
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}
_BLOCK_CHOICES = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}
_POSITIVE = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
_POSITIVE_OR_NONE = (
    "time_embedding_dim",
    "attention_head_dim",
    "attn_norm_num_groups",
    "num_class_embeds",
    "num_train_timesteps",
)
_FLAGS = ("center_input_sample", "flip_sin_to_cos", "add_attention")


@dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' UNet2DModel with its defaults, and `null_class`.

    `block_out_channels` are the widths of the levels, each at half the resolution of the one before. What
    None means: `time_embedding_dim`, 4 * block_out_channels[0]; `attention_head_dim`, one head of all
    channels; `attn_norm_num_groups` (of the mid block's attention), `norm_num_groups`, or with "scale_shift"
    no norm; `mid_block_type`, no mid block. `sample_size` (pixels) and `num_train_timesteps` do not change
    the network. diffusers documents the other fields.

    `null_class` is the label, one of `num_class_embeds`, that means "no class", for classifier-free guidance.
    In config.json it is `_null_class`, since diffusers ignores names with an underscore.

    Raises:
        ValueError: a value that is wrong, or that diffusers has and fastddpm does not; the message names the
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
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    null_class: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(value))
        self._check_types()
        self._check_blocks()
        self._check_embeddings()

    @property
    def embedding_channels(self) -> int:
        """Channels of the time (and class) embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def has_classes(self) -> bool:
        """Whether the U-Net takes class labels."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def mid_attention_groups(self) -> int | None:
        """Groups of the norm of the mid block's attention; None: it has no norm."""
        if self.attn_norm_num_groups is not None:
            return self.attn_norm_num_groups
        return self.norm_num_groups if self.resnet_time_scale_shift == "default" else None

    def replace(self, **fields: Any) -> UNetConfig:
        """A copy with other values of the named fields.

        Raises:
            ValueError: an unknown field or an unsupported value.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name, value in fields.items():
            if name not in known:
                raise ValueError(f"{name} ({value!r}) is no field of a U-Net, which are: {', '.join(known)}")
        return dataclasses.replace(self, **fields)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> UNetConfig:
        """From the content of a config.json that diffusers, or `to_dict`, wrote.

        Raises:
            ValueError: it is not a UNet2DModel's, has an unknown field or an unsupported value.
        """
        name = config.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise ValueError(f"_class_name is {name!r}, must be {CLASS_NAME!r}")
        fields = {name: value for name, value in config.items() if not name.startswith("_")}
        for kinds in _BLOCK_CHOICES:
            if isinstance(fields.get(kinds), (list, tuple)):  # "UNetRes..." in the oldest files
                fields[kinds] = tuple(str(kind).removeprefix("UNetRes") for kind in fields[kinds])
        fields.setdefault("null_class", config.get("_null_class"))
        return cls().replace(**fields)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> UNetConfig:
        """From a config.json.

        Raises:
            FileNotFoundError: there is none.
            ValueError: as `from_dict`, or not JSON; the message names the file.
        """
        content = read_json(path)
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json: lists for tuples, `_class_name`, and `_null_class` if there is one."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        null_class = fields.pop("null_class")
        return {
            "_class_name": CLASS_NAME,
            **fields,
            **({} if null_class is None else {"_null_class": null_class}),
        }

    def _check_types(self) -> None:
        require = self._require
        for name, choices in _CHOICES.items():
            require(name, getattr(self, name) in choices, "one of " + ", ".join(map(repr, choices)))
        for name in _FLAGS:
            require(name, isinstance(getattr(self, name), bool), "True or False")
        for name in _POSITIVE:
            require(name, _is_int(getattr(self, name), 1), "a positive integer")
        for name in _POSITIVE_OR_NONE:
            value = getattr(self, name)
            require(name, value is None or _is_int(value, 1), "a positive integer or None")
        size = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,) * 2
        pair = len(size) == 2 and all(_is_int(n, 1) for n in size)
        require("sample_size", self.sample_size is None or pair, "a positive integer, a pair, or None")
        padding, dropout, eps = self.downsample_padding, self.dropout, self.norm_eps
        require("downsample_padding", _is_int(padding, 0) and padding <= 1, "0 or 1")
        require("dropout", _is_number(dropout) and 0 <= dropout < 1, "a number from 0 to below 1")
        require("norm_eps", _is_number(eps) and eps > 0, "a positive number")
        scale = self.mid_block_scale_factor
        require("mid_block_scale_factor", _is_number(scale) and scale != 0, "a number other than 0")

    def _check_blocks(self) -> None:
        require, widths, groups = self._require, self.block_out_channels, self.norm_num_groups
        valid = isinstance(widths, tuple) and len(widths) > 0 and all(_is_int(n, 1) for n in widths)
        require("block_out_channels", valid, "a non-empty sequence of positive integers")
        valid = all(n % groups == 0 for n in widths)
        require("block_out_channels", valid, f"multiples of norm_num_groups, {groups}")
        for name, choices in _BLOCK_CHOICES.items():
            kinds = getattr(self, name)
            valid = isinstance(kinds, tuple) and len(kinds) == len(widths) and set(kinds) <= set(choices)
            names = " or ".join(map(repr, choices))
            require(name, valid, f"a sequence of {names}, as many as block_out_channels ({len(widths)})")
        attentive = {n for n, kind in zip(widths, self.down_block_types, strict=True) if "Attn" in kind}
        attentive |= {n for n, kind in zip(widths[::-1], self.up_block_types, strict=True) if "Attn" in kind}
        if self.mid_block_type is not None and self.add_attention:
            attentive.add(widths[-1])
            valid = self.attn_norm_num_groups is None or widths[-1] % self.attn_norm_num_groups == 0
            require("attn_norm_num_groups", valid, f"None or a divisor of the last width, {widths[-1]}")
        if attentive and self.attention_head_dim is not None:
            valid = self.attention_head_dim <= min(attentive)
            require("attention_head_dim", valid, f"None or at most {min(attentive)}, a width with attention")

    def _check_embeddings(self) -> None:
        half = self.block_out_channels[0] // 2
        valid = _is_number(self.freq_shift) and self.freq_shift < half
        self._require("freq_shift", valid, f"a number below {half}, half the first width")
        if self.null_class is not None:
            labels = self.num_class_embeds if self.class_embed_type is None else None
            valid = labels is not None and _is_int(self.null_class, 0) and self.null_class < labels
            self._require("null_class", valid, f"None or a label below num_class_embeds ({labels})")

    def _require(self, name: str, valid: bool, what: str) -> None:
        if not valid:
            raise ValueError(f"{name} is {getattr(self, name)!r}, must be {what}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
