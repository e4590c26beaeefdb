"""Options that name the model of a command and the settings that its files lack; load that model."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastddpm.interop.pretrained import Pretrained

MODEL_HELP = (
    "a pipeline folder, as diffusers writes it; owner/name[@revision] of the Hugging Face hub; a file model-N.pt of a "
    "denoising_diffusion_pytorch Trainer; or, with --flags, one of guided-diffusion or improved-diffusion"
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for loading a model, which every command that runs a model has."""
    add = parser.add_argument_group("model").add_argument
    add("--ema", action=argparse.BooleanOptionalAction, default=True,
        help="take the moving average of the weights where there are both: unet_ema/ beside unet/, or in a Trainer's "
             "file (default: --ema)")  # fmt: skip
    add("--variant", metavar="NAME", help="of a folder's weights, as diffusers names files: fp16, ema, non_ema")
    add("--image-size", metavar="S[,S]", help="pixels of an image, or height,width: for files, which do not say it")
    add("--flags", type=_flags, default={}, metavar="'--NAME VALUE ...'",
        help="what else a file does not say: the published flags of guided-diffusion or improved-diffusion (with "
             "--library improved_diffusion); of a Trainer's file --objective, where the file does not show it, and "
             "--sinusoidal_pos_emb_theta")  # fmt: skip


def open_model(options: argparse.Namespace, bundled: Path | None = None, *, latents: bool = False) -> Pretrained:
    """Load the model that `options.model` names, or the bundled one if it names none.

    Args:
        options: of a command that has `add_model_options`.
        bundled: the folder of the bundled model; None for that of digits.
        latents: whether the command accepts a model whose samples must be decoded.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as `load_pretrained`; or the model draws latents without `latents`.
    """
    from fastddpm.interop.pretrained import BUNDLED, load_pretrained

    unsaid: dict[str, Any] = dict(options.flags)
    if options.image_size is not None:
        if "image_size" in unsaid:
            raise ValueError(f"--image-size is {options.image_size} but --flags has it too; it must be in one of them")
        unsaid["image_size"] = options.image_size
    chosen = options.model or bundled or BUNDLED
    model = load_pretrained(chosen, ema=options.ema, variant=options.variant, **unsaid)
    if model.decoder is not None and not latents:
        raise ValueError(f"MODEL is {chosen}, which draws latents; sample takes such a model, this command does not")
    return model


def check_count(model: Pretrained, count: int, name: str) -> None:
    """Raise ValueError if `count` samples of a model are more than memory holds; `name` is the option's."""
    from fastddpm.common.images import check_memory

    config = model.unet.config
    size = config.sample_size or 1
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "out_channels", None) or getattr(config, "in_channels", None) or 1
    check_memory(4 * count * channels * height * width, f"{name}: {count} images of {height} x {width}")


def _flags(text: str) -> dict[str, str]:
    """Parse options of another library's command line into a dictionary."""
    wrong = argparse.ArgumentTypeError(f"{text!r} must be names and values, such as '--image_size 64 --use_fp16 True'")
    try:
        words = shlex.split(text)
    except ValueError:
        raise wrong from None
    flags: dict[str, str] = {}
    while words:
        name, given, value = words.pop(0).partition("=")
        if not name.startswith("--") or len(name) == 2 or (not given and not words):
            raise wrong
        flags[name[2:].replace("-", "_")] = value if given else words.pop(0)
    return flags
