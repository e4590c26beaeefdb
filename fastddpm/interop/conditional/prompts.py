"""Draw pictures of prompts with a text-to-image pipeline of diffusers: load it, choose a sampling method, draw."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm.interop import hub
from fastddpm.interop.conditional import accelerate, takes
from fastddpm.interop.diffusers.scheduler import SCHEDULERS
from fastddpm.networks.precision import parse_precision

# Methods of schedulers whose config says which they are.
_ALGORITHMS = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", "dpmsolver++"),
    "dpmsolver": ("DPMSolverMultistepScheduler", "dpmsolver"),
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", "sde-dpmsolver++"),
    "sde-dpmsolver": ("DPMSolverMultistepScheduler", "sde-dpmsolver"),
    "dpmsolver++_singlestep": ("DPMSolverSinglestepScheduler", "dpmsolver++"),
    "dpmsolver_singlestep": ("DPMSolverSinglestepScheduler", "dpmsolver"),
}


def load_pipeline(
    model: str | os.PathLike[str], *, precision: str = "float32", device: torch.device | str = "cpu",
    variant: str | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Load a text-to-image pipeline, accelerated.

    Args:
        model: a folder that diffusers has written, or `owner/name` or `owner/name@revision` of the hub.
        precision: of its networks, by name; "tf32" rounds products of the U-Net alone.
        device: where they run.
        variant: of its weights, as diffusers names files.
        **options: of `accelerate`.

    Raises:
        FileNotFoundError: it does not exist.
        ModuleNotFoundError: a package that its text encoder needs is missing.
        ValueError: it cannot be loaded, or it takes no prompts.
    """
    from diffusers import DiffusionPipeline

    dtype, tf32 = parse_precision(precision, device)
    name, revision = hub.find_pipeline(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # later versions call it dtype
            pipe: Any = DiffusionPipeline.from_pretrained(name, revision=revision, torch_dtype=dtype, variant=variant)
    except ImportError as error:
        raise ModuleNotFoundError(f"{model}: {_first_line(error)}") from None
    except Exception as error:  # diffusers and its hub client raise errors of many types
        raise ValueError(f"{model} cannot be loaded as a pipeline: {_first_line(error)}") from None
    if not takes(pipe) or "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"{model} is a {type(pipe).__name__}, must be a text-to-image pipeline around a U-Net")
    if getattr(pipe, "safety_checker", None) is None and "requires_safety_checker" in pipe.config:
        pipe.register_to_config(requires_safety_checker=False)
    return accelerate(pipe.to(device), inplace=True, dtype="tf32" if tf32 else None, **options)


def set_method(pipe: Any, method: str) -> None:
    """Give a pipeline the scheduler of a sampling method, with the noise levels that it was trained on.

    Raises:
        ValueError: no scheduler of diffusers has this method.
    """
    import diffusers

    by_method: dict[str, tuple[str, str | None]] = {own: (name, None) for name, own in SCHEDULERS.items() if own}
    by_method = {**by_method, **_ALGORITHMS}
    if method not in by_method or method in ("ddim_inverse", "edm_euler"):
        known = ", ".join(name for name in by_method if name not in ("ddim_inverse", "edm_euler"))
        raise ValueError(f"method is {method!r}, must be one of {known} for a pipeline")
    name, algorithm = by_method[method]
    more: dict[str, Any] = {} if algorithm is None else {"algorithm_type": algorithm}
    if method == "plms":
        more["skip_prk_steps"] = True
    if str(algorithm).endswith("dpmsolver"):
        more["final_sigmas_type"] = "sigma_min"  # without ++ the last step cannot be to zero noise
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)


def draw(
    pipe: Any, prompts: Sequence[str], images: int = 1, *, seed: int = 0, batch_size: int = 4,
    done: Callable[[int], object] = lambda count: None, **arguments: Any,
) -> Tensor:  # fmt: skip
    """Draw `images` pictures of every prompt.

    Picture k of a seed starts from the noise of seed + k, for every prompt, whatever the batch size.

    Args:
        pipe: from `load_pipeline`.
        prompts: texts.
        images: of every prompt.
        seed: of the first picture.
        batch_size: pictures at once.
        done: called with the number of pictures that were drawn.
        **arguments: of the pipeline, such as negative_prompt, guidance_scale, height, width, num_inference_steps.

    Returns:
        float32 [len(prompts) * images, C, H, W] in [-1, 1] on the CPU, those of the first prompt first.

    Raises:
        ValueError: the pipeline does not take an argument, or not its value.
    """
    known = inspect.signature(pipe.__call__).parameters
    for name, value in arguments.items():
        if name not in known:
            raise ValueError(f"{name} is {value!r}, but a {type(pipe).__name__} does not take it")
    for missing, other in (("height", "width"), ("width", "height")):  # of one alone pipelines take no notice
        if other in arguments and missing in known and missing not in arguments:
            size = pipe.unet.config.sample_size
            pixels = size if isinstance(size, int) else size[missing == "width"]
            arguments[missing] = pixels * getattr(pipe, "vae_scale_factor", 1)
    pairs = [(prompt, seed + index) for prompt in prompts for index in range(images)]
    drawn = []
    for start in range(0, len(pairs), batch_size):
        texts, seeds = zip(*pairs[start : start + batch_size], strict=True)
        given = dict(arguments)
        if given.get("negative_prompt") is not None:
            given["negative_prompt"] = [given["negative_prompt"]] * len(texts)
        generators = [torch.Generator().manual_seed(each) for each in seeds]
        result = pipe(list(texts), generator=generators, output_type="pt", **given).images
        drawn.append(_signed(pipe, result))
        done(len(texts))
    return torch.cat(drawn)


def _signed(pipe: Any, images: Tensor) -> Tensor:
    """Return images in [-1, 1]; those of DeepFloyd IF are so already."""
    images = images.detach().float().cpu()
    return images if type(pipe).__name__.startswith("IF") else images * 2 - 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
