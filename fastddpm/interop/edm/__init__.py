"""The samplers of EDM and PhysicsNeMo, with fastddpm's loop and network in place of theirs.

    sampler = accelerate(net)                               # an EDMPrecond, VPPrecond, ..., loaded by its library
    images = sampler.edm_sampler(latents, class_labels)     # as edm_sampler(net, latents, class_labels)

Networks are given as objects: their pickles execute code, so this package never opens them.
"""

from __future__ import annotations

from typing import Any

import torch

from fastddpm.interop.edm.accelerated import Options
from fastddpm.interop.edm.denoiser import AcceleratedDenoiser
from fastddpm.interop.edm.preconditioning import REGRESSIONS, kind_of, why_not
from fastddpm.interop.edm.regression import AcceleratedRegression
from fastddpm.interop.shared import not_supported

__all__ = ["AcceleratedDenoiser", "AcceleratedRegression", "accelerate", "takes"]


def takes(obj: Any) -> bool:
    """Return whether an object is a preconditioner or regression of EDM or PhysicsNeMo, by its class."""
    return kind_of(obj) is not None


def accelerate(
    obj: Any,
    *,
    inplace: bool = False,
    allow_general: bool = True,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    cuda_graph: str | bool = "auto",
    batch_size: int | str | None = None,
) -> Any:
    """Return a network of EDM or PhysicsNeMo with its library's samplers as methods.

    The weights are shared: each call uses those that the network has at its beginning.

    Args:
        obj: an `EDMPrecond`, `VPPrecond`, `VEPrecond`, `iDDPMPrecond` or `EDMPrecondSuperResolution`; or CorrDiff's
            regression, `CorrDiffRegressionUNet` or `UNet`, which stays a function of (x, img_lr).
        inplace: give the methods to the object itself, and return it.
        allow_general: where the U-Net is not supported, call it as it is in fastddpm's loop, with a warning in the log.
            False: raise ValueError instead.
        dtype: of the network; None for the library's choice: float16 on CUDA where the network says `use_fp16`, else
            float32.
        backend, cuda_graph: as for `Sampler`.
        batch_size: the most samples per pass through the network; None for all, "auto" for as many as fit.

    Raises:
        TypeError: `obj` is none of these.
        ValueError: a setting of it is not supported; the message names it.
    """
    if kind_of(obj) is None:
        raise not_supported(obj)
    if reason := why_not(obj):
        raise ValueError(f"net cannot be accelerated: {reason}")
    options = Options(allow_general, dtype, backend, cuda_graph, batch_size)
    kind = AcceleratedRegression if kind_of(obj) in REGRESSIONS else AcceleratedDenoiser
    accelerated = kind(obj, options)
    accelerated.check()
    if not inplace:
        return accelerated
    for name in kind.methods:
        setattr(obj, name, getattr(accelerated, name))
    return obj
