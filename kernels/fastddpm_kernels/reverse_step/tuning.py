"""Tune the reverse step on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.reverse_step import reverse_step
from fastddpm_kernels.reverse_step.formula import Options
from fastddpm_kernels.tuned import Choice, Tunable
from fastddpm_kernels.tuning import ELEMENTWISE, ElementwiseTask, Operands


class ReverseStepTask(ElementwiseTask):
    """`reverse_step` of a sampling loop. The dtype is the network's; state and given noise are float32."""

    def operands(self, seed: int) -> Operands:
        named, n, channels = self.named, self.named["batch"], self.named["channels"]

        def state(more: int | None, wanted: bool = True, channels: int = channels) -> Tensor | None:
            at = None if more is None else seed + more
            return self.image(at, channels, dtype=torch.float32, last=False) if wanted else None

        def network(more: int | None, channels: int) -> Tensor:
            # In 16 bits a network reads and writes whole vectors of channels.
            whole = -(-channels // 8) * 8 if named["channels_last"] and self.key.dtype.itemsize == 2 else channels
            at = None if more is None else seed + more
            return self.image(at, whole, rows=n * (1 + named["guided"]))[:, :channels]

        made, known = named["noise"] == 2 or named["known"] == 2, bool(named["known"])
        mask = state(5, known, 1)
        return {
            "x": state(0), "out": network(1, channels * (1 + named["learned"])),
            "table": self.vector(1.1, -0.6, 0.5, 0.4, -0.1, 0.3, 0.7)[None].expand(2, -1).contiguous(),
            "step": torch.ones(1, dtype=torch.int64, device=self.device),
            "x_next": state(None), "x0": state(None, bool(named["x0"])),
            "net_in": network(None, channels) if named["net_in"] else None,
            "keys": sample_keys([seed] * n, range(n), self.device) if made else None,
            "noise": state(2, named["noise"] == 1), "x0_prev": state(3, bool(named["multistep"])),
            "log_variance": self.vector(-3, -1)[None].expand(2, -1).contiguous() if named["learned"] else None,
            "guidance_scale": self.vector(2.0) if named["guided"] else None, "known": state(4, known),
            "known_mask": None if mask is None else (mask > 0).float(),
            "known_table": self.vector(0.8, 0.6)[None].expand(2, -1).contiguous() if known else None,
            "known_noise": state(6, named["known"] == 1),
        }  # fmt: skip

    def most_block(self) -> int:
        from fastddpm_kernels.reverse_step.triton import most_block

        return most_block(bool(self.named["known"]), not self.named["channels_last"])

    def launch(self, choice: Choice | None, operands: Operands) -> Any:
        from fastddpm_kernels.reverse_step.triton import make_launch

        o = operands
        options = Options(**{name: o[name] for name in Options._fields if name in o}, clip_range=1.0)
        return make_launch(
            o["x_next"], o["x0"], o["net_in"], o["x"], o["out"], o["table"], o["step"], options, choice
        )  # fmt: skip

    def results(self, operands: Operands) -> dict[str, Tensor]:
        n = self.named["batch"]
        found = {name: operands[name] for name in ("x_next", "x0") if operands[name] is not None}
        if operands["net_in"] is not None:  # under guidance both halves
            found |= {f"net_in {index}": half for index, half in enumerate(operands["net_in"].split(n))}
        return found

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        n, shared = self.named["batch"], ("table", "step", "log_variance", "guidance_scale", "known_table")
        o = {name: t if t is None or name in shared else t[samples] for name, t in operands.items()}
        o["out"] = torch.cat([half[samples] for half in operands["out"].split(n)])
        given = {name: o[name] for name in Options._fields if name in o and name != "clip_range"}

        def step(dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
            wide = {name: t.to(dtype) if name in ("noise", "x0_prev") and t is not None else t
                    for name, t in given.items()}  # fmt: skip
            return reverse_step(
                o["x"].to(dtype).contiguous(), o["out"], o["table"], o["step"], **wide, clip_range=1.0, backend=backend
            )  # fmt: skip

        (exact, exact_x0), (eager, eager_x0) = step(torch.float64, "reference"), step(torch.float32, "eager")
        found = {"x_next": (exact, eager), "x0": (exact_x0, eager_x0)}
        found |= {f"net_in {half}": (exact, eager.to(self.key.dtype)) for half in range(2)}
        return {name: found[name] for name in self.results(operands)}

    def cost(self) -> tuple[int, int]:
        named, network = self.named, self.key.dtype.itemsize
        outs = (1 + named["guided"]) * (1 + named["net_in"]) + named["learned"]
        states = 2 + named["multistep"] + named["x0"] + (named["noise"] == 1) + 2 * bool(named["known"])
        return self.elements * (4 * states + outs * network), 0


# The dtype is the network's. `noise` and `known` are 1 where noise is given, 2 where it is made.
_FIELDS = (
    *("batch", "channels", "pixels", "channels_last", "noise", "guided", "learned", "multistep", "x0", "net_in"),
    "known",
)
OPS = {"reverse_step": Tunable(_FIELDS, ELEMENTWISE, ReverseStepTask)}
