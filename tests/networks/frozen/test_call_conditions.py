"""What a call gives besides x, timesteps and labels: computed once per call, and followed when its values change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.native.program import record
from torch import Tensor, nn

from fastddpm.networks.frozen import FrozenUNet, kinds
from fastddpm.networks.frozen.blueprint import Blueprint, Condition, Embeddings
from fastddpm.networks.frozen.builder import Activation, Builder
from fastddpm.networks.frozen.folding import side_by_side
from fastddpm.networks.frozen.time_table import TimeTable
from fastddpm.networks.network import Network

TIMESTEPS = torch.tensor([900, 500, 3])
WIDTH, STATE, TEXT = 6, 4, 10


class Told(nn.Module):
    """A network told a pooled vector, which it embeds with the time, and maybe a sequence, which it projects."""

    def __init__(self, separates: bool) -> None:
        super().__init__()
        self.separates = separates
        self.conv_in, self.conv_out = nn.Conv2d(STATE, 8, 1), nn.Conv2d(8, STATE, 1)
        self.time, self.pooled, self.classes = nn.Linear(1, WIDTH), nn.Linear(5, WIDTH), nn.Embedding(3, WIDTH)
        self.project = nn.Linear(2 * WIDTH if separates else WIDTH, 8)
        self.norm, self.text = nn.GroupNorm(2, 8), nn.Linear(TEXT, 8)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, pooled: Tensor, text: Tensor | None = None) -> Tensor:
        time, told = self.time(t[:, None].to(pooled) / 1000), self.pooled(pooled) + self.classes(labels)
        active = F.silu(torch.cat([time, told], dim=1) if self.separates else time + told)
        h = F.silu(self.norm(self.conv_in(x) + self.project(active)[:, :, None, None]))
        if text is not None:
            h = h + self.text(text).mean(dim=1)[:, :, None, None]
        return self.conv_out(h)


class ToldEmbeddings(Embeddings):
    num_labels = 3
    conditions = ("pooled",)

    def __init__(self, unet: Told) -> None:
        super().__init__()
        self.unet, self.separates = copy.deepcopy(unet).double(), unet.separates

    def of_time(self, t: Tensor) -> Tensor:
        return F.pad(self.unet.time(t[:, None].double() / 1000), (0, WIDTH if self.separates else 0))

    def of_labels(self, labels: Tensor) -> Tensor:
        return F.pad(self.unet.classes(labels), (WIDTH if self.separates else 0, 0))

    def of_conditions(self, conditions: Mapping[str, Tensor]) -> Tensor:
        return F.pad(self.unet.pooled(conditions["pooled"].double()), (WIDTH if self.separates else 0, 0))


class ToldBuilder(Builder):
    def lower(self) -> int:
        unet: Any = self.unet
        x = self.conv(unet.conv_in, Activation(self.INPUT), padding=0)
        self.complete(x, "conv_in")
        h = self.norm(unet.norm, x, time_bias=self.row)
        if "text" in self.conditions:
            text = self.condition("text")
            with self.once():
                text = Activation(self.linear("text", text.slot, unet.text.weight, unet.text.bias))
                text = self.other("text.mean", [text.slot], lambda v: v.mean(dim=(2, 3), keepdim=True))
            h = self.other("text.add", [h.slot, text.slot], torch.add, self.shapes[h.slot])
        return self.linear("conv_out", h.slot, unet.conv_out.weight.flatten(1), unet.conv_out.bias)


class ToldBlueprint(Blueprint):
    name, builder, has_labels, factor = "a Told", ToldBuilder, True, 1
    in_channels = out_channels = STATE
    foreign = True
    conditions = {"pooled": Condition((5,)), "text": Condition((None, TEXT), optional=True)}  # noqa: RUF012

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    @staticmethod
    def takes(model: object) -> bool:
        return isinstance(model, Told)

    @staticmethod
    def why_not(model: Any) -> str | None:
        return None

    def embeddings(self) -> Embeddings:
        return ToldEmbeddings(self.unet)

    def time_projections(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        return side_by_side([("norm", self.unet.project.weight, self.unet.project.bias)])


@pytest.fixture(autouse=True)
def _kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, ToldBlueprint))


def make(batch: int, tokens: int | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    conditions = {"pooled": torch.randn(batch, 5)}
    if tokens is not None:
        conditions["text"] = torch.randn(batch, tokens, TEXT)
    return torch.randn(batch, STATE, 4, 4), torch.arange(batch) % 3, conditions


@pytest.mark.parametrize("separates", [False, True])
@pytest.mark.parametrize("plan", ["plain", "fused", "static", "products"])
@torch.no_grad()
def test_follows_a_call(separates: bool, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, with other values after `load`, other weights, and nothing computed twice for the same values."""
    if plan == "products":  # where a row per step and sample would not fit
        monkeypatch.setattr(TimeTable.__init__, "__defaults__", (1, *TimeTable.__init__.__defaults__[1:]))
    unet = Told(separates).double()
    frozen = FrozenUNet(unet, backend="eager", fused=plan == "fused")
    assert frozen.differs() is None
    x, labels, conditions = make(3, 7)
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, TIMESTEPS, labels, conditions)
    ran: list[str] = []
    for instruction in program.call_instructions:
        instruction.run = lambda run=instruction.run, name=instruction.name: (ran.append(name), run())
    assert len(program.call_instructions) == 3
    for change in ("first", "none", "text", "pooled", "labels", "weights"):
        if change in conditions:
            conditions[change].normal_()
        elif change == "labels":
            labels.add_(1).remainder_(3)
        elif change == "weights":
            unet.text.weight.mul_(2)
        ran.clear()
        program.load()
        assert len(ran) == (0 if change == "none" else 3)
        for row in (2, 0):
            expected = unet(
                x.double(), TIMESTEPS[row].expand(3), labels, **{k: v.double() for k, v in conditions.items()}
            )
            torch.testing.assert_close(program(torch.tensor([row])), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("separates", [False, True])
@pytest.mark.usefixtures("native")
@torch.no_grad()
def test_a_recorded_step_reads_what_load_computed(separates: bool) -> None:
    """As the native loop runs it: recorded once, followed by calls with other values."""
    unet = Told(separates)
    network = Network(unet, freeze=True, backend="native")
    assert network.frozen is not None
    x, labels, conditions = make(2, 7)
    inputs = network.new_input(x.shape)
    inputs.copy_(x)
    program, step, out = network.bind(inputs, TIMESTEPS, labels, None, conditions), torch.tensor([1]), x.clone()
    program.load()
    recorded = record(lambda: out.copy_(program(step)))
    for _ in range(2):
        conditions["text"].normal_()
        conditions["pooled"].normal_()
        program.load()
        recorded.advance(1)
        torch.testing.assert_close(out, unet(x, TIMESTEPS[1].expand(2), labels, **conditions), rtol=0, atol=1e-5)


def test_wrong_conditions_are_named() -> None:
    frozen = FrozenUNet(Told(False))
    x, labels, conditions = make(2, None)
    for change, message in {
        "pooled": (None, "pooled is missing, but this U-Net takes it"),
        "text": (torch.zeros(2, 7, 3), r"text has shape \(2, 7, 3\), must have \(2, any, 10\)"),
        "more": (torch.zeros(2), "more is given, but this U-Net does not take it; it takes pooled, text"),
    }.items():
        given = {k: v for k, v in {**conditions, change: message[0]}.items() if v is not None}
        with pytest.raises(ValueError, match=message[1]):
            frozen.bind(frozen.new_input(x.shape), TIMESTEPS, labels, given)
    with pytest.raises(ValueError, match=r"pooled has dtype torch.int64, must hold floating-point numbers"):
        frozen.bind(frozen.new_input(x.shape), TIMESTEPS, labels, {"pooled": torch.zeros(2, 5, dtype=torch.int64)})
