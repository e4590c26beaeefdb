"""The preconditioners of EDM and PhysicsNeMo: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022).

EDMPrecond, EDMPrecondSuperResolution   table 1, "Ours"
VPPrecond, VEPrecond                    Song et al. 2021, "VP" and "VE"
iDDPMPrecond                            Nichol & Dhariwal 2021; the network's second half of channels is not read
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastddpm.networks.frozen.kinds.edm.parts import is_of_edm


class Level(NamedTuple):
    """The coefficients at one noise level, computed in float32 as the libraries do."""

    c_skip: float
    c_out: float
    c_in: float
    c_noise: float


def _edm(net: Any, sigma: Tensor) -> tuple[Tensor | float, ...]:
    data = net.sigma_data
    total = sigma**2 + data**2
    return data**2 / total, sigma * data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def _vp(net: Any, sigma: Tensor) -> tuple[Tensor | float, ...]:
    return 1.0, -sigma, 1 / (sigma**2 + 1).sqrt(), (net.M - 1) * net.sigma_inv(sigma)


def _ve(net: Any, sigma: Tensor) -> tuple[Tensor | float, ...]:
    return 1.0, sigma, 1.0, (0.5 * sigma).log()


def _iddpm(net: Any, sigma: Tensor) -> tuple[Tensor | float, ...]:
    index = net.round_sigma(sigma, return_index=True)
    return 1.0, -sigma, 1 / (sigma**2 + 1).sqrt(), net.M - 1 - index.to(torch.float32)


_FORMULAS: dict[str, Callable[[Any, Tensor], tuple[Tensor | float, ...]]] = {
    "EDMPrecond": _edm,
    "EDMPrecondSuperResolution": _edm,
    "EDMPrecondSR": _edm,
    "VPPrecond": _vp,
    "VEPrecond": _ve,
    "iDDPMPrecond": _iddpm,
}
REGRESSIONS = ("CorrDiffRegressionUNet", "UNet")


def kind_of(net: object) -> str | None:
    """Return the name of the first class of a network that is a known preconditioner or regression, or None."""
    if not isinstance(net, nn.Module):
        return None
    names = (kind.__name__ for kind in type(net).__mro__ if is_of_edm(kind))
    return next((name for name in names if name in _FORMULAS or name in REGRESSIONS), None)


def level_of(net: Any, sigma: Tensor | float) -> Level:
    """Return the coefficients of a preconditioner at a noise level above 0."""
    at = torch.as_tensor(sigma).reshape(1).to(torch.float32)
    device = next(net.parameters()).device
    found = _FORMULAS[kind_of(net) or ""](net, at.to(device))
    return Level(*(float(value) for value in found))


def why_not(net: Any) -> str | None:
    """Return why `level_of` and an input of [x, condition] do not say what a preconditioner computes, or None."""
    kind = kind_of(net)
    if kind is None:
        return f"it is a {type(net).__name__}, must be one of {', '.join((*_FORMULAS, *REGRESSIONS))}"
    if isinstance(getattr(net, "sigma_data", None), Tensor) and net.sigma_data.numel() != 1:
        return f"its sigma_data has {net.sigma_data.numel()} values, must be one number"
    if getattr(net, "scale_cond_input", False):
        return "its scale_cond_input is True, must be False: the condition would change with every step"
    return None
