"""A frozen U-Net bound to the buffers of one loop: its instructions, their memory, and their time table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastddpm.networks.frozen.builder import Builder
from fastddpm.networks.frozen.instructions import Instruction, Machine

if TYPE_CHECKING:
    from fastddpm.networks.frozen.frozen_unet import FrozenUNet

ALIGNMENT = 256  # bytes, as the allocator's own
# cuDNN is called without torch's own check, which cuts larger batches into pieces.
MOST_ELEMENTS = 2**31 - 1


class Program:
    """The instructions for one batch size, image size and number of steps. Call it with the step counter.

    Attributes:
        instructions: of a step, in order; the first ones look up the step's row of the time table.
        call_instructions: those that `load` runs where conditions may have changed.
        arena: the block of memory that the activations share, uint8 (empty where they have no fixed places).
        loads: how often the time table was filled.
    """

    def __init__(
        self, frozen: FrozenUNet, inputs: Tensor, timesteps: Tensor, labels: Tensor | None,
        conditions: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """See `FrozenUNet.bind`."""
        self._frozen, self._timesteps = frozen, timesteps
        self._out_channels = frozen.blueprint.out_channels
        self._machine = m = Machine(frozen.fused, frozen.static, frozen.backend, frozen.allow_tf32)
        m.timesteps = timesteps
        self._sequences: Tensor | None = None
        if frozen.blueprint.dims == 1:
            self._sequences, inputs = inputs, self._image_of(inputs)
        else:
            inputs = frozen.whole_input(inputs)
        batch, channels, *size = inputs.shape
        self._times = frozen.time_table(m, timesteps, labels, conditions, batch)
        builder = frozen.blueprint.builder(frozen, m, self._times.row, batch, (size[0], size[1]), channels, conditions)
        self._result = builder.lower()
        builder.settle()
        if builder.mixed:
            frozen.mixed.add((batch, (size[0], size[1])))
        self.instructions: list[Instruction] = self._times.instructions + builder.instructions
        self.call_instructions: list[Instruction] = builder.call_instructions
        m.slots = [None] * len(builder.shapes)
        m.slots[builder.INPUT] = inputs
        if builder.workspace_numel:
            m.workspace = torch.empty(builder.workspace_numel, dtype=torch.float32, device=frozen.device)
        self._clear: list[list[int]] = [[] for _ in self.instructions]
        self._place(builder, batch)
        known = frozen.blueprint.conditions
        self._of_samples = [given for name, given in conditions.items() if not known[name].each_step]
        self._of_samples += [] if labels is None else [labels]
        self._seen: tuple[int, list[Tensor], list[Tensor]] = (-1, [], [])
        self.loads = 0

    @torch.no_grad()
    def __call__(self, step: Tensor) -> Tensor:
        """Return the prediction [N, out_channels, H, W] for the inputs at row `step` (int64 [1], on the device).

        The next call may overwrite it.
        """
        if self.loads == 0:
            self.load()
        m = self._machine
        m.step = step
        if self._sequences is not None:
            self._image[:, -self._sequences.shape[1] :].copy_(self._sequences.unsqueeze(2))
        with self._own_dtype():
            for instruction, dead in zip(self.instructions, self._clear, strict=True):
                instruction.run()
                for slot in dead:
                    m.slots[slot] = None
        result: Tensor = m.slots[self._result][:, : self._out_channels]
        return result if self._sequences is None else result.squeeze(2)

    def _image_of(self, sequences: Tensor) -> Tensor:
        """Return zeros [N, C, 1, L], channels-last, for sequences [N, C, L] and the optional channels before them."""
        n, _, length = sequences.shape
        self._image = sequences.new_zeros(n, 1, length, self._frozen.blueprint.in_channels).permute(0, 3, 1, 2)
        return self._image

    def _own_dtype(self) -> AbstractContextManager[object]:
        """Keep autocast, if it is on, from choosing another dtype for some instructions."""
        device = self._frozen.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, enabled=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self) -> None:
        """Take over the present timesteps, labels and conditions, and the U-Net's weights if they have changed."""
        version = self._frozen.refresh()
        seen_version, seen_timesteps, seen_samples = self._seen
        new_steps = version != seen_version or not _same(seen_timesteps, [self._timesteps])
        new_samples = version != seen_version or not _same(seen_samples, self._of_samples)
        if new_steps:
            self._times.load_timesteps()
            self.loads += 1
        if new_steps or new_samples:
            self._times.load_samples()
        if new_samples:
            self._run_once()
        self._seen = version, [self._timesteps.clone()], [given.clone() for given in self._of_samples]

    def _run_once(self) -> None:
        """Run the instructions of a call, and put what has no place of its own into the slot's."""
        slots = self._machine.slots
        with self._own_dtype():
            for instruction in self.call_instructions:
                instruction.run()
                for slot in instruction.writes:
                    if slots[slot] is not self._kept[slot]:
                        self._kept[slot].copy_(slots[slot])
                        slots[slot] = self._kept[slot]

    def _place(self, builder: Builder, batch: int) -> None:
        """Place slots in the arena (if static), and note after which instruction the other slots are dead."""
        m, dtype, device = self._machine, self._frozen.dtype, self._frozen.device
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for index, instruction in enumerate(self.instructions):
            for slot in instruction.writes:
                first.setdefault(slot, index)
            for slot in (*instruction.reads, *instruction.writes):
                last[slot] = index
        last[self._result] = len(self.instructions)

        def own_memory(slot: int) -> Tensor:
            channels, height, width = builder.shapes[slot]
            return torch.zeros(batch, height, width, channels, dtype=dtype, device=device).permute(0, 3, 1, 2)

        # A border is zeroed only once, so a slot with a border shares its memory with no other. What is computed once
        # per call must outlast every step.
        bordered = set(builder.bordered) if m.fused else set()
        self._kept = {slot: own_memory(slot) for one in builder.call_instructions for slot in one.writes}
        assert not self._kept.keys() & first.keys(), "a step writes what is computed once per call"
        for slot in bordered - self._kept.keys():
            m.slots[slot] = own_memory(slot)
        for slot, place in self._kept.items():
            m.slots[slot] = place
        largest = max((math.prod(builder.shapes[slot]) for slot in first), default=0)
        if m.static and not m.native and batch * largest > MOST_ELEMENTS:
            raise torch.OutOfMemoryError(
                f"{batch} samples at a time make an activation of {batch * largest} elements, and cuDNN's convolutions "
                f"count to {MOST_ELEMENTS}: batch_size must be at most {MOST_ELEMENTS // largest}"
            )
        placed = set(first) - bordered - builder.loose if m.static else set()
        sizes = {slot: batch * math.prod(builder.shapes[slot]) * dtype.itemsize for slot in placed}
        offsets, total = plan_memory(sizes, first, last)
        self.arena = torch.empty(total, dtype=torch.uint8, device=device)
        for slot, offset in offsets.items():
            channels, height, width = builder.shapes[slot]
            block = self.arena[offset : offset + sizes[slot]].view(dtype)
            m.slots[slot] = block.view(batch, height, width, channels).permute(0, 3, 1, 2)
        m.fixed = {slot for slot, place in enumerate(m.slots) if place is not None}
        for slot in set(first) - bordered - placed - {self._result}:
            self._clear[last[slot]].append(slot)


def _same(seen: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return len(seen) == len(now) and all(map(torch.equal, seen, now))


def plan_memory(sizes: dict[int, int], first: dict[int, int], last: dict[int, int]) -> tuple[dict[int, int], int]:
    """Place blocks so that those alive at the same time do not overlap: the largest first, each as low as possible.

    Args:
        sizes: bytes of every block.
        first, last: the first and last instruction that needs a block, inclusive.

    Returns:
        The offset of every block, and the size of the whole.
    """
    offsets: dict[int, int] = {}
    total = 0
    for block in sorted(sizes, key=lambda b: (-sizes[b], first[b])):
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if first[other] <= last[block] and first[block] <= last[other]
        )
        offset = 0
        for start, end in taken:
            if offset + sizes[block] <= start:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[block] = offset
        total = max(total, offset + sizes[block])
    return offsets, total
