"""`fastddpm sample PIPELINE --prompt`: draw pictures of prompts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli import outputs
from fastddpm.cli.options import chosen_device, device_name, integer

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from fastddpm.interop.pretrained import Pretrained

# Options of `sample` that a pipeline has no place for, with the values that they have if they are not given.
_OTHERS: dict[str, Any] = {
    "class_labels": None, "timesteps": None, "spacing": None, "eta": None, "thresholding": False, "trajectory": None,
    "shard_size": None, "format": None, "engine": None, "address": None, "workers": None, "image_size": None,
    "flags": {}, "ema": True, "text_encoder": None,
}  # fmt: skip


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that make `sample` draw prompts."""
    add = parser.add_argument_group(
        "text to image",
        "with a pipeline of diffusers, such as Stable Diffusion's, or a model of `fastddpm train --captions`; "
        "N is then per prompt (default: 1)",
    ).add_argument
    add("--prompt", nargs="+", metavar="TEXT", help="what to draw; PIPELINE stands before it")
    add("--prompt-file", type=Path, metavar="PATH", help="a prompt a line; the grid has a row for each")
    add("--negative-prompt", metavar="TEXT", help="what to keep away from, with guidance")
    add("--text-encoder", metavar="ENCODER",
        help="of a model of `train --captions`, where it is not the one that the model names")  # fmt: skip
    add("--height", type=integer(1), metavar="PIXELS", help="of a picture (default: the pipeline's)")
    add("--width", type=integer(1), metavar="PIXELS", help="of a picture (default: the pipeline's)")


def wants_prompts(options: argparse.Namespace) -> bool:
    """Return whether the options ask for pictures of prompts.

    Raises:
        ValueError: an option needs a prompt and there is none.
    """
    if options.prompt is not None or options.prompt_file is not None:
        return True
    for name in ("negative_prompt", "text_encoder", "height", "width"):
        if (value := getattr(options, name)) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is {value!r} but --prompt is not given")
    return False


def is_trained(options: argparse.Namespace) -> bool:
    """Return whether MODEL is one that `fastddpm train --captions` has written."""
    from fastddpm.interop.pretrained import is_text_model

    return options.model is not None and is_text_model(options.model)


def tell(options: argparse.Namespace, model: Pretrained, texts: list[str]) -> tuple[list[int], dict[str, Any]]:
    """Return the number of the prompt of every sample, and the arguments that tell a sampler their prompts."""
    for name in ("class_labels", "height", "width"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is given, but {options.model} does not take it")
    numbers = [number for number in range(len(texts)) for _ in range(options.num_samples or 1)]
    negative = options.negative_prompt or ""
    return numbers, model.prompted([texts[each] for each in numbers], negative, text_encoder=options.text_encoder)


def picture(images: Tensor, texts: list[str]) -> Image.Image:
    """Draw the samples of each prompt in a row; those that are not finite are left out."""
    from fastddpm.common.images import strip

    rows = images.unflatten(0, (len(texts), -1))
    return strip([[image if image.isfinite().all() else None for image in row] for row in rows], row_captions=texts)


def sample_prompts(options: argparse.Namespace) -> None:
    """Draw pictures of the prompts and write them."""
    from fastddpm.common.images import grid
    from fastddpm.common.progress import progress_bar
    from fastddpm.interop import hub

    for name, value in _OTHERS.items():
        if getattr(options, name) != value:
            raise ValueError(f"--{name.replace('_', '-')} is given, but a pipeline with --prompt does not take it")
    if options.model is None:
        raise ValueError("--prompt is given but MODEL is not, must be a text-to-image pipeline")
    if isinstance(options.steps, str):
        raise ValueError(f"--steps is {options.steps!r}, must be an integer with --prompt")
    kind = outputs.check_outputs(options)
    if kind == ".gif":
        raise ValueError(f"--output is {options.output}, which shows states, but those of a pipeline are not kept")
    prompts = prompts_of(options)
    hub.find_pipeline(options.model)  # before seconds go to importing diffusers
    device = chosen_device(options)
    fast = "float16" if device.type == "cuda" else "float32"
    wanted = options.dtype if options.dtype not in (None, "auto") else fast
    try:
        from fastddpm.interop.conditional.prompts import draw, load_pipeline, set_method
    except ImportError:
        raise ModuleNotFoundError("--prompt needs diffusers: pip install 'fastddpm[diffusers]' transformers") from None
    _quiet()
    pipe = load_pipeline(
        options.model, precision=wanted, device=device, variant=options.variant, backend=options.backend,
        cuda_graph=False if options.cuda_graph == "off" else options.cuda_graph,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    if options.method is not None:
        set_method(pipe, options.method)
    names = ("guidance_scale", "negative_prompt", "height", "width")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.steps is not None:
        given["num_inference_steps"] = options.steps
    count = options.num_samples or 1
    start = time.perf_counter()
    with progress_bar(count * len(prompts), "drawing", enabled=True) as bar:
        images = draw(
            pipe, prompts, count, seed=options.seed, done=bar,
            batch_size=4 if options.batch_size == "auto" else options.batch_size, **given,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    print(f"{len(images)} images of {len(prompts)} prompts in {seconds:.1f} s: {seconds / len(images):.3g} s per image")
    print(f"device {device_name(device)}, networks {wanted}")
    finite = outputs.finite_rows(images)
    outputs.write_outputs(options, kind, images, None, picture=lambda: grid(images[finite], columns=count), frames=list)


def _quiet() -> None:
    """Turn off the progress bars and advice of the libraries that load a pipeline."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        from transformers.utils import logging as of_transformers
    except ImportError:
        return
    of_transformers.disable_progress_bar()
    of_transformers.set_verbosity_error()


def prompts_of(options: argparse.Namespace) -> list[str]:
    """Return the prompts that the options name.

    Raises:
        ValueError: there are none, or one is empty.
    """
    prompts = list(options.prompt or [])
    if options.prompt_file is not None:
        if options.prompt is not None:
            raise ValueError(f"--prompt-file is {options.prompt_file} but --prompt is given too, must be one of them")
        try:
            text = options.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--prompt-file is {options.prompt_file}, must be text in UTF-8") from None
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"--prompt-file is {options.prompt_file}, which has no prompts, must have one a line")
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("--prompt is empty, must say what to draw")
    return prompts
