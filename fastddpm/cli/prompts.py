"""`fastddpm sample PIPELINE --prompt`: draw pictures of prompts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from fastddpm.cli import outputs
from fastddpm.cli.options import chosen_device, device_name, integer

# Options of `sample` that a pipeline has no place for, with the values that they have if they are not given.
_OTHERS: dict[str, Any] = {
    "class_labels": None, "timesteps": None, "spacing": None, "eta": None, "thresholding": False, "trajectory": None,
    "shard_size": None, "format": None, "engine": None, "address": None, "workers": None, "image_size": None,
    "flags": {}, "ema": True,
}  # fmt: skip


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that make `sample` draw prompts."""
    add = parser.add_argument_group(
        "text to image", "with a pipeline of diffusers, such as Stable Diffusion's; N is then per prompt (default: 1)"
    ).add_argument
    add("--prompt", nargs="+", metavar="TEXT", help="what to draw; PIPELINE stands before it")
    add("--prompt-file", type=Path, metavar="PATH", help="a prompt a line; the grid has a row for each")
    add("--negative-prompt", metavar="TEXT", help="what to keep away from, with guidance")
    add("--height", type=integer(1), metavar="PIXELS", help="of a picture (default: the pipeline's)")
    add("--width", type=integer(1), metavar="PIXELS", help="of a picture (default: the pipeline's)")


def wants_prompts(options: argparse.Namespace) -> bool:
    """Return whether the options ask for pictures of prompts.

    Raises:
        ValueError: an option needs a prompt and there is none.
    """
    if options.prompt is not None or options.prompt_file is not None:
        return True
    for name in ("negative_prompt", "height", "width"):
        if (value := getattr(options, name)) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is {value!r} but --prompt is not given")
    return False


def sample_prompts(options: argparse.Namespace) -> None:
    """Draw pictures of the prompts and write them."""
    from fastddpm.common.images import grid
    from fastddpm.common.progress import progress_bar

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
    prompts = _prompts(options)
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


def _prompts(options: argparse.Namespace) -> list[str]:
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
