"""Compute weights of the loss by timestep that give every prediction type the same loss.

A weighting is a function W(SNR) on the squared error of x_0, SNR_t = abar_t / (1 - abar_t). At given x_t an error d in
x_0 is one of sqrt(SNR) d in epsilon and of sqrt(SNR + 1) d in v, so the same loss has the weights W / SNR and
W / (SNR + 1) there (Salimans & Ho 2022, appendix D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.common import checks
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import PREDICTION_TYPES

WEIGHTINGS = ("uniform", "min_snr", "p2", "snr")


def loss_weights(
    schedule: NoiseSchedule,
    weighting: str,
    prediction_type: str,
    *,
    min_snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
) -> Tensor:
    """Return the weight of the loss at each timestep: float64 [T].

    Args:
        schedule: the forward process.
        weighting: "uniform", 1 on what the network predicts; else the same loss whatever that is: "snr", W = SNR, 1 on
            epsilon; "min_snr", W = min(SNR, min_snr_gamma) (Hang et al. 2023); "p2", W = SNR / (p2_k + SNR)^p2_gamma
            (Choi et al. 2022).
        prediction_type: "epsilon", "sample" or "v_prediction".
        min_snr_gamma: above 0.
        p2_gamma: at least 0.
        p2_k: above 0.

    Raises:
        TypeError, ValueError: an argument is unknown or out of range.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}, must be one of {', '.join(WEIGHTINGS)}")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}, must be one of {', '.join(PREDICTION_TYPES)}")
    gamma, k = checks.in_range(min_snr_gamma, "min_snr_gamma", above=0), checks.in_range(p2_k, "p2_k", above=0)
    power = checks.in_range(p2_gamma, "p2_gamma")
    bar = schedule.alphas_cumprod
    if weighting == "uniform":
        return torch.ones_like(bar)
    snr = bar / (1 - bar)
    # W / SNR, so that nothing is divided by an SNR of 0
    if weighting == "min_snr":
        on_epsilon = (gamma / snr).clamp(max=1)
    else:
        on_epsilon = (k + snr) ** -power if weighting == "p2" else torch.ones_like(snr)
    if prediction_type == "epsilon":
        return on_epsilon
    return on_epsilon * (snr if prediction_type == "sample" else snr / (snr + 1))
