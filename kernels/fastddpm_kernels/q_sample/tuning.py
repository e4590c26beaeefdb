"""Tune the noising step on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.q_sample import q_sample
from fastddpm_kernels.tuned import Choice, Tunable
from fastddpm_kernels.tuning import ELEMENTWISE, ElementwiseTask, Operands


class QSampleTask(ElementwiseTask):
    """`q_sample`: the images of a training step are noised."""

    @property
    def prediction_type(self) -> str:
        return ("sample", "epsilon", "v_prediction")[self.named["target"]]

    def operands(self, seed: int) -> Operands:
        n, channels, given = self.named["batch"], self.named["channels"], self.named["noise"] == 1
        angle = torch.linspace(0.1, 1.5, 7, device=self.device)
        return {
            "x0": self.image(seed, channels),
            "table": torch.stack([angle.cos(), angle.sin()], 1),
            "t": torch.arange(n, device=self.device) % 7,
            "noise": self.image(seed + 1, channels) if given else None,
            "keys": None if given else sample_keys([seed] * n, range(n), self.device),
            "step": None if given else torch.full((1,), 3, dtype=torch.int64, device=self.device),
            "x_t": self.image(None, channels),
            "target": self.image(None, channels) if self.named["target"] else None,
        }

    def most_block(self) -> int:
        from fastddpm_kernels.q_sample.triton import most_block

        return most_block(self.key.dtype.itemsize)

    def launch(self, choice: Choice | None, operands: Operands) -> Any:
        from fastddpm_kernels.q_sample.triton import make_launch

        return make_launch(**operands, prediction_type=self.prediction_type, choice=choice)

    def results(self, operands: Operands) -> dict[str, Tensor]:
        return {name: t for name in ("x_t", "target") if (t := operands[name]) is not None}

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        o = {name: t[samples] if t is not None and name in ("x0", "t", "noise", "keys") else t
             for name, t in operands.items()}  # fmt: skip
        given = {name: o[name] for name in ("t", "keys", "step")}

        def noised(dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
            noise = None if o["noise"] is None else o["noise"].to(dtype)
            return q_sample(
                o["x0"].to(dtype), o["table"], noise=noise, **given, prediction_type=self.prediction_type,
                backend=backend,
            )  # fmt: skip

        pairs = zip(noised(torch.float64, "reference"), noised(self.key.dtype, "eager"), strict=True)
        return {name: pair for name, pair in zip(("x_t", "target"), pairs, strict=True) if operands[name] is not None}

    def cost(self) -> tuple[int, int]:
        images = 2 + (self.named["noise"] == 1) + bool(self.named["target"])
        return images * self.elements * self.key.dtype.itemsize, 0


# `noise` is 1 where it is given, 2 where it is made; `target` is 1 for the noise, 2 for the velocity.
_FIELDS = ("batch", "channels", "pixels", "channels_last", "noise", "target")
OPS = {"q_sample": Tunable(_FIELDS, ELEMENTWISE, QSampleTask)}
