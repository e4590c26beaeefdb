"""Models with labels and closed forms, a gradient, and what else the tests of guidance share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastddpm.process.schedule import NoiseSchedule

LINEAR = NoiseSchedule.linear()
NULL = 3


class Labelled(nn.Module):
    """Depends on everything it is given, sample by sample, and notes the batches it sees."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.seen: list[list[int]] = []
        self.times: list[int] = []
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        self.seen.append(class_labels.tolist())
        self.times.append(int(t[0]))
        shape = (-1, *[1] * (x.ndim - 1))
        out = torch.tanh(x + class_labels.view(shape).to(x) / 4) + 0.2 * t.view(shape).to(x) / 1000
        return torch.cat([out, 0.5 * out], 1) if self.channels > x.shape[1] else out


def label(x: Tensor, value: int) -> Tensor:
    return torch.full((len(x),), value)


def gradient(x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    """Of log p = -(label - mean(x))^2, by autograd as a user would."""
    assert class_labels is not None
    assert torch.is_grad_enabled()
    x = x.requires_grad_()
    log_p = -(class_labels - x.flatten(1).sin().mean(1)).square().sum()
    return torch.autograd.grad(log_p, x)[0]


def toy(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
    return torch.tanh(x * (0.5 + t.view(-1, *[1] * (x.ndim - 1)).to(x) / 1000))


def doubled(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
    return torch.cat([toy(x, t), torch.cos(x)], 1)
