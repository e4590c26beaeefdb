"""Decide the position of every image in a run: a pure function of the seed, so nothing must be saved.

Image number g of a run, counted from its beginning over all epochs, steps and processes, is entry g mod n of the
permutation of epoch g div n. Its randomness (flips, draws of a Dataset) is a function of its step and its number within
the step. So the data are the same after a resume, on any number of processes and with any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fastddpm_kernels.philox import STREAM_AUGMENTATION, STREAM_ORDER, random_words, sample_keys
from torch import Tensor


class Pick(NamedTuple):
    """One image to read.

    Attributes:
        image: its number in the data set.
        seed: of the random numbers drawn while reading it, 0 <= seed < 2^62.
    """

    image: int
    seed: int


def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch, int64 [length], by sorting random numbers of 63 bits."""
    words = random_words(sample_keys([seed], [epoch]), 0, STREAM_ORDER, 2 * length, backend="eager")[0].view(length, 2)
    return torch.argsort((words[:, 0] << 31) + (words[:, 1] >> 1), stable=True)


@dataclass(frozen=True)
class Batches:
    """The forward passes of a process.

    Attributes:
        length: images in the data set.
        seed: of the order.
        batch_size: images of a forward pass, over all processes.
        passes: forward passes of a step.
        process, processes: the number of this process, and the number of all.
    """

    length: int
    seed: int
    batch_size: int
    passes: int = 1
    process: int = 0
    processes: int = 1

    @property
    def local(self) -> int:
        """Return the number of images of a forward pass in this process."""
        return self.batch_size // self.processes

    def first_sample(self, turn: int) -> int:
        """Return the number, within its step, of this process' first image in forward pass `turn`."""
        return turn * self.batch_size + self.process * self.local

    def words(self, step: int, turn: int) -> Tensor:
        """Return three random words for each image of a forward pass, int64 [local, 3]; flips read the first."""
        first = self.first_sample(turn)
        keys = sample_keys([self.seed] * self.local, range(first, first + self.local))
        return random_words(keys, step, STREAM_AUGMENTATION, 3, backend="eager")

    def flips(self, step: int, turn: int) -> Tensor:
        """Return which images of a forward pass are mirrored: bool [local]."""
        return self.words(step, turn)[:, 0] % 2 == 1

    def picks(self, start: int, stop: int) -> Iterator[list[Pick]]:
        """Yield the picks of each forward pass of steps `start` to `stop` - 1."""
        orders: dict[int, Tensor] = {}
        for step in range(start, stop):
            for turn in range(self.passes):
                first = step * self.batch_size * self.passes + self.first_sample(turn)
                numbers = [divmod(number, self.length) for number in range(first, first + self.local)]
                for epoch in {epoch for epoch, _ in numbers} - orders.keys():
                    orders[epoch] = permutation(self.length, self.seed, epoch)
                for epoch in orders.keys() - {epoch for epoch, _ in numbers}:
                    del orders[epoch]
                _, high, low = self.words(step, turn).unbind(1)
                seeds = (high << 30) + (low >> 2)
                yield [
                    Pick(int(orders[epoch][position]), seed)
                    for (epoch, position), seed in zip(numbers, seeds.tolist(), strict=True)
                ]
