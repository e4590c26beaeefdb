"""Average the weights over the training, exponentially in the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class ExponentialAverage(AveragedModel):
    """Average with torch's AveragedModel and a warm-up: w <- d w + (1 - d) new, d = min(decay, (1 + n) / (10 + n)).

    One foreach operation per step. AveragedModel's own update copies its counter to the device every step, which on
    CUDA waits until the device has done all its work; here the counter stays on the host.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        super().__init__(model)
        self.requires_grad_(False)
        self.eval()
        self.decay, self.warmup = decay, warmup

    def decay_at(self, step: int) -> float:
        """Return the decay of step number `step`, from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of one more step into the average; copy buffers."""
        decay = self.decay_at(int(self.n_averaged))
        averaged, current = list(self.module.parameters()), list(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)  # type: ignore[arg-type]
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        self.n_averaged += 1

    def train(self, mode: bool = True) -> ExponentialAverage:
        """Stay in evaluation mode: an average is never trained."""
        return super().train(False)


def averages(model: nn.Module, decays: Sequence[float], *, warmup: bool) -> list[ExponentialAverage]:
    """Return an average of `model` for each decay; each starts as a copy of it."""
    return [ExponentialAverage(model, decay, warmup=warmup) for decay in decays]
