"""Code that the libraries' folders share: the error for unknown objects, noise options, noise in a library's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

NOISES = ("philox", "torch")
SUPPORTED = (
    "a DDPMPipeline, DDIMPipeline or LDMPipeline of diffusers, a tuple (UNet2DModel, scheduler) of diffusers, a "
    "pipeline of diffusers around a UNet2DConditionModel or that module, a DiffusionPolicy or DiffusionModel of "
    "lerobot, a policy of diffusion_policy with a ConditionalUnet1D, a tuple of the network of either and a scheduler, "
    "a network of EDM or PhysicsNeMo (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond, EDMPrecondSuperResolution, "
    "CorrDiffRegressionUNet), an inferer of MONAI, a tuple (DiffusionModelUNet, scheduler), or a diffusion "
    "of denoising_diffusion_pytorch (GaussianDiffusion, GaussianDiffusion1D, LearnedGaussianDiffusion, "
    "WeightedObjectiveGaussianDiffusion, ContinuousTimeGaussianDiffusion, "
    "VParamContinuousTimeGaussianDiffusion, ElucidatedDiffusion)"
)


def kind_of(obj: Any) -> str:
    """Return the class of an object with its module, which tells apart classes of the same name."""
    module, name = type(obj).__module__.rpartition(".")[2], type(obj).__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def not_supported(obj: Any) -> TypeError:
    """Return the error for an object that `accelerate` does not support."""
    if isinstance(obj, (tuple, list)):
        name = f"{type(obj).__name__} of ({', '.join(map(kind_of, obj))})"
    else:
        name = kind_of(obj)
    return TypeError(
        f"obj is a {name}, must be {SUPPORTED}; any other model runs in Sampler(model, schedule), and fuse(model) "
        "makes its norms faster"
    )


def check_noise(noise: Any) -> str:
    """Check the source of noise, and return it.

    Raises:
        ValueError: `noise` is not one of `NOISES`.
    """
    if noise not in NOISES:
        raise ValueError(f"noise is {noise!r}, must be one of {', '.join(map(repr, NOISES))}")
    return noise


class StepNoise:
    """A `NoiseSource` of `Sampler.sample` that draws from a generator in the order of a library's loop.

    The sampler does not ask for noise that a row multiplies by 0, such as all of DDIM's with eta 0. This class draws it
    nonetheless, so that the generator ends in the same state as the library's.

    Args:
        draws: whether the library draws, one entry per row.
        draw: draws the noise of one step, [N, ...].
        start: the first row.
    """

    def __init__(self, draws: Sequence[bool], draw: Callable[[], Tensor], start: int = 0) -> None:
        self._draws, self._draw, self._next = draws, draw, start

    def __call__(self, row: int, shape: tuple[int, ...]) -> Tensor:
        self._pass_to(row)
        self._next = row + 1
        return self._draw()

    def finish(self) -> None:
        """Draw the noise of the remaining rows."""
        self._pass_to(len(self._draws))

    def _pass_to(self, row: int) -> None:
        for draws in self._draws[self._next : row]:
            if draws:
                self._draw()
        self._next = row
