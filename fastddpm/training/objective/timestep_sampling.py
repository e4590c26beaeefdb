"""Draw the timesteps of a batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

KINDS = ("uniform", "stratified", "importance")

_HISTORY = 10  # losses kept per timestep
_UNIFORM_SHARE = 0.001  # keeps every timestep possible


class TimestepSampler(nn.Module):
    """Draw timesteps from random words, so that they are the same on every device and process.

    "uniform": each alone. "stratified": the global batch's are spread evenly over all timesteps, turned together by one
    random number, so that each is still uniform (Kingma et al. 2021, appendix I.1). "importance": in proportion to the
    root of the mean square of a timestep's last 10 losses, weighted back (Nichol & Dhariwal 2021, eq. 18); uniform
    until every timestep has had 10. The state dict holds this history.
    """

    history: Tensor
    counts: Tensor

    def __init__(self, kind: str, num_train_timesteps: int) -> None:
        """Raise ValueError if `kind` is not known."""
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"timestep_sampling is {kind!r}, must be one of {', '.join(KINDS)}")
        self.kind, self.num_train_timesteps = kind, num_train_timesteps
        if kind == "importance":
            self.register_buffer("history", torch.zeros(num_train_timesteps, _HISTORY))
            self.register_buffer("counts", torch.zeros(num_train_timesteps, dtype=torch.int64))

    def forward(self, words: Tensor, shared: Tensor, indices: Tensor, global_batch: int) -> tuple[Tensor, Tensor]:
        """Return the timesteps int64 [N] and the factors of their losses, float32 [N].

        Args:
            words: a random 32-bit word per sample, int64 [N].
            shared: one for the whole global batch, int64 [].
            indices: the samples' numbers within the global batch, int64 [N].
            global_batch: the size of the global batch.
        """
        ones = torch.ones_like(words, dtype=torch.float32)
        if self.kind == "importance":
            probabilities = self.probabilities()
            total = probabilities.cumsum(0)
            u = (words.double() + 0.5) * 2.0**-32
            t = torch.searchsorted(total, u * total[-1], right=True).clamp(max=self.num_train_timesteps - 1)
            return t, (1 / (self.num_train_timesteps * probabilities.index_select(0, t))).float()
        if self.kind == "stratified":
            words = (shared + indices % global_batch * 2**32 // global_batch) & 0xFFFFFFFF
        return words * self.num_train_timesteps >> 32, ones

    def probabilities(self) -> Tensor:
        """Return the probability of each timestep, float64 [T]."""
        uniform = torch.full_like(self.counts, 1, dtype=torch.float64) / self.num_train_timesteps
        roots = self.history.double().square().mean(1).sqrt()
        shares = roots / roots.sum().clamp_min(1e-300)
        mixed = (1 - _UNIFORM_SHARE) * shares + _UNIFORM_SHARE * uniform
        known = (self.counts >= _HISTORY).all() & (roots.sum() > 0)
        return torch.where(known, mixed, uniform)

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses [N] at t int64 [N], of all processes in the order of ranks.

        Every process must contribute equally many. Losses that are not finite are skipped.
        """
        if self.kind != "importance":
            return
        losses = losses.float()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            t, losses = _gather(t), _gather(losses)
        # One infinite loss in the history would make every probability, and so every later loss, NaN. T is not a
        # timestep: its entries go into the places that are dropped.
        t = torch.where(losses.isfinite(), t, self.num_train_timesteps)
        counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        # A timestep's row is a ring buffer; of losses that arrive at once, the last 10 count.
        order = torch.argsort(t, stable=True)
        t, losses = t.index_select(0, order), losses.index_select(0, order)
        place = torch.arange(len(t), device=t.device)
        rank = place - torch.searchsorted(t, t)
        behind = torch.searchsorted(t, t, right=True) - place
        slot = t * _HISTORY + (counts.index_select(0, t) + rank) % _HISTORY
        end = self.history.numel()
        slot = torch.where(behind <= _HISTORY, slot, end).clamp(max=end)
        flat = torch.cat([self.history.flatten(), self.history.new_zeros(1)])
        self.history.copy_(flat.index_copy(0, slot, losses.to(flat.dtype))[:-1].view_as(self.history))
        self.counts.copy_(counts.index_add(0, t, torch.ones_like(t))[:-1])


def _gather(values: Tensor) -> Tensor:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
