"""One batch on the device and the step that advances it.

One step is "predict, then `reverse_step`". Everything it needs (state, table, step counter, keys, labels) is in
device memory before the first one, so that the host only has to ask for the next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fastddpm_kernels.reverse_step import reverse_step_
from torch import Tensor

from fastddpm.coefficients import StepTable


class Loop:
    """The device state of one batch and the step that advances it.

    Attributes:
        x: float32 [N, ...], the state x_t.
        net_in: [N, ...], or [2N, ...] under guidance, what the network reads, in its dtype.
        step: int64 [1], index of the next row of the table.
        timesteps: int64 [S]; table: float32 [S, 7].
        keys: int64 [N, 2], Philox keys (seed, sample index), or None where all noise is given.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        table: StepTable,
        x_T: Tensor,
        *,
        keys: Tensor | None,
        class_labels: Tensor | None,
        guidance_scale: float | None,
        clip_range: float | None,
        network_dtype: torch.dtype,
        backend: str,
    ) -> None:
        device = x_T.device
        self.predict = predict
        self.x = x_T.to(torch.float32).clone(memory_format=torch.contiguous_format)
        self.copies = 1 if guidance_scale is None else 2
        self.net_in = torch.cat([self.x] * self.copies).to(network_dtype)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.timesteps = table.timesteps.to(device)
        self.table = table.rows.to(device, torch.float32)
        self.log_variance = None if table.log_variance is None else table.log_variance.to(device, torch.float32)
        self.keys = keys
        self.class_labels = class_labels
        self.guidance_scale = (
            None if guidance_scale is None else torch.full((1,), guidance_scale, dtype=torch.float32, device=device)
        )
        self.clip_range = clip_range
        self.backend = backend

    def body(self, noise: Tensor | None = None) -> None:
        """One reverse step: x_t to x_{t-1}, in place.

        `noise` [N, ...] takes the place of the Philox noise. Without noise and keys the step adds none.
        """
        t = self.timesteps.index_select(0, self.step).expand(self.net_in.shape[0])
        out = self.predict(self.net_in, t, self.class_labels)
        reverse_step_(
            self.x,
            out,
            self.table,
            self.step,
            keys=None if noise is not None else self.keys,
            noise=noise,
            net_in=self.net_in,
            clip_range=self.clip_range,
            log_variance=self.log_variance,
            guidance_scale=self.guidance_scale,
            backend=self.backend,
        )
        self.step += 1
