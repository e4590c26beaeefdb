"""Draw all random numbers of a training step as a function of (seed, sample, step) alone.

A sample's number is its index in the step's global batch. So a step draws the same numbers however the batch is split
over processes, and resuming needs no state of a random generator.
"""

from __future__ import annotations

import numbers

import torch
from fastddpm_kernels.philox import (
    STREAM_OFFSET,
    STREAM_PERTURBATION,
    STREAM_Q_SAMPLE,
    STREAM_TRAINING,
    normal,
    random_words,
)
from torch import Tensor


def noise_keys(seed: int, count: int, first_sample: int, device: torch.device) -> Tensor:
    """Return `philox.sample_keys` of `count` samples from `first_sample` on, made on the device: int64 [count, 2]."""
    index = torch.arange(first_sample, first_sample + count, device=device)
    return torch.stack([torch.full_like(index, seed - 2**64 if seed >= 2**63 else seed), index], dim=1)


class Draws:
    """The random numbers of a batch at one step.

    Attributes:
        keys: int64 [N, 2].
        step: int64 [1].
        timestep, label: a 32-bit word of each sample, int64 [N].
        rotation, coin: one of the whole global batch, int64 [].
    """

    def __init__(self, seed: int, count: int, first_sample: int, step: int | Tensor, device: torch.device) -> None:
        """Draw for `step`: an int from 0 to 2^32 - 1, or int64 [] or [1].

        Raises:
            TypeError, ValueError: `step` or `first_sample` has a wrong type or value.
        """
        if first_sample < 0:
            raise ValueError(f"first_sample is {first_sample}, must be at least 0")
        self.keys = noise_keys(seed, count, first_sample, device)
        self._seed, self._given = seed, step
        if isinstance(step, Tensor):
            if step.dtype != torch.int64 or step.numel() != 1:
                raise ValueError(f"step is {step.dtype} {list(step.shape)}, must be an int or an int64 tensor of one")
            self.step = step.reshape(1).to(device)
        elif isinstance(step, bool) or not isinstance(step, numbers.Integral):
            raise TypeError(f"step is {step!r}, must be an int or an int64 tensor of one")
        elif not 0 <= step < 2**32:
            raise ValueError(f"step is {step}, must be from 0 to 2^32 - 1")
        else:
            self.step = torch.full((1,), step, dtype=torch.int64, device=device)
        # The words of the whole batch are those of sample 0, whichever process has it.
        keys = torch.cat([noise_keys(seed, 1, 0, device), self.keys])
        words = random_words(keys, self.step, STREAM_TRAINING, 4)
        self.timestep, self.label, self.rotation, self.coin = words[1:, 0], words[1:, 1], words[0, 2], words[0, 3]

    def dropped(self, share: float) -> Tensor:
        """Return which samples lose their label: bool [N]."""
        return self.label < round(share * 2**32)

    def heads(self) -> bool | Tensor:
        """Toss a coin for the whole batch: a bool if reading it needs no wait and breaks no graph, else a tensor."""
        if torch.compiler.is_compiling() or (isinstance(self._given, Tensor) and self._given.device.type != "cpu"):
            return self.coin < 2**31
        step = self._given.reshape(1) if isinstance(self._given, Tensor) else self._given
        words = random_words(noise_keys(self._seed, 1, 0, torch.device("cpu")), step, STREAM_TRAINING, 4)
        return bool(words[0, 3] < 2**31)

    def noise(self, x0: Tensor, *, offset: float, immiscible: bool) -> Tensor:
        """Return the noise of each sample: float32 like `x0` [N, C, ...].

        Args:
            x0: the data.
            offset: the strength of a further normal number per sample and channel ("offset noise", Guttenberg 2023).
            immiscible: pair noise and data so that they are close ("Immiscible Diffusion", Li et al. 2024).
        """
        z = normal(self.keys, x0.shape[1:], step=self.step, stream=STREAM_Q_SAMPLE)
        if offset:
            shift = normal(self.keys, x0.shape[1:2], step=self.step, stream=STREAM_OFFSET)
            z = z + offset * shift.view(*x0.shape[:2], *[1] * (x0.ndim - 2))
        return z.index_select(0, nearest_noise(x0, z)) if immiscible else z

    def perturbation(self, x0: Tensor) -> Tensor:
        """Return the noise that is added to the input but not to the target: float32 like `x0`."""
        return normal(self.keys, x0.shape[1:], step=self.step, stream=STREAM_PERTURBATION)


def nearest_noise(x0: Tensor, noise: Tensor) -> Tensor:
    """Return the assignment of noise to samples with the least sum of distances: a permutation int64 [N].

    The function waits for the device and cannot be compiled: scipy solves the assignment on the host.
    """
    from scipy.optimize import linear_sum_assignment

    distances = torch.cdist(x0.flatten(1).float(), noise.flatten(1).float())
    return torch.from_numpy(linear_sum_assignment(distances.cpu().numpy())[1]).to(x0.device)
