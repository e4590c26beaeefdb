"""Changed weights are seen however they were written, and copies take them over."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fastddpm_kernels import native as _native
from torch import Tensor, nn

from fastddpm.networks.weights import Follower, Watch, fingerprint


def make() -> nn.Module:
    """Parameters of several dtypes, and buffers of numbers, of counts and of flags."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double(), nn.Linear(2, 2).bfloat16())
    module.register_buffer("flags", torch.tensor([True, False]))
    module.register_buffer("waves", torch.zeros(2, dtype=torch.complex64))
    return module


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda module: module[0].weight.mul_(2),
    "past autograd": lambda module: module[0].weight.data.mul_(2),
    "a sign": lambda module: module[2].weight.data[0, 0].neg_(),
    "bfloat16": lambda module: module[3].bias.data.add_(1),
    "a buffer": lambda module: module[1].running_mean.data.add_(1e-3),
    "a count": lambda module: module[1].num_batches_tracked.data.add_(1),
    "a flag": lambda module: module.flags.data.fill_(True),
    "a complex number": lambda module: module.waves.data.add_(1j),
    "another tensor": lambda module: setattr(module[0], "bias", nn.Parameter(module[0].bias.clone())),
    "a load": lambda module: module.load_state_dict({n: v + 1 for n, v in module.state_dict().items()}),
}


@pytest.mark.parametrize("natively", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_seen_and_followed(
    change: str, natively: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if natively:
        request.getfixturevalue("native")
    monkeypatch.setattr(_native, "is_loaded", lambda: natively)
    module = make()
    before = fingerprint(module)
    assert fingerprint(module) == before
    follower = Follower(module, copy.deepcopy(module))
    follower.copy[0].double()  # type: ignore[index, operator, union-attr]
    CHANGES[change](module)
    assert fingerprint(module) != before
    follower.refresh()
    for mine, theirs in zip(tensors(follower.copy), tensors(module), strict=True):
        assert torch.equal(mine, theirs.to(mine.dtype))


@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_native_sums_are_those_of_the_memory() -> None:
    """Of every byte, on any number of threads, wherever a tensor begins and ends; and of two signs as of one."""
    memory = torch.randint(0, 256, (3 * 2**20 + 77,), dtype=torch.uint8)
    parts = [memory, memory[1:9], memory[3:300], memory[5:5], memory[: 2**20 + 1]]

    def expected(part: Tensor) -> int:
        raw = part.numpy().tobytes()
        words = np.frombuffer(raw + bytes(-len(raw) % 8), dtype="<u4").astype(object)
        return int(words[::2].sum() + 0x9E3779B97F4A7C15 * words[1::2].sum()) % 2**64 if len(words) else 0

    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            sums.append(_native.checksums(parts))
    finally:
        torch.set_num_threads(before)
    assert sums[0] == sums[1] == [expected(part) for part in parts]
    weight = torch.rand(64, 3, 3, 3).to(memory_format=torch.channels_last)
    whole = _native.checksums([weight])
    weight.neg_()
    assert _native.checksums([weight]) != whole


@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_strided_weights_are_summed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "is_loaded", lambda: True)
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.rand(4, 8)[:, ::2])
    before = fingerprint(module)
    module.weight.data[3, 3] += 1
    assert fingerprint(module) != before


def test_a_copy_is_left_alone_while_nothing_changes() -> None:
    module = make()
    follower = Follower(module, copy.deepcopy(module))
    with torch.no_grad():
        follower.copy[0].weight.zero_()  # type: ignore[index, operator, union-attr]
    follower.refresh()
    assert not follower.copy[0].weight.any()  # type: ignore[index, operator, union-attr]


def test_inference_tensors_are_seen_to_change() -> None:
    with torch.inference_mode():
        module = nn.Linear(2, 2)
        before = fingerprint(module)
        module.weight.mul_(0.5)
    assert fingerprint(module) != before


def test_modules_without_weights_do_not_change() -> None:
    assert fingerprint(nn.Identity()) == fingerprint(nn.Identity())


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("how", ["in_place", "loaded", "assigned", "moved", "layer", "buffer", "hook", "nothing"])
def test_a_watch_notices_what_torch_tells(how: str) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3)))
    watch, state = Watch(module), copy.deepcopy(module.state_dict())
    with torch.no_grad():
        if how == "in_place":
            module[0].weight.mul_(0.5)
        elif how in ("loaded", "assigned"):
            module.load_state_dict(state, assign=how == "assigned")
        elif how == "moved":
            module[0].bias.data = module[0].bias.data.clone()
        elif how == "layer":
            module[1][0] = nn.BatchNorm1d(3)
        elif how == "buffer":
            module[1][0].running_mean.add_(1)
        elif how == "hook":
            module[1][0].register_forward_hook(lambda *_: None)
    assert watch.changed() == (how != "nothing")
    watch.accept()
    assert not watch.changed()
