"""Every layer is timed and priced, and the network is what it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastddpm import UNet
from fastddpm.networks.frozen.instructions import Instruction
from fastddpm.networks.network import Network
from fastddpm.perf.profiling import layers
from fastddpm.perf.profiling.model import by_kind

TIMESTEPS = torch.tensor([9, 5, 0])


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()  # fmt: skip


def test_layers_of_a_frozen_network(unet: UNet) -> None:
    ready = layers.evaluation(Network(unet, backend="eager", freeze=True), (2, 3, 8, 8), TIMESTEPS)
    with ready.running():
        before = ready().clone()
    found, one_round = layers.timed_layers(ready)
    assert [layer.name for layer in found] == [i.name for i in ready.instructions]
    sums = [one_round() for _ in range(3)]
    assert all(len(layer.seconds) == 3 for layer in found)
    for k in range(3):
        assert sums[k] == pytest.approx(sum(layer.seconds[k] for layer in found))
    with FlopCounterMode(display=False) as counter, ready.running():
        after = ready()
    assert torch.equal(before, after)
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert sum(layer.flops for layer in found if layer.kind == "conv") == counted["aten.convolution"]
    # q k^T and (q k^T) v of 16 pixels and 16 channels, for two samples
    assert {layer.flops for layer in found if layer.kind == "attention"} == {2 * (2 * 2 * 16 * 16 * 16)}
    sizes = {layer.size for layer in found if layer.kind == "conv"}
    assert sizes == {(8, 8), (4, 4)}
    kinds = by_kind(found)
    assert set(kinds) == {layer.kind for layer in found}
    assert kinds["norm"]["samples"] == 3
    written = found[1].to_dict()
    assert written["us"]["median"] == pytest.approx(1e6 * sorted(found[1].seconds)[1])


class Twice(nn.Module):
    """A network of its own, which calls one layer twice and returns more than a tensor from another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.mix = nn.Conv2d(3, 3, 1)
        self.norm = nn.GroupNorm(1, 3)
        self.pair = Pair()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, _ = self.pair(x)
        return self.mix(self.conv(self.norm(self.conv(x))))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def test_layers_of_any_other_network() -> None:
    model = Twice().train()
    ready = layers.evaluation(Network(model), (2, 3, 8, 8), TIMESTEPS)
    assert ready.instructions == []
    found, one_round = layers.timed_layers(ready)
    assert {layer.name: (layer.kind, layer.size) for layer in found} == {
        "norm": ("norm", (8, 8)), "conv": ("conv", (8, 8)), "mix": ("pointwise", (8, 8)),
    }  # fmt: skip
    by_name = {layer.name: layer for layer in found}
    assert by_name["conv"].flops == 2 * (2 * 2 * 64 * 3 * 3 * 9)  # it is called twice
    activation, weight = 4 * 2 * 3 * 64, 4 * (3 * 3 * 9 + 3)
    assert by_name["conv"].bytes == 2 * (2 * activation + weight)
    assert one_round() == pytest.approx(sum(layer.seconds[0] for layer in found))
    assert all(len(layer.seconds) == 1 for layer in found)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_a_failure() -> None:
    model = Twice()
    ready = layers.evaluation(Network(model), (1, 3, 8, 8), TIMESTEPS)
    _, one_round = layers.timed_layers(ready)
    model.mix = nn.Conv2d(4, 3, 1)
    with pytest.raises(RuntimeError, match="channels"):
        one_round()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_network_that_is_no_module_has_no_layers() -> None:
    ready = layers.evaluation(Network(lambda x, t: x), (1, 3, 8, 8), TIMESTEPS)
    found, one_round = layers.timed_layers(ready)
    assert found == []
    assert one_round() == 0


def test_on_a_gpu_each_instruction_is_replayed_from_its_own_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def instruction(name: str) -> Instruction:
        return Instruction(name, "conv", (0,), (1,), 1, 10, 10, lambda: log.append(name))

    instructions = [instruction("a"), instruction("b")]
    originals = [i.run for i in instructions]

    def run_all(step: Tensor) -> None:
        for i in instructions:
            i.run()

    def capture(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], None]:
        log.append(f"capture {len(calls)}")
        calls[0]()
        return lambda: log.append("replay")

    monkeypatch.setattr(layers, "capture", capture)
    monkeypatch.setattr(layers, "synchronize", lambda device: None)
    monkeypatch.setattr(layers, "timed", lambda run, device: run() or 4e-3)
    network: Any = SimpleNamespace(device=torch.device("cuda"), evaluating=contextlib.nullcontext)
    bound: Any = SimpleNamespace(instructions=instructions)
    ready = layers.Evaluation(network, torch.empty(0), bound, torch.zeros(1))
    monkeypatch.setattr(layers.Evaluation, "__call__", lambda self: run_all(self.step))
    found, one_round = layers.timed_layers(ready)
    assert log == ["a", "b", "capture 20", "a", "a", "capture 20", "b", "b"]
    assert one_round() == pytest.approx(2 * 4e-3 / layers.REPEATS)
    assert log[-2:] == ["replay", "replay"]
    assert found[0].seconds == [pytest.approx(2e-4)]
    assert [i.run for i in instructions] == originals
