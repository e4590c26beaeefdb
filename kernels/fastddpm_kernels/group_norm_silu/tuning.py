"""Tune the norms and their gradients on a GPU: passes, and the groups, pixels and warps of a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels import group_norm_silu as ops
from fastddpm_kernels.device.processors import num_processors
from fastddpm_kernels.group_norm_silu.plan import Plan, choice_of, derived_plan, heuristic_plan
from fastddpm_kernels.tuned import Choice, Tunable
from fastddpm_kernels.tuning import WARPS, Operands, Task, nearest_first

EPS = 1e-5
WAVES = (1, 2, 4, 8, 16)  # programs, as multiples of the processors
THREAD_ELEMENTS = range(4, 129)


class _NormTask(Task):
    """A norm at one shape: images of one memory format."""

    @property
    def channels(self) -> int:
        """Return the number of channels of both sources."""
        return self.named["channels"] + self.named["channels2"]

    def image(self, seed: int | None, channels: int) -> Tensor:
        """Return [N, channels, 1, pixels], random or (seed None) to be written."""
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
    """`group_norm_silu`, or its in-place form, run with and without a residual.

    Attributes:
        one_pass_elements: the most elements that a program's registers may hold.
        tiles: the sizes of a program's tile, in elements, where it loops over several.
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
            if plan is not None and plan not in plans:  # several choices may lead to one plan
                plans.add(plan)
                found.append(choice)
        return found

    def _plan(self, choice: Choice) -> Plan | None:
        return derived_plan(self.named["batch"], self.named["pixels"], self.channels, self.named["groups"], **choice)

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
    """`rms_norm_silu` and its in-place form, one of them with bias and residual; tunes the pixels of a program."""

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


