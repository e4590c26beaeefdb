"""Read the flags of guided-diffusion's and improved-diffusion's command lines into U-Nets and schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastddpm.networks.unet.config import UNetConfig
from fastddpm.process.schedule import NoiseSchedule

GROUPS = 32  # of every norm

_DIFFUSION: dict[str, Any] = {
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}
_MODEL: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
}
# Arguments of UNetModel that no flag of the libraries sets.
_ARGUMENTS: dict[str, Any] = {"conv_resample": True, "in_channels": 3, "dims": 2}
# The flags of each library with their defaults, as its `model_and_diffusion_defaults()` has them.
FLAGS: dict[str, dict[str, Any]] = {
    "guided_diffusion": {
        **_MODEL,
        "num_head_channels": -1,
        "channel_mult": "",
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
        **_DIFFUSION,
        **_ARGUMENTS,
    },
    "improved_diffusion": {
        **_MODEL,
        "sigma_small": False,
        **_DIFFUSION,
        "rescale_timesteps": True,
        "rescale_learned_sigmas": True,
        **_ARGUMENTS,
    },
}
# guided-diffusion's `sr_model_and_diffusion_defaults()`, and the widths, which follow from the size alone there.
UPSAMPLER_FLAGS: dict[str, Any] = {
    "large_size": 256,
    "small_size": 64,
    **{
        name: default
        for name, default in FLAGS["guided_diffusion"].items()
        if name not in ("image_size", "use_new_attention_order")
    },
}
# guided-diffusion's `classifier_and_diffusion_defaults()`.
CLASSIFIER_FLAGS: dict[str, Any] = {
    "image_size": 64,
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
    **_DIFFUSION,
}
UPSAMPLER = "an upsampler of guided_diffusion"
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
# The widths of the levels in multiples of `num_channels`, by library and image size, where no flag gives them.
_MULTIPLIERS: dict[str, dict[int, tuple[float, ...]]] = {
    "guided_diffusion": {
        512: (0.5, 1, 1, 2, 2, 4, 4),
        256: (1, 1, 2, 2, 4, 4),
        128: (1, 1, 2, 3, 4),
        64: (1, 2, 3, 4),
    },
    UPSAMPLER: {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)},
    "improved_diffusion": {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)},
}
_POSITIVE_OR_NOT_SET = ("num_heads_upsample", "num_head_channels")


@dataclass(frozen=True)
class Flags:
    """The flags of either library as values; a flag that a library lacks has the value that the library implies.

    Attributes:
        library: "guided_diffusion" or "improved_diffusion".
        small_size: of the small images that an upsampler reads; None for other models.
        channel_mult: the widths of the levels in multiples of `num_channels`.
        attention_resolutions: pixels.
        Other attributes: as on the command line.
    """

    library: str
    image_size: int
    num_channels: int
    num_res_blocks: int
    channel_mult: tuple[float, ...]
    attention_resolutions: tuple[int, ...]
    num_heads: int = 1
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    dropout: float = 0.0
    class_cond: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    conv_resample: bool = True
    learn_sigma: bool = False
    sigma_small: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    timestep_respacing: str = ""
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    in_channels: int = 3
    dims: int = 2
    small_size: int | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of every level."""
        return tuple(int(multiple * self.num_channels) for multiple in self.channel_mult)

    @property
    def attention_levels(self) -> set[int]:
        """The levels with attention: those that reduce the image as much as one of the resolutions does."""
        reductions = {self.image_size // resolution for resolution in self.attention_resolutions}
        return {level for level in range(len(self.channel_mult)) if 2**level in reductions}

    @property
    def timestep_scale(self) -> float:
        """The factor of the network's timesteps."""
        return 1000.0 / self.diffusion_steps if self.rescale_timesteps else 1.0


def model_flags(library: str, given: Mapping[str, Any]) -> Flags:
    """Parse the flags of a model and its diffusion, given as numbers and booleans or as text of a command line.

    Flags of guided-diffusion describe an upsampler if `large_size` or `small_size` is among them.

    Raises:
        TypeError: the library does not have some of the flags; the message names all of them.
        ValueError: the library is not known, or a flag has a wrong value.
    """
    if library not in FLAGS:
        raise ValueError(f"library is {library!r}, must be one of {', '.join(FLAGS)}")
    upsamples = library == "guided_diffusion" and not given.keys().isdisjoint(("large_size", "small_size"))
    of, size_name = (UPSAMPLER, "large_size") if upsamples else (library, "image_size")
    values = _parsed(given, UPSAMPLER_FLAGS if upsamples else FLAGS[library], of)
    if values["dims"] not in (1, 2):
        raise ValueError(f"dims is {values['dims']}, must be 1, for sequences, or 2, for images")
    if values["dims"] == 1 and upsamples:
        raise ValueError("dims is 1 but large_size is given, must be 2: an upsampler enlarges images")
    own = {name: value for name, value in values.items() if name in Flags.__dataclass_fields__}
    own["attention_resolutions"] = _numbers("attention_resolutions", values["attention_resolutions"])
    own["image_size"] = values[size_name]
    own["channel_mult"] = _multipliers(of, size_name, values[size_name], values.get("channel_mult", ""))
    return Flags(library=library, **own)


def classifier_flags(given: Mapping[str, Any]) -> tuple[Flags, str]:
    """Parse the flags of a classifier of guided-diffusion into those of its encoder, and its pool.

    Raises:
        TypeError, ValueError: as `model_flags`.
    """
    library = "guided_diffusion"
    values = _parsed(given, CLASSIFIER_FLAGS, "a classifier of guided_diffusion")
    pool = values["classifier_pool"]
    if pool not in POOLS:
        raise ValueError(f"classifier_pool is {pool!r}, must be one of {', '.join(POOLS)}")
    resolutions = _numbers("classifier_attention_resolutions", values["classifier_attention_resolutions"])
    return Flags(
        library=library,
        image_size=values["image_size"],
        num_channels=values["classifier_width"],
        num_res_blocks=values["classifier_depth"],
        channel_mult=_multipliers(library, "image_size", values["image_size"], ""),
        attention_resolutions=resolutions,
        num_head_channels=64,
        use_scale_shift_norm=values["classifier_use_scale_shift_norm"],
        resblock_updown=values["classifier_resblock_updown"],
        diffusion_steps=values["diffusion_steps"],
        rescale_timesteps=values["rescale_timesteps"],
    ), pool


def unet_config(flags: Flags, num_classes: int | None = None, *, channels_name: str = "num_channels") -> UNetConfig:
    """Return the U-Net that the flags mean.

    Args:
        flags: as parsed.
        num_classes: of a class-conditional model.
        channels_name: the name of the flag of the base width, for messages.

    Raises:
        ValueError: a width does not divide into groups or heads; the message names the flag.
    """
    widths, attends = flags.widths, flags.attention_levels
    if any(width % GROUPS or not width for width in widths):
        raise ValueError(
            f"{channels_name} is {flags.num_channels}, must make the widths of all levels multiples of {GROUPS}, "
            f"which are {', '.join(map(str, widths))}"
        )
    down = [_kind("Down", "Downsample", level in attends, flags) for level in range(len(widths))]
    up = [_kind("Up", "Upsample", level in attends, flags) for level in range(len(widths))]
    resampling = "resnet" if flags.resblock_updown else "conv" if flags.conv_resample else None
    own_channels = widths[0] == flags.num_channels
    return UNetConfig(
        sample_size=flags.image_size,
        in_channels=flags.in_channels * (1 if flags.small_size is None else 2),
        out_channels=flags.in_channels * (2 if flags.learn_sigma else 1),
        block_out_channels=widths,
        layers_per_block=flags.num_res_blocks,
        down_block_types=tuple(down),
        up_block_types=tuple(reversed(up)),
        downsample_type=resampling or "pool",
        upsample_type=resampling or "nearest",
        dropout=flags.dropout,
        attention_head_dim=_head_dims(flags),
        norm_num_groups=GROUPS,
        attn_norm_num_groups=GROUPS,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if flags.use_scale_shift_norm else "default",
        num_class_embeds=num_classes,
        time_embedding_dim=None if own_channels else 4 * flags.num_channels,
        timestep_channels=None if own_channels else flags.num_channels,
        timestep_scale=flags.timestep_scale,
    )


def noise_schedule(flags: Flags) -> NoiseSchedule:
    """Return the schedule that `get_named_beta_schedule` makes.

    It is "linear", scaled to the number of steps, or "cosine" (Nichol & Dhariwal 2021, eq. 17).

    Raises:
        ValueError: the flag has another name, or there are too few steps for linear betas below 1.
    """
    steps, name = flags.diffusion_steps, flags.noise_schedule
    if name == "cosine":
        return NoiseSchedule.cosine(steps)
    if name != "linear":
        raise ValueError(f"noise_schedule is {name!r}, must be 'linear' or 'cosine'")
    if steps <= 20:
        raise ValueError(
            f"diffusion_steps is {steps}, must be above 20 for noise_schedule 'linear', whose last beta is 20 / it"
        )
    scale = 1000 / steps
    return NoiseSchedule.linear(steps, scale * 1e-4, scale * 0.02)


def _kind(plain: str, by_resnet: str, attends: bool, flags: Flags) -> str:
    if attends:
        return f"Attn{plain}Block2D"
    return f"Resnet{by_resnet}Block2D" if flags.resblock_updown else f"{plain}Block2D"


def _head_dims(flags: Flags) -> int | tuple[int, ...] | None:
    """Return the channels per head: one number, as in diffusers, if all attention agrees, else one for every block."""
    own = ("num_heads", flags.num_heads)
    upper = own if flags.num_heads_upsample == -1 else ("num_heads_upsample", flags.num_heads_upsample)
    levels = list(enumerate(flags.widths))
    attends = flags.attention_levels
    # (width, whether there is attention, number of heads) of the down blocks, the mid block and the up blocks.
    blocks = [(width, level in attends, own) for level, width in levels]
    blocks += [(flags.widths[-1], True, own)]
    blocks += [(width, level in attends, upper) for level, width in reversed(levels)]
    dims = [_head_dim(flags, width, *heads) if attending else width for width, attending, heads in blocks]
    if dims == [width for width, _, _ in blocks]:
        return None
    used = {dim for dim, (_, attending, _) in zip(dims, blocks, strict=True) if attending}
    return used.pop() if len(used) == 1 else tuple(dims)


def _head_dim(flags: Flags, width: int, name: str, heads: int) -> int:
    by_channels = flags.num_head_channels != -1
    name, divisor = ("num_head_channels", flags.num_head_channels) if by_channels else (name, heads)
    if width % divisor:
        raise ValueError(f"{name} is {divisor}, must divide the width of every level with attention, such as {width}")
    return divisor if by_channels else width // heads


def _multipliers(of: str, size_name: str, size: int, given: str | Sequence[float]) -> tuple[float, ...]:
    if isinstance(given, str) and not given.strip():
        known = _MULTIPLIERS[of]
        if size in known:
            return known[size]
        instead = "" if of == "improved_diffusion" else " where channel_mult is not given"
        raise ValueError(f"{size_name} is {size}, must be one of {', '.join(map(str, known))}{instead}")
    return _numbers("channel_mult", given)


def _numbers(name: str, given: object) -> tuple[int, ...]:
    """Return positive integers from text such as "32,16,8", or from a sequence."""
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, Sequence) else (given,)
    try:
        numbers = tuple(_integer(part) for part in parts)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{name} is {given!r}, must be positive integers with commas between, such as '32,16,8'")
    return numbers


