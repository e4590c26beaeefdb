"""Other libraries' samplers, made fast: `accelerate` takes their object and returns one that is called as it was.

A library is recognised by the names of classes. It is imported only when an object of it is passed: then it is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastddpm.interop.shared import not_supported


def accelerate(obj: Any, *parts: Any, inplace: bool = False, allow_general: bool | None = None, **options: Any) -> Any:
    """Return the object with fastddpm's loop and network in place of its own, called as before.

    Each is compared once, on a small sample, with what it takes the place of.

    Args:
        obj: a `DDPMPipeline`, `DDIMPipeline` or `LDMPipeline` of diffusers, a tuple `(UNet2DModel, scheduler)` of
            diffusers, a pipeline around a `UNet2DConditionModel` (Stable Diffusion and its kin) or that U-Net alone, a
            diffusion of denoising_diffusion_pytorch, a diffusion policy of lerobot or diffusion_policy, a network of
            EDM or PhysicsNeMo, or an inferer of MONAI or a tuple `(DiffusionModelUNet, scheduler)`.
        *parts: the network and the scheduler of an inferer of MONAI, both optional.
        inplace: change `obj` itself and return it. Else a new object is returned, which shares the weights.
        allow_general: where one part, the network or the sampler, is not supported, accelerate the other alone, with
            a warning in the log. None: the library's default, True.
        **options: of the library: see `accelerate` in `fastddpm.interop.diffusers`, `.conditional`, `.lucidrains`,
            `.robots`, `.edm` and `.monai`.

    Raises:
        TypeError: `obj` is none of these, or an option is not known.
        ValueError: a setting of it is not supported; the message names it, its value and what would be.
    """
    from fastddpm.interop import edm

    library = _library(obj)
    if allow_general is not None:
        options["allow_general"] = allow_general
    if library == "monai":
        from fastddpm.interop import monai

        return monai.accelerate(obj, *parts, inplace=inplace, **options)
    if parts:
        raise TypeError(f"{len(parts)} parts are given beside a {type(obj).__name__}, must be an inferer of MONAI")
    if library == "diffusers":
        from fastddpm.interop import conditional, diffusers

        if conditional.takes(obj):
            return conditional.accelerate(obj, inplace=inplace, **options)
        return diffusers.accelerate(obj, inplace=inplace, **options)
    if library == "denoising_diffusion_pytorch":
        from fastddpm.interop import lucidrains

        return lucidrains.accelerate(obj, inplace=inplace, **options)
    if library in ("lerobot", "diffusion_policy"):
        from fastddpm.interop import robots

        return robots.accelerate(obj, inplace=inplace, **options)
    if edm.takes(obj):
        return edm.accelerate(obj, inplace=inplace, **options)
    raise not_supported(obj)


def unaccelerate(obj: Any) -> Any:
    """Undo `accelerate` on a pipeline around a `UNet2DConditionModel`, or on that U-Net, and return the object.

    An object that is not accelerated stays as it is.

    Raises:
        TypeError: it is neither of these.
    """
    from fastddpm.interop import conditional

    if _library(obj) != "diffusers":
        raise TypeError(f"obj is a {type(obj).__name__}, must be a pipeline or a UNet2DConditionModel of diffusers")
    return conditional.unaccelerate(obj)


@contextmanager
def accelerated(obj: Any, **options: Any) -> Iterator[Any]:
    """Accelerate an object itself inside, and undo that at the end.

    Args:
        obj: as for `unaccelerate`.
        **options: of `accelerate`.

    Raises:
        TypeError, ValueError: as `accelerate`.
    """
    result = accelerate(obj, inplace=True, **options)
    try:
        yield result
    finally:
        unaccelerate(result)


# The first wins in a tuple.
_LIBRARIES = ("lerobot", "diffusion_policy", "diffusers", "denoising_diffusion_pytorch", "monai")


def _library(obj: Any) -> str | None:
    """Return the library that the class of the object, or of a part of a tuple, is derived from."""
    parts = obj if isinstance(obj, (tuple, list)) else (obj,)
    roots = {cls.__module__.partition(".")[0] for part in parts for cls in type(part).__mro__}
    return next((name for name in _LIBRARIES if name in roots), None)
