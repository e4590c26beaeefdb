"""Other libraries' samplers, made fast: `accelerate` takes their object and returns one that is called as it was.

A library is recognised by the names of classes and imported only where an object of it was passed, which shows that it
is there.
"""

from __future__ import annotations

from typing import Any

SUPPORTED = (
    "a DDPMPipeline, DDIMPipeline or LDMPipeline of diffusers, a tuple (UNet2DModel, scheduler) of diffusers, or a "
    "GaussianDiffusion (1D and class-conditional too) of denoising_diffusion_pytorch"
)


def accelerate(obj: Any, *, inplace: bool = False, allow_general: bool = False, **options: Any) -> Any:
    """The object with fastddpm's loop and network in place of its own, called as before.

    Args:
        obj: a `DDPMPipeline`, `DDIMPipeline` or `LDMPipeline` of diffusers, a tuple `(UNet2DModel, scheduler)` of
            diffusers, or a `GaussianDiffusion` of denoising_diffusion_pytorch.
        inplace: change `obj` itself and return it. Else a new object is returned, which shares the weights.
        allow_general: where one part, the network or the sampler, is not supported, accelerate the other alone, with
            a warning in the log.
        **options: of the library: see `fastddpm.interop.diffusers.accelerate` and
            `fastddpm.interop.lucidrains.accelerate`.

    Raises:
        TypeError: `obj` is none of these, or an option is not known.
        ValueError: a setting of it is not supported; the message names it, its value and what would be.
    """
    library = _library(obj)
    if library == "diffusers":
        from fastddpm.interop import diffusers

        return diffusers.accelerate(obj, inplace=inplace, allow_general=allow_general, **options)
    if library == "denoising_diffusion_pytorch":
        from fastddpm.interop import lucidrains

        return lucidrains.accelerate(obj, inplace=inplace, allow_general=allow_general, **options)
    raise not_supported(obj)


def not_supported(obj: Any) -> TypeError:
    """The error for an object that `accelerate` does not know."""
    if isinstance(obj, (tuple, list)):
        name = f"{type(obj).__name__} of ({', '.join(type(part).__name__ for part in obj)})"
    else:
        name = type(obj).__name__
    return TypeError(
        f"obj is a {name}, must be {SUPPORTED}; any other model runs in Sampler(model, schedule), and fuse(model) "
        "makes its norms faster"
    )


def _library(obj: Any) -> str | None:
    """The library that the object's class, or its part's if it is a tuple, is derived from."""
    parts = obj if isinstance(obj, (tuple, list)) else (obj,)
    roots = {cls.__module__.partition(".")[0] for part in parts for cls in type(part).__mro__}
    return next((name for name in ("diffusers", "denoising_diffusion_pytorch") if name in roots), None)