def _parsed(given: Mapping[str, Any], defaults: Mapping[str, Any], of: str) -> dict[str, Any]:
    """Return the values of all flags, each of the type of its default."""
    if unknown := [name for name in given if name not in defaults]:
        elsewhere = [name for name, flags in FLAGS.items() if set(unknown) <= flags.keys() and name != of]
        hint = f"; library={elsewhere[0]!r} has them" if elsewhere and of in FLAGS else ""
        what = "is no flag" if len(unknown) == 1 else "are no flags"
        raise TypeError(f"{', '.join(unknown)} {what} of {of}, which has {', '.join(defaults)}{hint}")
    return {name: _value(name, given.get(name, default), default) for name, default in defaults.items()}


def _value(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        text = str(value).lower()
        if text not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
            raise ValueError(f"{name} is {value!r}, must be True or False")
        return text in ("yes", "true", "t", "y", "1")
    if isinstance(default, str):
        if name in ("attention_resolutions", "classifier_attention_resolutions", "channel_mult"):
            return value
        return str(value)
    if isinstance(default, float):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number < 1:
            raise ValueError(f"{name} is {value!r}, must be a number from 0 to below 1")
        return number
    try:
        count = _integer(value)
    except ValueError:
        count = 0
    valid = count >= 1 or (name in _POSITIVE_OR_NOT_SET and count == -1)
    if not valid:
        also = " or -1" if name in _POSITIVE_OR_NOT_SET else ""
        raise ValueError(f"{name} is {value!r}, must be a positive integer{also}")
    return count


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    return int(value)
