"""Compute the training objective of a diffusion model, and the likelihoods it gives to data."""

from fastddpm.training.objective.gaussian import GaussianDiffusion, Prediction
from fastddpm.training.objective.likelihood import BitsPerDim
from fastddpm.training.objective.losses import LOSSES
from fastddpm.training.objective.tables import VARIANCE_TYPES
from fastddpm.training.objective.timestep_sampling import KINDS as TIMESTEP_SAMPLINGS
from fastddpm.training.objective.weighting import WEIGHTINGS

__all__ = [
    "LOSSES",
    "TIMESTEP_SAMPLINGS",
    "VARIANCE_TYPES",
    "WEIGHTINGS",
    "BitsPerDim",
    "GaussianDiffusion",
    "Prediction",
]
