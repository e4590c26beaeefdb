"""Sample the diffusion objects of denoising_diffusion_pytorch with `Sampler`.

    diffusion = accelerate(diffusion)
    images = diffusion.sample(batch_size=16)

`accelerate` takes the classes that some class in `_KINDS` lists in `of`, with any network. Their other attributes and
methods (`forward` for training, `p_sample`, `model`, `state_dict`, ...) stay those of the object.
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

    With noise="torch" and the same `torch.manual_seed`, the samples are those of the original: random numbers come from
    torch's global generator in the same order, and the coefficients are the original's buffers.

    Args:
        obj: a `GaussianDiffusion` (of the library's main module, `classifier_free_guidance`, `guided_diffusion`,
            `repaint` or `simple_diffusion`), `GaussianDiffusion1D`, `LearnedGaussianDiffusion`,
            `WeightedObjectiveGaussianDiffusion`, `ContinuousTimeGaussianDiffusion`,
            `VParamContinuousTimeGaussianDiffusion` or `ElucidatedDiffusion`, or of a class derived from one.
        inplace: give the object itself these methods (`del obj.sample` and so on removes them) and return it. If
            False, the object is not changed. Each call uses the weights at its beginning, so training may go on.
        allow_general: run the original's own loop around the prepared network where a step table cannot express it
            (DDIM with `use_cfg_plus_plus`; `mask`; `cond_fn`; methods of your own class), and log one warning. False
            raises an error.
        **options: of `Sampler`: dtype, device, backend, cuda_graph; of its `sample`: batch_size, progress (True);
            noise: "philox" (the default) or "torch"; freeze: whether to prepare the library's two-dimensional U-Nets
            for sampling (`fastddpm.networks.frozen`); None prepares them where possible, after one comparison with the
            network itself. For networks that are not frozen: fuse_norms: replace the library's norms by fused kernels,
            in a copy that shares their parameters and is first compared with the network; None does so on CUDA;
            channels_last: run a network for images in that memory format, in a copy.

    Raises:
        TypeError: `obj` is none of these, or an option is not known.
        ValueError: `obj` overrides a method that would be replaced, or an option is out of range.
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
