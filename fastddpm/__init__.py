"""Fast, exact sampling from denoising diffusion models (DDPM).

from fastddpm import load_pretrained
images = load_pretrained("path/to/pipeline").sampler().sample(16, seed=0)
"""

from typing import TYPE_CHECKING, Any

from fastddpm.diffusion import GaussianDiffusion
from fastddpm.frozen import FrozenUNet, freeze
from fastddpm.fusing import Fused, fuse
from fastddpm.interop import accelerate
from fastddpm.pretrained import Pretrained, load_pretrained, save_pretrained
from fastddpm.sampler import Sampler
from fastddpm.schedule import NoiseSchedule
from fastddpm.unet import UNet, UNetConfig

if TYPE_CHECKING:
    from fastddpm.training import Trainer, TrainerSettings, TrainResult

__version__ = "0.1.0"

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
    "freeze",
    "fuse",
    "load_pretrained",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    # Training reads pictures and draws bars: whoever only samples imports neither library.
    if name in ("TrainResult", "Trainer", "TrainerSettings"):
        from fastddpm import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
