"""The norms: in one pass or two, which groups and pixels a program takes, and how many warps it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastddpm_kernels import group_norm_silu as ops
from fastddpm_kernels.group_norm_silu.plan import Plan, choice_of, derived_plan, heuristic_plan, num_processors
from fastddpm_kernels.tuned import Choice
from torch import Tensor

from fastddpm.perf.tuning.task import Operands, Task, nearest_first

EPS = 1e-5
WAVES = (1, 2, 4, 8, 16)  # programs, as multiples of the processors
THREAD_ELEMENTS = range(4, 129)
WARPS = (1, 2, 4, 8, 16)


class _NormTask(Task):
    """What the norms share: images of one memory format."""

    @property
    def channels(self) -> int:
        """Of both sources."""
        return self.named["channels"] + self.named["channels2"]

    def image(self, seed: int | None, channels: int) -> Tensor:
        """[N, channels, 1, pixels], random or (seed None) to be written."""
        n, pixels, last = self.named["batch"], self.named["pixels"], self.named["channels_last"]
        shape = (n, 1, pixels, channels) if last else (n, channels, 1, pixels)
        values = self.empty(*shape) if seed is None else self.random(seed, *shape)
        return values.movedim(-1, 1) if last else values

    def common(self, seed: int) -> Operands:
        own, second = self.named["channels"], self.named["channels2"]
        return {
            "x": self.image(seed, own),
            "x2": self.image(seed + 1, second) if second else None,
            "y": self.image(None, self.channels),
            "weight": 1 + 0.1 * self.random(seed + 2, self.channels, dtype=torch.float32),
        }

    def launcher(self, launches: list[Any]) -> Callable[[], object]:
        def call() -> None:
            for launch in launches:
                launch.run()

        return call


class GroupNormTask(_NormTask):
    """`group_norm_silu`, or its form in place, which runs both with a residual and without.

    Attributes:
        one_pass_elements: that a program's registers may hold.
        tiles: elements of a program's tile where it loops over several.
    """

    one_pass_elements = 32768
    tiles: tuple[int, ...] = (2048, 4096, 8192, 16384)

    @property
    def in_place(self) -> bool:
        return self.key.op == "group_norm_silu_"

    def candidates(self) -> list[Choice]:
        processors = num_processors(self.device)
        heuristic = choice_of(heuristic_plan(self.key.op, self.key.shape, self.key.dtype.itemsize, processors))
        found, plans = [], set()
        for choice in nearest_first(self._choices(processors), heuristic):
            plan = self._plan(choice)
            if plan is not None and plan not in plans:  # several choices may come down to one plan
                plans.add(plan)
                found.append(choice)
        return found

    def _plan(self, choice: Choice) -> Plan | None:
        return derived_plan(
            self.named["batch"], self.named["pixels"], self.channels, self.named["groups"], **choice
        )

    def _choices(self, processors: int) -> Iterator[Choice]:
        batch, pixels, groups = self.named["batch"], self.named["pixels"], self.named["groups"]
        size = self.channels // groups
        slabs = [slab for slab in (2**k for k in range(11)) if slab <= groups] + [groups]
        for slab in slabs:
            width = 1 << (slab * size - 1).bit_length()
            elements = width << max(pixels - 1, 0).bit_length()
            for warps in WARPS:
                if elements <= self.one_pass_elements and elements // (32 * warps) in THREAD_ELEMENTS:
                    yield {"one_pass": True, "slab_groups": slab, "num_warps": warps}
                if width > 256 or pixels < 16:
                    continue
                for tile in self.tiles:
                    block_p = max(tile // width, 1)
                    if block_p > 2 * pixels or tile // (32 * warps) not in THREAD_ELEMENTS:
                        continue
                    for wave in WAVES:
                        splits = min(max(wave * processors // (batch * -(-groups // slab)), 1), 128)
                        yield {"one_pass": False, "slab_groups": slab, "num_warps": warps, "block_p": block_p,
                               "splits": splits}  # fmt: skip

    def operands(self, seed: int) -> Operands:
        n, own = self.named["batch"], self.named["channels"]
        found = self.common(seed) | {
            "bias": self.random(seed + 3, self.channels, dtype=torch.float32),
            "time_bias": self.random(seed + 4, n, self.channels, dtype=torch.float32),
        }
        if self.in_place:
            more = {"residual": self.image(seed + 5, own), "total": self.image(None, own)}
            return found | more | {"y_residual": self.image(None, self.channels)}
        rows = {name: self.empty(n, self.named["groups"], dtype=torch.float32) for name in ("mean", "rstd")}
        return found | rows

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        from fastddpm_kernels.group_norm_silu.triton import forward_launches, in_place_launches

        o, plan = operands, self._plan(choice)
        if not self.in_place:
            return self.launcher(
                forward_launches(o["y"], o["mean"], o["rstd"], o["x"], o["weight"], o["bias"], EPS, o["x2"],
                                 o["time_bias"], None, None, True, plan)
            )  # fmt: skip
        launches = []
        for y, residual, total in ((o["y"], None, None), (o["y_residual"], o["residual"], o["total"])):
            launches += in_place_launches(
                y, o["x"], o["weight"], o["bias"], self.named["groups"], EPS, o["x2"], residual, total, o["time_bias"],
                None, None, True, None, plan,
            )  # fmt: skip
        return self.launcher(launches)

    def results(self, operands: Operands) -> dict[str, Tensor]:
        names = ("y", "y_residual", "total") if self.in_place else ("y", "mean", "rstd")
        return {name: operands[name] for name in names}

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        o = {name: t[samples] if t is not None and name in ("x", "x2", "residual", "time_bias") else t
             for name, t in operands.items()}  # fmt: skip

        def norm(x: Tensor, backend: str) -> Tensor:
            second = None if o["x2"] is None else o["x2"].to(x.dtype)
            return ops.group_norm_silu(
                x, o["weight"], o["bias"], self.named["groups"], eps=EPS, x2=second, time_bias=o["time_bias"],
                backend=backend,
            )  # fmt: skip

        found = {"y": (norm(o["x"].double(), "reference"), norm(o["x"], "eager"))}
        if self.in_place:
            total = o["x"] + o["residual"]  # rounded, as all backends hold it
            found["total"] = (o["x"].double() + o["residual"].double(), total)
            found["y_residual"] = (norm(total.double(), "reference"), norm(total, "eager"))
            return found
        h = o["x"] if o["x2"] is None else torch.cat((o["x"], o["x2"]), 1)
        h = (h.double() + o["time_bias"].double()[:, :, None, None]).unflatten(1, (self.named["groups"], -1))
        variance, mean = torch.var_mean(h.flatten(2), 2, correction=0)
        rstd = (variance + EPS).rsqrt()
        return found | {"mean": (mean, mean.float()), "rstd": (rstd, rstd.float())}

    def cost(self) -> tuple[int, int]:
        n, pixels, own = self.named["batch"], self.named["pixels"], self.named["channels"]
        images = 2 * self.channels + (2 * self.channels + 2 * own if self.in_place else 0)
        return n * pixels * images * self.key.dtype.itemsize, 0


class RMSNormTask(_NormTask):
    """`rms_norm_silu` and its form in place, of which one has bias and residual: how many pixels a program takes."""

    def candidates(self) -> list[Choice]:
        from fastddpm_kernels.group_norm_silu.triton_rms import heuristic_choice

        x = torch.empty_like(self.image(None, self.named["channels"]))
        block_c, pixels = 1 << (self.channels - 1).bit_length(), self.named["pixels"]
        choices = [
            {"block_p": block_p, "num_warps": warps}
            for block_p in (2**k for k in range(10))
            for warps in WARPS
            if block_p < 2 * pixels and block_p * block_c <= 16384
            and block_p * block_c // (32 * warps) in THREAD_ELEMENTS
        ]  # fmt: skip
        return nearest_first(choices, heuristic_choice(x, self.channels))

    def operands(self, seed: int) -> Operands:
        n = self.named["batch"]
        more = {name: self.random(seed + k, n, self.channels) for k, name in ((3, "scale"), (4, "shift"))}
        return self.common(seed) | more | {"residual": self.image(seed + 5, self.channels)}

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        from fastddpm_kernels.group_norm_silu.triton_rms import forward_launches

        o = operands
        return self.launcher(
            forward_launches(o["y"], o["x"], o["weight"], EPS, o["x2"], o["scale"], o["shift"], True, None,
                             o["residual"], choice)
        )  # fmt: skip

    def results(self, operands: Operands) -> dict[str, Tensor]:
        return {"y": operands["y"]}

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        o = {name: t if t is None or name == "weight" else t[samples] for name, t in operands.items()}

        def norm(x: Tensor, backend: str) -> Tensor:
            second = None if o["x2"] is None else o["x2"].to(x.dtype)
            rows = {name: o[name].to(x.dtype) for name in ("scale", "shift")}
            value = ops.rms_norm_silu(x, o["weight"], eps=EPS, x2=second, **rows, backend=backend)
            return value + o["residual"].to(x.dtype)

        return {"y": (norm(o["x"].double(), "reference"), norm(o["x"], "eager"))}

    def cost(self) -> tuple[int, int]:
        elements = self.named["batch"] * self.named["pixels"] * 3 * self.channels
        return elements * self.key.dtype.itemsize, 0
