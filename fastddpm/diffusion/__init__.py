"""The training objective of a diffusion model, and the likelihoods it gives to data."""

from fastddpm.diffusion.gaussian import GaussianDiffusion, Prediction
from fastddpm.diffusion.likelihood import BitsPerDim
from fastddpm.diffusion.losses import LOSSES
from fastddpm.diffusion.tables import VARIANCE_TYPES
from fastddpm.diffusion.timestep_sampling import KINDS as TIMESTEP_SAMPLINGS
from fastddpm.diffusion.weighting import WEIGHTINGS

__all__ = [
    "LOSSES",
    "TIMESTEP_SAMPLINGS",
    "VARIANCE_TYPES",
    "WEIGHTINGS",
    "BitsPerDim",
    "GaussianDiffusion",
    "Prediction",
]
