"""denoising_diffusion_pytorch: its diffusion objects, sampled by `Sampler`.

    diffusion = accelerate(diffusion)
    images = diffusion.sample(batch_size=16)

The classes that one of `_KINDS` is `of` are taken, with any network. Their other attributes and methods (`forward` for
training, `p_sample`, `model`, `state_dict`, ...) stay the object's own.
"""

from __future__ import annotations

import logging
from typing import Any

from fastddpm.interop.lucidrains.accelerated import Accelerated, base_of
from fastddpm.interop.lucidrains.checkpoint import load_trainer_checkpoint
from fastddpm.interop.lucidrains.continuous import AcceleratedContinuousDiffusion
from fastddpm.interop.lucidrains.diffusion import (
    AcceleratedClassifierDiffusion,
    AcceleratedDiffusion,
    AcceleratedDiffusion1D,
    AcceleratedGuidedDiffusion,
    AcceleratedLearnedDiffusion,
    AcceleratedOwnLoop,
    AcceleratedRepaintDiffusion,
    AcceleratedWeightedDiffusion,
)
from fastddpm.interop.lucidrains.elucidated import AcceleratedElucidatedDiffusion
from fastddpm.interop.lucidrains.run import Options
from fastddpm.interop.shared import kind_of, not_supported

__all__ = [
    "Accelerated",
    "AcceleratedDiffusion",
    "AcceleratedDiffusion1D",
    "AcceleratedGuidedDiffusion",
    "accelerate",
    "load_trainer_checkpoint",
]

_log = logging.getLogger(__name__)

_KINDS: tuple[type[Accelerated], ...] = (
    AcceleratedDiffusion,
    AcceleratedDiffusion1D,
    AcceleratedGuidedDiffusion,
    AcceleratedLearnedDiffusion,
    AcceleratedWeightedDiffusion,
    AcceleratedRepaintDiffusion,
    AcceleratedClassifierDiffusion,
    AcceleratedContinuousDiffusion,
    AcceleratedElucidatedDiffusion,
)
_BY_NAME = {name: kind for kind in _KINDS for name in kind.of}


def accelerate(obj: Any, *, inplace: bool = False, allow_general: bool = True, **options: Any) -> Any:
    """Return a diffusion of denoising_diffusion_pytorch that samples with `Sampler`.

    With noise="torch" the samples are, after the same `torch.manual_seed`, those of the original: random numbers are
    drawn from torch's global generator in its order, and the coefficients are its buffers.

    Args:
        obj: a `GaussianDiffusion` (of the library's main module, `classifier_free_guidance`, `guided_diffusion`,
            `repaint` or `simple_diffusion`), `GaussianDiffusion1D`, `LearnedGaussianDiffusion`,
            `WeightedObjectiveGaussianDiffusion`, `ContinuousTimeGaussianDiffusion`,
            `VParamContinuousTimeGaussianDiffusion` or `ElucidatedDiffusion`, or of a class derived from one.
        inplace: give the object itself these methods (`del obj.sample` and so on takes them away again), and return
            it. Without, nothing of it is changed. The network is used with the weights that it has when a call begins,
            so that training may go on.
        allow_general: run the original's own loop around the prepared network where the table of a sampler cannot hold
            what it does (DDIM with `use_cfg_plus_plus`; `mask`; `cond_fn`; methods of a class of your own), once with
            a warning in the log. False: an error.
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
    base = base_of(obj, _BY_NAME)
    if base is None:
        raise not_supported(obj)
    kind = _BY_NAME[base.__module__.partition(".")[2], base.__name__]
    if allow_general and issubclass(kind, AcceleratedDiffusion) and (own := kind.own_parts(obj)):
        _log.warning("%s has its own %s: its own loop runs around fastddpm's network", kind_of(obj), ", ".join(own))
        kind = AcceleratedOwnLoop.like(kind)
    accelerated = kind(obj, Options.parse(options, allow_general=allow_general))
    accelerated.check()
    if not inplace:
        return accelerated
    for name in kind.methods:
        setattr(obj, name, getattr(accelerated, name))
    return obj
