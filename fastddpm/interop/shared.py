"""What the libraries' folders share: the error for an unknown object, noise options, and noise drawn in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

NOISES = ("philox", "torch")
SUPPORTED = (
    "a DDPMPipeline, DDIMPipeline or LDMPipeline of diffusers, a tuple (UNet2DModel, scheduler) of diffusers, or a "
    "diffusion of denoising_diffusion_pytorch (GaussianDiffusion, GaussianDiffusion1D, LearnedGaussianDiffusion, "
    "WeightedObjectiveGaussianDiffusion, ContinuousTimeGaussianDiffusion, VParamContinuousTimeGaussianDiffusion, "
    "ElucidatedDiffusion)"
)


def kind_of(obj: Any) -> str:
    """Return the class of an object with the module it is of, which tells classes of one name apart."""
    return f"{type(obj).__module__.rpartition('.')[2]}.{type(obj).__qualname__}"


def not_supported(obj: Any) -> TypeError:
    """Return the error for an object that `accelerate` does not know."""
    if isinstance(obj, (tuple, list)):
        name = f"{type(obj).__name__} of ({', '.join(type(part).__name__ for part in obj)})"
    else:
        name = kind_of(obj)
    return TypeError(
        f"obj is a {name}, must be {SUPPORTED}; any other model runs in Sampler(model, schedule), and fuse(model) "
        "makes its norms faster"
    )


def check_noise(noise: Any) -> str:
    """Return where noise comes from.

    Raises:
        ValueError: it is not one of `NOISES`.
    """
    if noise not in NOISES:
        raise ValueError(f"noise is {noise!r}, must be one of {', '.join(map(repr, NOISES))}")
    return noise


class StepNoise:
    """Noise of steps from a generator, drawn in the order of a library's loop: a `NoiseSource` of `Sampler.sample`.

    The sampler does not ask for noise that a row multiplies by 0, such as all of DDIM's with eta 0. It is drawn
    nonetheless, so that the generator ends where the library leaves it.

    Args:
        draws: for every row whether the library draws.
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
        """Draw what the rows that are left draw."""
        self._pass_to(len(self._draws))

    def _pass_to(self, row: int) -> None:
        for draws in self._draws[self._next : row]:
            if draws:
                self._draw()
        self._next = row