def _gradients(o: Operands, norm: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return dx, and dx2 if there is x2, by autograd of `norm` in `dtype`."""
    x = [o[name].detach().to(dtype).requires_grad_() for name in ("x", "x2") if o[name] is not None]
    with torch.enable_grad():
        y = norm(x[0], x[1] if len(x) > 1 else None)
    return dict(zip(("dx", "dx2"), torch.autograd.grad(y, x, o["dy"].to(dtype)), strict=False))


def _silu_gradient(dy: Tensor, v: Tensor) -> Tensor:
    s = torch.sigmoid(v)
    return dy * s * (1 + v * (1 - s))


def _of_samples(operands: Operands, samples: Tensor) -> Operands:
    """Return `operands` of some samples."""
    names = ("x", "x2", "dy", "time_bias", "scale", "shift", "mean", "rstd")
    return {name: t[samples] if t is not None and name in names else t for name, t in operands.items()}


class GroupNormGradientTask(GroupNormTask):
    """The gradient of `group_norm_silu`, with a time bias."""

    one_pass_elements = 16384  # the kernels hold two tiles
    tiles = (1024, 2048, 4096, 8192)

    def _plan(self, choice: Choice) -> Plan | None:
        return derived_plan(
            self.named["batch"], self.named["pixels"], self.channels, self.named["groups"], **choice, per_channel=True
        )

    def operands(self, seed: int) -> Operands:
        n, own, second = self.named["batch"], self.named["channels"], self.named["channels2"]
        found = self.common(seed) | {
            "bias": self.random(seed + 3, self.channels, dtype=torch.float32),
            "time_bias": self.random(seed + 4, n, self.channels, dtype=torch.float32),
            "dx": self.image(None, own),
            "dx2": self.image(None, second) if second else None,
            "sums": self.empty(3, n, self.channels, dtype=torch.float32),
        }
        found["dy"] = found.pop("y").copy_(self.image(seed + 5, self.channels))
        h = self._groups(found, torch.float32)
        variance, mean = torch.var_mean(h.flatten(2), 2, correction=0)
        return found | {"mean": mean, "rstd": (variance + EPS).rsqrt()}

    def _groups(self, o: Operands, dtype: torch.dtype) -> Tensor:
        """Return the values to normalise, [N, groups, channels of a group, pixels]."""
        h = o["x"] if o["x2"] is None else torch.cat((o["x"], o["x2"]), 1)
        h = h.to(dtype) + o["time_bias"].to(dtype)[:, :, None, None]
        return h.flatten(2).unflatten(1, (self.named["groups"], -1))

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        from fastddpm_kernels.group_norm_silu.triton_backward import backward_launches

        o = operands
        return self.launcher(
            backward_launches(o["dx"], o["dx2"], o["sums"], o["dy"], o["x"], o["weight"], o["bias"], o["mean"],
                              o["rstd"], o["x2"], o["time_bias"], None, None, True, self._plan(choice))
        )  # fmt: skip

    def results(self, operands: Operands) -> dict[str, Tensor]:
        sums = zip(("sum dv", "sum dv u", "sum u"), operands["sums"], strict=True)
        return {name: t for name in ("dx", "dx2") if (t := operands[name]) is not None} | dict(sums)

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        o = _of_samples(operands, samples)

        def norm(x: Tensor, x2: Tensor | None) -> Tensor:
            backend = "reference" if x.dtype == torch.float64 else "eager"
            return ops.group_norm_silu(
                x, o["weight"], o["bias"], self.named["groups"], eps=EPS, x2=x2, time_bias=o["time_bias"],
                backend=backend,
            )  # fmt: skip

        def sums(dtype: torch.dtype) -> dict[str, Tensor]:
            u = (self._groups(o, dtype) - o["mean"].to(dtype)[..., None, None]) * o["rstd"].to(dtype)[..., None, None]
            u = u.flatten(1, 2)
            v = u * o["weight"].to(dtype)[:, None] + o["bias"].to(dtype)[:, None]
            dv = _silu_gradient(o["dy"].to(dtype).flatten(2), v)
            return {"sum dv": dv.sum(2), "sum dv u": (dv * u).sum(2), "sum u": u.sum(2)}

        exact = _gradients(o, norm, torch.float64) | sums(torch.float64)
        eager = _gradients(o, norm, self.key.dtype) | sums(torch.float32)
        return {name: (exact[name], eager[name]) for name in self.results(operands)}

    def cost(self) -> tuple[int, int]:
        elements = self.named["batch"] * self.named["pixels"] * 3 * self.channels
        return elements * self.key.dtype.itemsize, 0


class RMSNormGradientTask(RMSNormTask):
    """The gradient of `rms_norm_silu`, with FiLM; also tunes the number of programs that share a sample."""

    def candidates(self) -> list[Choice]:
        from fastddpm_kernels.group_norm_silu.triton_rms import heuristic_backward

        x = torch.empty_like(self.image(None, self.named["channels"]))
        block_c, pixels = 1 << (self.channels - 1).bit_length(), self.named["pixels"]
        programs = [-(-wave * num_processors(self.device) // self.named["batch"]) for wave in WAVES]
        choices = [
            {"block_p": block_p, "splits": min(splits, -(-pixels // block_p)), "num_warps": warps}
            for block_p in (2**k for k in range(10))
            for warps in WARPS
            if block_p < 2 * pixels and block_p * block_c <= 16384
            and block_p * block_c // (32 * warps) in THREAD_ELEMENTS
            for splits in programs
        ]  # fmt: skip
        return nearest_first(choices, heuristic_backward(x, self.channels))

    def operands(self, seed: int) -> Operands:
        own, second = self.named["channels"], self.named["channels2"]
        found: dict[str, Any] = super().operands(seed)
        del found["residual"]
        found["dy"] = found.pop("y").copy_(self.image(seed + 6, self.channels))
        return found | {
            "dx": self.image(None, own),
            "dx2": self.image(None, second) if second else None,
            "sums": self.empty(2, self.named["batch"], self.channels, dtype=torch.float32),
        }

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        from fastddpm_kernels.group_norm_silu.triton_rms import backward_launches

        o = operands
        launches, partial = backward_launches(
            o["dx"], o["dx2"], o["dy"], o["x"], o["weight"], EPS, o["x2"], o["scale"], o["shift"], True, choice
        )
        run = self.launcher(launches)

        def call() -> None:
            run()
            torch.sum(partial, 2, out=o["sums"])  # as the op ends

        return call

    def results(self, operands: Operands) -> dict[str, Tensor]:
        sums = zip(("sum dv", "sum dv u"), operands["sums"], strict=True)
        return {name: t for name in ("dx", "dx2") if (t := operands[name]) is not None} | dict(sums)

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        o = _of_samples(operands, samples)

        def norm(x: Tensor, x2: Tensor | None) -> Tensor:
            backend = "reference" if x.dtype == torch.float64 else "eager"
            rows = {name: o[name].to(x.dtype) for name in ("scale", "shift")}
            return ops.rms_norm_silu(x, o["weight"], eps=EPS, x2=x2, **rows, backend=backend)

        def sums(dtype: torch.dtype) -> dict[str, Tensor]:
            h = (o["x"] if o["x2"] is None else torch.cat((o["x"], o["x2"]), 1)).to(dtype).flatten(2)
            u = h * (self.channels**0.5 / h.norm(dim=1, keepdim=True).clamp_min(EPS))
            weight, scale, shift = (o[name].to(dtype) for name in ("weight", "scale", "shift"))
            v = u * (weight * (1 + scale))[:, :, None] + shift[:, :, None]
            dv = _silu_gradient(o["dy"].to(dtype).flatten(2), v)
            return {"sum dv": dv.sum(2), "sum dv u": (dv * u).sum(2)}

        exact = _gradients(o, norm, torch.float64) | sums(torch.float64)
        eager = _gradients(o, norm, self.key.dtype) | sums(torch.float32)
        return {name: (exact[name], eager[name]) for name in self.results(operands)}


_NORM = ("batch", "pixels", "channels", "channels2", "groups", "channels_last")
_RMS_NORM = ("batch", "pixels", "channels", "channels2", "channels_last")
_PIXELS, _SPLITS = tuple(2**k for k in range(14)), range(1, 129)
_ONE_PASS = {"one_pass": (True,), "slab_groups": range(1, 1025), "num_warps": WARPS}
_TWO_PASSES = {"one_pass": (False,), "slab_groups": range(1, 1025), "num_warps": WARPS, "block_p": _PIXELS,
               "splits": _SPLITS}  # fmt: skip
_PLANS = (_ONE_PASS, _TWO_PASSES)
_RMS_TILE = {"block_p": _PIXELS, "num_warps": WARPS}
OPS = {
    "group_norm_silu": Tunable(_NORM, _PLANS, GroupNormTask),
    "group_norm_silu_": Tunable(_NORM, _PLANS, GroupNormTask),
    "group_norm_silu_backward": Tunable(_NORM, _PLANS, GroupNormGradientTask, "triton_backward"),
    "rms_norm_silu": Tunable(_RMS_NORM, (_RMS_TILE,), RMSNormTask, "triton_rms"),
    "rms_norm_silu_backward": Tunable(
        _RMS_NORM, ({**_RMS_TILE, "splits": range(1, 8193)},), RMSNormGradientTask, "triton_rms"
    ),
}
