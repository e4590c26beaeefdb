"""Fast, exact sampling from denoising diffusion models (DDPM).

from fastddpm import load_pretrained
images = load_pretrained("path/to/pipeline").sampler().sample(16, seed=0)
"""

from fastddpm.frozen import FrozenUNet, freeze
from fastddpm.fusing import Fused, fuse
from fastddpm.interop import accelerate
from fastddpm.pretrained import Pretrained, load_pretrained, save_pretrained
from fastddpm.sampler import Sampler
from fastddpm.schedule import NoiseSchedule
from fastddpm.unet import UNet, UNetConfig

__version__ = "0.1.0"

__all__ = [
    "FrozenUNet",
    "Fused",
    "NoiseSchedule",
    "Pretrained",
    "Sampler",
    "UNet",
    "UNetConfig",
    "__version__",
    "accelerate",
    "freeze",
    "fuse",
    "load_pretrained",
    "save_pretrained",
]
