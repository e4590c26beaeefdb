"""Get the inputs of the commands that start from images: read files, or draw images for class labels."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli.model import MODEL_HELP, add_model_options, open_model
from fastddpm.cli.options import a_seed, check_labels, classes_of, integer, make_sampler
from fastddpm.cli.outputs import check_outputs

if TYPE_CHECKING:
    from torch import Tensor

    from fastddpm.interop.pretrained import Pretrained
    from fastddpm.sampling.sampler import Sampler

INPUT_STEPS = 25  # steps of the sampler that draws an input for a class label


def add_command(
    commands: Any, name: str, help: str, description: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """Add a command that takes inputs, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(run=run)
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT",
        help="picture files of any size, or class labels: the model then draws one (default: one of each class)",
    )  # fmt: skip
    return parser


def add_input_options(parser: argparse.ArgumentParser, *, variants: int | None, labels: str | None) -> None:
    """Add the options on inputs; None for `variants` or `labels` leaves out that option and fixes its value."""
    add = parser.add_argument
    add("--model", help=f"{MODEL_HELP} (default: a bundled one)")
    add_model_options(parser)
    add("--invert", action="store_true", help="exchange black and white in picture files")
    add("--input-seed", type=a_seed, default=0, metavar="SEED",
        help="of inputs drawn for class labels (default: 0)")  # fmt: skip
    if variants is None:
        parser.set_defaults(num_samples=1)
    else:
        add("-n", "--num-samples", type=integer(1), default=variants, metavar="N",
            help=f"results per input (default: {variants})")  # fmt: skip
    if labels is None:
        parser.set_defaults(class_label=None)
    else:
        add("--class-label", type=_label_or_none, metavar="L",
            help=f"{labels}, or none (default: the label given as input, else none)")  # fmt: skip


def _label_or_none(text: str) -> int | str:
    return text if text == "none" else integer(0)(text)


@dataclass
class Inputs:
    """The images that a command starts from.

    Attributes:
        names: as given.
        images: float32 [K, C, H, W] in [-1, 1].
        labels: the class of each input that was given as a label; None for a file.
        originals: for upscaling, the full-size drawing that each small image was reduced from; None for a file.
    """

    names: list[str]
    images: Tensor
    labels: list[int | None]
    originals: list[Tensor | None]


def open_inputs(
    options: argparse.Namespace, reduced: int = 1, **settings: Any
) -> tuple[str, Pretrained, Sampler, Inputs]:
    """Check the outputs, then return their suffix, the model, its sampler and the inputs.

    With `reduced` F > 1 the model enlarges. It is the bundled upscaler by default, and inputs have 1/F of its size.
    `settings` are further settings of the sampler.
    """
    from fastddpm.interop.pretrained import BUNDLED, load_pretrained

    kind = check_outputs(options)
    bundled = BUNDLED if reduced == 1 else BUNDLED.with_name("digits_upscale")
    model = open_model(options, bundled)
    sampler = make_sampler(options, model, **settings)
    source = load_pretrained(BUNDLED) if reduced > 1 and options.model is None else model
    return kind, model, sampler, _read_inputs(options, model, source, sampler, reduced)


def _read_inputs(
    options: argparse.Namespace, model: Pretrained, source: Pretrained, sampler: Sampler, reduced: int
) -> Inputs:
    """Read the pictures, and draw with `source` the inputs given as labels."""
    import torch
    from torch.nn.functional import avg_pool2d

    from fastddpm.common.images import load_image

    shape = _input_shape(model.unet.config, sampler, reduced)
    classes = source.labels()
    names = options.inputs or [str(label) for label in classes]
    if not names:
        raise ValueError("INPUT is missing: the model has no classes to draw one of each, name picture files")
    labels = [int(name) if name.isdecimal() and not Path(name).exists() else None for name in names]
    wanted = [label for label in labels if label is not None]
    if reduced > 1 and source is model and wanted:
        raise ValueError(f"INPUT is {wanted[0]}, a label, but --model is not the bundled one: name picture files")
    check_labels(wanted, source.unet.config, name="INPUT is", each="a label ")
    files = {
        name: load_image(name, shape, invert=options.invert, average=reduced > 1)
        for name, label in zip(names, labels, strict=True)
        if label is None
    }
    drawn: list[Tensor] = []
    if wanted:
        draw = source.sampler(
            method="dpmsolver++", num_inference_steps=INPUT_STEPS, device=sampler.device, dtype=sampler.dtype,
            backend=options.backend,
        )  # fmt: skip
        drawn = list(draw.sample(len(wanted), seed=options.input_seed, class_labels=wanted).cpu())
    images: list[Tensor] = []
    originals: list[Tensor | None] = []
    for name, label in zip(names, labels, strict=True):
        original = drawn.pop(0) if label is not None else None
        originals.append(original if reduced > 1 else None)
        images.append(files[name] if original is None else avg_pool2d(original, reduced))
    return Inputs([Path(name).stem for name in names], torch.stack(images), labels, originals)


def _input_shape(config: Any, sampler: Sampler, reduced: int) -> tuple[int, int, int]:
    """Return (C, H, W) of an input."""
    size = config.sample_size
    if size is None:
        raise ValueError("--model has no sample_size in its config, which images must be resized to")
    height, width = (size, size) if isinstance(size, int) else size
    if height % reduced or width % reduced:
        raise ValueError(f"--factor is {reduced}, must divide the model's size {height} x {width}")
    channels = config.out_channels // (2 if sampler.settings.learned_variance else 1)
    if reduced > 1:
        reads = getattr(config, "in_channels", channels)
        channels = reads - channels
        if channels < 1:
            raise ValueError(f"--model reads {reads} channels, no small image beside those it draws")
    return channels, height // reduced, width // reduced


def labels_of(options: argparse.Namespace, model: Pretrained, inputs: Inputs) -> list[int] | None:
    """Return a class per input: --class-label, the input's own label, or the null class."""
    config = model.unet.config
    asked = options.class_label
    if isinstance(asked, int):
        check_labels([asked], config, name="--class-label is", each="")
        return [asked] * len(inputs.names)
    if not classes_of(config):
        return None
    known = [None if asked == "none" else label for label in inputs.labels]
    if None in known:
        if options.guidance_scale is not None:
            raise ValueError("--guidance-scale needs --class-label where an input is a picture file")
        if config.null_class is None:
            raise ValueError("--class-label is missing: the model has no class that means none")
    return [label if label is not None else int(config.null_class or 0) for label in known]


def call_options(options: argparse.Namespace, labels: list[int] | None, each: int) -> dict[str, Any]:
    """Return the arguments that every command passes to `Sampler.sample`, for `each` results per input."""
    labels = None if labels is None else [label for label in labels for _ in range(each)]
    return {"seed": options.seed, "class_labels": labels, "batch_size": options.batch_size, "progress": True}
