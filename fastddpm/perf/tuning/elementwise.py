"""The element-wise ops on a GPU: how many elements a program takes, and how many warps it has.

Results are the same bits whatever is chosen. Still they are held against float64: a compiler may be wrong.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.q_sample import q_sample
from fastddpm_kernels.residual_add import residual_add_
from fastddpm_kernels.reverse_step import reverse_step
from fastddpm_kernels.reverse_step.formula import Options
from fastddpm_kernels.tuned import Choice
from torch import Tensor

from fastddpm.perf.tuning.task import Operands, Task, nearest_first

WARPS = (1, 2, 4, 8, 16)
THREAD_ELEMENTS = (2, 4, 8, 16)  # of a program in each thread


class _ElementwiseTask(Task):
    """What the element-wise ops share: their choices, images of one memory format, one launch."""

    def candidates(self) -> list[Choice]:
        blocks = [
            {"block": 32 * warps * elements, "num_warps": warps} for warps in WARPS for elements in THREAD_ELEMENTS
        ]
        return nearest_first(blocks, self.heuristic())

    def another(self, operands: Operands) -> Operands:
        return self.operands(1)  # a clone of a slice would have other strides

    def heuristic(self) -> Choice:
        """What is chosen where no table has a choice."""
        from fastddpm_kernels.device.strided import BLOCK, NUM_WARPS

        return {"block": BLOCK, "num_warps": NUM_WARPS}

    @abstractmethod
    def launch(self, choice: Choice | None, operands: Operands) -> Any:
        """The one launch of the op."""

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        from fastddpm_kernels.device.strided import run

        made, like = self.launch(choice, operands), next(iter(self.results(operands).values()))
        return lambda: run(made, like)

    def image(
        self, seed: int | None, channels: int, *, height: int = 1, width: int | None = None, rows: int | None = None,
        dtype: torch.dtype | None = None, last: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """[N, channels, height, width], random or (seed None) to be written."""
        n, width = rows or self.named["batch"], self.named["pixels"] if width is None else width
        last = bool(self.named["channels_last"]) if last is None else last
        shape = (n, height, width, channels) if last else (n, channels, height, width)
        values = self.empty(*shape, dtype=dtype) if seed is None else self.random(seed, *shape, dtype=dtype)
        return values.movedim(-1, 1) if last else values

    def vector(self, *values: float) -> Tensor:
        """float32, on the device."""
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    @property
    def elements(self) -> int:
        """Of an image of all samples."""
        return self.named["batch"] * self.named["channels"] * self.named["pixels"]


class QSampleTask(_ElementwiseTask):
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


class ReverseStepTask(_ElementwiseTask):
    """`reverse_step` as a sampling loop runs it. The dtype is the network's; state and given noise are float32."""

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


class ResidualAddTask(_ElementwiseTask):
    """`residual_add_`, into an image with a border or without."""

    def heuristic(self) -> Choice:
        from fastddpm_kernels.residual_add.triton import heuristic_choice

        return heuristic_choice(self.key.dtype.itemsize)

    def operands(self, seed: int) -> Operands:
        named, channels = self.named, self.named["channels"]
        height, width, more = named["height"], named["width"], named["padded"]
        x, residual = (self.image(seed + k, channels, height=height, width=width) for k in (0, 1))
        y = self.image(None, channels, height=height + more, width=width + more)[:, :, :height, :width]
        bias = self.random(seed + 2, channels, 1, 1, dtype=torch.float32)
        return {
            "y": y, "x": x, "residual": residual if named["residual"] else None,
            "bias": bias if named["bias"] else None, "total": torch.empty_like(x) if named["total"] else None,
        }  # fmt: skip

    def launch(self, choice: Choice | None, operands: Operands) -> Any:
        from fastddpm_kernels.residual_add.triton import make_launch

        return make_launch(**operands, choice=choice)

    def results(self, operands: Operands) -> dict[str, Tensor]:
        return {name: t for name in ("y", "total") if (t := operands[name]) is not None}

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        bias = None if operands["bias"] is None else operands["bias"].flatten()
        found = []
        for dtype, backend in ((torch.float64, "reference"), (self.key.dtype, "eager")):
            x, residual = (None if (t := operands[n]) is None else t[samples].to(dtype) for n in ("x", "residual"))
            assert x is not None
            y = torch.empty_like(x)
            residual_add_(y, x, residual=residual, bias=bias, backend=backend)
            found.append(y)
        return {name: (found[0], found[1]) for name in self.results(operands)}

    def cost(self) -> tuple[int, int]:
        named = self.named
        images = 2 + named["residual"] + named["total"]
        elements = named["batch"] * named["channels"] * named["height"] * named["width"]
        return images * elements * self.key.dtype.itemsize, 0
