"""Fast, exact sampling from denoising diffusion models (DDPM).

from fastddpm import load_pretrained
images = load_pretrained("path/to/pipeline").sampler().sample(16, seed=0)
"""

from typing import TYPE_CHECKING, Any

from fastddpm.common.version import __version__
from fastddpm.interop import accelerate, accelerated, unaccelerate
from fastddpm.interop.fusing import Fused, fuse
from fastddpm.interop.pretrained import Pretrained, load_pretrained, save_pretrained
from fastddpm.networks.frozen import FrozenUNet, freeze
from fastddpm.networks.unet.model import UNet, UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.sampler import Sampler
from fastddpm.training.objective import GaussianDiffusion

if TYPE_CHECKING:
    from fastddpm.training import Trainer, TrainerSettings, TrainResult

__all__ = [
    "FrozenUNet",
    "Fused",
    "GaussianDiffusion",
    "NoiseSchedule",
    "Pretrained",
    "Sampler",
    "TrainResult",
    "Trainer",
    "TrainerSettings",
    "UNet",
    "UNetConfig",
    "__version__",
    "accelerate",
    "accelerated",
    "freeze",
    "fuse",
    "load_pretrained",
    "save_pretrained",
    "unaccelerate",
]


def __getattr__(name: str) -> Any:
    # Training reads pictures and draws bars: whoever only samples imports neither library.
    if name in ("TrainResult", "Trainer", "TrainerSettings"):
        from fastddpm import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
