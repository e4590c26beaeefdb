"""The gradients of the norms, which training alone runs: cut into programs as the norms are, and their sums too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastddpm_kernels import group_norm_silu as ops
from fastddpm_kernels.group_norm_silu.plan import Plan, derived_plan, num_processors
from fastddpm_kernels.tuned import Choice
from torch import Tensor

from fastddpm.perf.tuning.norms import EPS, THREAD_ELEMENTS, WARPS, WAVES, GroupNormTask, RMSNormTask
from fastddpm.perf.tuning.task import Operands, nearest_first


def _gradients(o: Operands, norm: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """dx, and dx2 where there is x2, by autograd of `norm` in `dtype`."""
    x = [o[name].detach().to(dtype).requires_grad_() for name in ("x", "x2") if o[name] is not None]
    with torch.enable_grad():
        y = norm(x[0], x[1] if len(x) > 1 else None)
    return dict(zip(("dx", "dx2"), torch.autograd.grad(y, x, o["dy"].to(dtype)), strict=False))


def _silu_gradient(dy: Tensor, v: Tensor) -> Tensor:
    s = torch.sigmoid(v)
    return dy * s * (1 + v * (1 - s))


def _of_samples(operands: Operands, samples: Tensor) -> Operands:
    """What the truth needs of `operands`, for some samples."""
    names = ("x", "x2", "dy", "time_bias", "scale", "shift", "mean", "rstd")
    return {name: t[samples] if t is not None and name in names else t for name, t in operands.items()}


class GroupNormGradientTask(GroupNormTask):
    """The gradient of `group_norm_silu`, with a time bias."""

    one_pass_elements = 16384  # two tiles are held
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
        """What is normalised, [N, groups, channels of a group, pixels]."""
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
    """The gradient of `rms_norm_silu`, with FiLM: also how many programs share a sample, whose sums are then added."""

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
