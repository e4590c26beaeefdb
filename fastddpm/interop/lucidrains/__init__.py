"""denoising_diffusion_pytorch: its diffusion objects, sampled by `Sampler`.

    diffusion = accelerate(diffusion)
    images = diffusion.sample(batch_size=16)

The three classes of `_BASES` are taken, with any network. Their other attributes and methods (`forward` for training,
`p_sample`, `model`, `state_dict`, ...) stay the object's own.
"""

from __future__ import annotations

from typing import Any

from fastddpm.interop.lucidrains.checkpoint import load_trainer_checkpoint
from fastddpm.interop.lucidrains.diffusion import (
    METHODS,
    AcceleratedDiffusion,
    AcceleratedDiffusion1D,
    AcceleratedGuidedDiffusion,
    check_parts,
)
from fastddpm.interop.lucidrains.models import LIBRARY
from fastddpm.interop.lucidrains.run import Options
from fastddpm.interop.shared import not_supported

__all__ = [
    "AcceleratedDiffusion",
    "AcceleratedDiffusion1D",
    "AcceleratedGuidedDiffusion",
    "accelerate",
    "load_trainer_checkpoint",
]

_BASES: dict[tuple[str, str], type[AcceleratedDiffusion]] = {
    (f"{LIBRARY}.denoising_diffusion_pytorch", "GaussianDiffusion"): AcceleratedDiffusion,
    (f"{LIBRARY}.denoising_diffusion_pytorch_1d", "GaussianDiffusion1D"): AcceleratedDiffusion1D,
    (f"{LIBRARY}.classifier_free_guidance", "GaussianDiffusion"): AcceleratedGuidedDiffusion,
}


def accelerate(obj: Any, *, inplace: bool = False, allow_general: bool = False, **options: Any) -> Any:
    """Return a diffusion of denoising_diffusion_pytorch that samples with `Sampler`.

    With noise="torch" the samples are, after the same `torch.manual_seed`, those of the original: random numbers are
    drawn from torch's global generator in its order, and the coefficients are its buffers.

    Args:
        obj: a `GaussianDiffusion`, a `GaussianDiffusion1D`, or the class-conditional `GaussianDiffusion` of
            `denoising_diffusion_pytorch.classifier_free_guidance`.
        inplace: give the object itself these methods (`del obj.sample` and so on takes them away again), and return
            it. Without, nothing of it is changed. The network is used with the weights that it has when a call begins,
            so that training may go on.
        allow_general: run the original's own loop where a call asks for what the table of a sampler cannot hold
            (`model_forward_kwargs`; DDIM with `use_cfg_plus_plus`), with a warning in the log; an error otherwise.
        **options: of `Sampler`: dtype, device, backend, cuda_graph; of its `sample`: batch_size, progress (True);
            noise: "philox" (the default) or "torch"; freeze: whether the library's two-dimensional U-Nets are
            prepared for sampling (`fastddpm.networks.frozen`); None for wherever they can be, after one comparison
            with the network itself. For networks that are not: fuse_norms: replace the library's norms by fused
            kernels, in a copy that shares their parameters and is compared with the network first; None for wherever
            it runs on CUDA; channels_last: run the network of images in that memory format, in a copy.

    Raises:
        TypeError: `obj` is none of these, or an option is not known.
        ValueError: it has its own of what is replaced, or an option is out of range.
        RuntimeError: the network with fused norms differs from the network.
    """
    kind = _kind(obj)
    check_parts(obj)
    accelerated = kind(obj, Options.parse(options, allow_general=allow_general))
    accelerated.check()
    if not inplace:
        return accelerated
    for name in METHODS:
        setattr(obj, name, getattr(accelerated, name))
    return obj


def _kind(obj: Any) -> type[AcceleratedDiffusion]:
    """Return how an object is accelerated."""
    for base in type(obj).__mro__:
        if found := _BASES.get((base.__module__, base.__name__)):
            return found
    raise not_supported(obj)
