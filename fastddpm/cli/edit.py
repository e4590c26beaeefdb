"""`fastddpm edit`, `inpaint`, `interpolate` and `upscale`: the commands that start from images."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli.inputs import add_command, add_input_options, call_options, labels_of, open_inputs
from fastddpm.cli.model import check_count
from fastddpm.cli.options import (
    add_sampler_options,
    check_labels,
    integer,
    report_device,
    share,
    shares,
)
from fastddpm.cli.outputs import add_output_options, cells, frames_of, images_of, recording, write_outputs

if TYPE_CHECKING:
    from torch import Tensor

    from fastddpm.interop.pretrained import Pretrained
    from fastddpm.sampling.sampler import Sampler

REGIONS = ("top", "bottom", "left", "right", "center")
HIDDEN = -0.25  # the grey that stands for hidden pixels in pictures


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    edit = add_command(
        commands, "edit", "noise images part of the way and denoise them again",
        "Noise images part of the way and denoise them again (SDEdit): the larger the strength, the less is left of "
        "them. With --class-label and --guidance-scale they change towards another class.", _edit,
    )  # fmt: skip
    edit.add_argument(
        "--strength", type=shares, default=[0.3, 0.5, 0.7], metavar="X,X,...",
        help="share of the steps that are run, in (0, 1] (default: 0.3,0.5,0.7)",
    )  # fmt: skip
    add_input_options(edit, variants=1, labels="class to change to")
    add_sampler_options(edit, steps=100, method=None, seed=1)
    add_output_options(edit, "edited.png", "a row per input, a column per strength", "the denoising, largest strength")

    inpaint = add_command(
        commands, "inpaint", "draw a missing part of images anew",
        "Draw a missing part of images anew so that it fits the rest (RePaint).", _inpaint,
    )  # fmt: skip
    inpaint.add_argument(
        "--fill", default="bottom", metavar="REGION",
        help=f"the part to draw: {', '.join(REGIONS)}, or a picture that is white there (default: bottom)",
    )  # fmt: skip
    inpaint.add_argument(
        "--jump-length", type=integer(1), default=10, metavar="J", help="steps of a jump back up (default: 10)"
    )
    inpaint.add_argument(
        "--resamples", type=integer(1), metavar="R",
        help="how often each stretch of steps is run; multiplies the time (default: 5 for ddpm with more steps than a "
        "jump, else 1)",
    )  # fmt: skip
    add_input_options(inpaint, variants=4, labels="class of the images")
    add_sampler_options(inpaint, steps=100, method=None, seed=1)
    add_output_options(inpaint, "inpainted.png", "a row per input")

    interpolate = add_command(
        commands, "interpolate", "draw paths from one image to another",
        "Draw a path from one image to another for each pair of inputs: encode both to noise, follow the arc between "
        "them, decode; or mix both after noising them.", _interpolate,
    )  # fmt: skip
    interpolate.add_argument(
        "--frames", type=integer(2), default=9, metavar="K", help="images of a path, both ends included (default: 9)"
    )
    interpolate.add_argument(
        "--via", choices=("encode", "noise"), default="encode",
        help="encode: the ends are the inputs, needs ddim or dpmsolver++; noise: any sampler (default: encode)",
    )  # fmt: skip
    interpolate.add_argument(
        "--strength", type=share, metavar="X",
        help="share of the steps, in (0, 1] (default: 1 for encode, 0.5 for noise)",
    )  # fmt: skip
    add_input_options(interpolate, variants=None, labels="class of the whole path")
    add_sampler_options(interpolate, steps=200, method="ddim", seed=1)
    add_output_options(interpolate, "interpolated.png", "a row per pair", "the path and back", trajectory=False)

    upscale = add_command(
        commands, "upscale", "draw what small images may look like at higher resolution",
        "Draw what small images may look like at higher resolution, with a model trained for it: by default a bundled "
        "one that draws 16x16 digits from 4x4 pixels.", _upscale,
    )  # fmt: skip
    upscale.add_argument(
        "--factor", type=integer(2), metavar="F",
        help="how many times the model enlarges; inputs are first reduced to that part of its size (default: 4, or "
        "what the --flags of an upsampler of guided-diffusion say)",
    )  # fmt: skip
    upscale.add_argument(
        "--noise-level", type=float, default=0.0, metavar="X",
        help="noise on the small images, which hides errors in their detail (default: 0)",
    )  # fmt: skip
    add_input_options(upscale, variants=4, labels="class of the images")
    add_sampler_options(upscale, steps=100, method=None, seed=1)
    add_output_options(upscale, "upscaled.png", "a row per input")


def _edit(options: argparse.Namespace) -> None:
    import torch

    from fastddpm.common.images import strip
    from fastddpm.sampling.editing import image_to_image

    kind, model, sampler, inputs = open_inputs(options)
    count, each, strengths = len(inputs.names), options.num_samples, sorted(options.strength)
    _check_count(kind, model, count, each * (len(strengths) if kind == ".png" else 1), sampler)
    labels = labels_of(options, model, inputs)
    images = inputs.images.repeat_interleave(each, 0)
    parts, trajectory = [], None
    start = time.perf_counter()
    for strength in strengths:
        recorded = recording(options, kind, round(strength * len(sampler.timesteps)))
        result = image_to_image(
            sampler, images, strength, **call_options(options, labels, each),
            **(recorded if strength == strengths[-1] else {}),
        )  # fmt: skip
        result, trajectory = images_of(result)
        parts.append(result.unflatten(0, (count, each)))
    results = torch.stack(parts, dim=1)  # [inputs, strengths, each, ...]
    columns = [f"{strength:g}" for strength in strengths for _ in range(each)]
    _finish(
        options, kind, sampler, start, results.flatten(0, 2), labels,
        picture=lambda: strip(
            [[image, *cells(row.flatten(0, 1))] for image, row in zip(inputs.images, results, strict=True)],
            row_captions=inputs.names,
            column_captions=["input", *columns],
        ),
        frames=lambda: frames_of(trajectory, columns=min(10, len(images))),
        trajectory=trajectory,
    )  # fmt: skip


def _inpaint(options: argparse.Namespace) -> None:
    import torch

    from fastddpm.common.images import strip
    from fastddpm.sampling.editing import inpaint

    if options.fill not in REGIONS and not Path(options.fill).exists():
        raise ValueError(f"--fill is {options.fill}, must be {', '.join(REGIONS)} or a picture file")
    kind, model, sampler, inputs = open_inputs(options)
    each, steps = options.num_samples, len(sampler.timesteps)
    _check_count(kind, model, len(inputs.names), each, sampler, columns=each)
    labels = labels_of(options, model, inputs)
    resamples = options.resamples or (5 if sampler.method == "ddpm" and steps > options.jump_length else 1)
    mask = _mask(options.fill, tuple(inputs.images.shape[1:]))
    start = time.perf_counter()
    result = inpaint(
        sampler, inputs.images.repeat_interleave(each, 0), mask,
        jump_length=options.jump_length, jump_n_sample=resamples,
        **call_options(options, labels, each), **recording(options, kind, steps * (2 * resamples - 1)),
    )  # fmt: skip
    results, trajectory = images_of(result)
    hidden = torch.where(mask > 0, inputs.images, HIDDEN)
    rows = results.unflatten(0, (len(inputs.names), each))
    _finish(
        options, kind, sampler, start, results, labels,
        picture=lambda: strip(
            [[image, given, *cells(row)] for image, given, row in zip(inputs.images, hidden, rows, strict=True)],
            row_captions=inputs.names,
            column_captions=["image", "given", *["filled in"] * each],
        ),
        frames=lambda: frames_of(trajectory, columns=each),
        trajectory=trajectory,
    )  # fmt: skip


def _interpolate(options: argparse.Namespace) -> None:
    from fastddpm.common.images import grid, strip
    from fastddpm.sampling.editing import interpolate

    if len(options.inputs) % 2:
        raise ValueError(f"INPUT is given {len(options.inputs)} times, must be pairs: an even number")
    label = None if options.class_label == "none" else options.class_label
    if label is None and options.guidance_scale is not None:
        raise ValueError("--guidance-scale needs --class-label, which is the class of the whole path")
    # Clipping loses information; with it, digits come back ten times less exactly.
    exact = {"clip_sample": False} if options.via == "encode" and not options.thresholding else {}
    kind, model, sampler, inputs = open_inputs(options, **exact)
    if label is not None:
        check_labels([label], model.unet.config, name="--class-label is", each="")
    if len(inputs.names) % 2:  # by default one input per class, and the model has an odd number of classes
        inputs.names.pop()
    check_count(model, len(inputs.names) // 2 * options.frames, "--frames")
    _check_count(kind, model, len(inputs.names) // 2, options.frames if kind == ".png" else 1, sampler)
    a, b = inputs.images[: len(inputs.names)].unflatten(0, (-1, 2)).unbind(1)
    start = time.perf_counter()
    results = interpolate(
        sampler, a, b, options.frames, via=options.via, strength=options.strength, seed=options.seed,
        class_labels=label, batch_size=options.batch_size, progress=True,
    ).cpu()  # fmt: skip
    there_and_back = [*range(options.frames), *range(options.frames - 2, 0, -1)]
    _finish(
        options, kind, sampler, start, results.flatten(0, 1), None,
        picture=lambda: strip(
            [[first, *cells(path), last] for first, path, last in zip(a, results, b, strict=True)],
            row_captions=[f"{x} - {y}" for x, y in zip(inputs.names[0::2], inputs.names[1::2], strict=True)],
            column_captions=["from", *[f"{k / (options.frames - 1):.2f}" for k in range(options.frames)], "to"],
        ),
        frames=lambda: [grid(results[:, k].nan_to_num(nan=0.0)) for k in there_and_back],
    )  # fmt: skip


def _upscale(options: argparse.Namespace) -> None:
    from fastddpm.common.images import strip
    from fastddpm.sampling.editing import super_resolution

    upsampler = _upsampler_factor(options.flags)
    kind, model, sampler, inputs = open_inputs(options, reduced=options.factor or upsampler or 4)
    each, low = options.num_samples, inputs.images
    _check_count(kind, model, len(low), each, sampler, columns=each)
    labels = labels_of(options, model, inputs)
    start = time.perf_counter()
    result = super_resolution(
        sampler, low.repeat_interleave(each, 0), noise_level=options.noise_level,
        interpolation="bicubic" if upsampler is None else "bilinear",  # as each model was trained
        **call_options(options, labels, each), **recording(options, kind, len(sampler.timesteps)),
    )  # fmt: skip
    results, trajectory = images_of(result)
    rows = results.unflatten(0, (len(low), each))
    drawn = any(original is not None for original in inputs.originals)
    originals = [[image] * drawn for image in inputs.originals]
    _finish(
        options, kind, sampler, start, results, labels,
        picture=lambda: strip(
            [[*before, small, *cells(row)] for before, small, row in zip(originals, low, rows, strict=True)],
            row_captions=inputs.names,
            column_captions=[*["original"] * drawn, "given", *["drawn"] * each],
        ),
        frames=lambda: frames_of(trajectory, columns=each),
        trajectory=trajectory,
    )  # fmt: skip


def _check_count(
    kind: str, model: Pretrained, inputs: int, each: int, sampler: Sampler, columns: int | None = None
) -> None:
    """Raise ValueError if `each` results of all inputs are more than memory, or a picture of `kind`, can hold."""
    from fastddpm.common.images import check_canvas, grid_size

    check_count(model, inputs * each, "--num-samples")
    if kind in (".png", ".gif"):
        size = sampler.network.sample_shape(sampler.settings.learned_variance)[1:]
        columns = each if kind == ".png" else columns
        check_canvas(*grid_size(inputs * each, size, columns=columns), kind)


def _upsampler_factor(flags: dict[str, str]) -> int | None:
    """Return the factor of an upsampler of guided-diffusion; None if the flags describe another model."""
    from fastddpm.interop.guided_diffusion.flags import model_flags

    if not {"large_size", "small_size"} & flags.keys() or "library" in flags:
        return None
    parsed = model_flags("guided_diffusion", flags)
    small = parsed.small_size or 1
    if parsed.image_size % small or parsed.image_size == small:
        raise ValueError(f"--flags: small_size is {small}, must divide large_size, {parsed.image_size}, and be less")
    return parsed.image_size // small


def _mask(fill: str, shape: tuple[int, ...]) -> Tensor:
    """Return a mask [1, H, W], 1 where the image is kept: outside a region, or where picture `fill` is not white."""
    import torch

    from fastddpm.common.images import load_image

    _, height, width = shape
    if fill not in REGIONS:
        return (load_image(fill, (1, height, width)) < 0).float()
    mask = torch.ones(1, height, width)
    rows = {"top": slice(0, height // 2), "bottom": slice(height // 2, None)}.get(fill, slice(None))
    columns = {"left": slice(0, width // 2), "right": slice(width // 2, None)}.get(fill, slice(None))
    if fill == "center":
        rows, columns = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)
    mask[:, rows, columns] = 0
    return mask


def _finish(
    options: argparse.Namespace, kind: str, sampler: Sampler, start: float, images: Tensor, labels: list[int] | None,
    **outputs: Any,
) -> None:  # fmt: skip
    """Report the time, and write the outputs; `labels` has one per input, `images` the same number for each input."""
    print(f"{len(images)} images in {time.perf_counter() - start:.1f} s")
    report_device(sampler)
    if labels is not None:
        labels = [label for label in labels for _ in range(len(images) // len(labels))]
    write_outputs(options, kind, images, labels, **outputs)
