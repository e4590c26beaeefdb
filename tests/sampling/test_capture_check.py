"""What a CUDA graph cannot hold is found on any device, and named with its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks

from fastddpm.sampling.cuda_graph.capture_check import explain


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max().item()  # an offender
        return x * scale


class Network(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.mid = nn.ModuleDict({"attn": middle})
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mid["attn"](F.silu(self.first(x))))


def body_of(network: Callable[[Tensor], object], x: Tensor | None = None) -> Callable[[], None]:
    x = torch.randn(2, 3, 8, 8) if x is None else x

    @torch.no_grad()
    def body() -> None:
        network(x)

    return body


def test_clean_body() -> None:
    step, table = torch.zeros(1, dtype=torch.int64), torch.randn(10, 4)
    network = Network(nn.Identity())

    @torch.no_grad()
    def body() -> None:
        h = network(torch.ones(2, 3, 8, 8))
        h = h + table.index_select(0, step)[:, :, None, None]
        q = h.flatten(2)[:, None]
        h = F.scaled_dot_product_attention(q, q, q)
        h[h > 1] = 0.0  # a masked_fill: its shape is fixed
        h = torch.where(h < 0, h, torch.tensor(0.5)) * torch.tensor([1.0, 2.0])[step]
        h.masked_fill(h > 0, 1).clamp_(-1, 1)
        step.add_(1)

    assert explain(body) is None
    assert int(step) == 1, "the body runs once"


def test_names_operation_module_and_place() -> None:
    found = explain(body_of(Network(Attention())))
    assert found is not None
    assert found.startswith("Tensor.item() at sampling/test_capture_check.py:")
    assert "(`scale = x.abs().max().item()  # an offender`), in Attention 'mid.attn' waits for the GPU" in found
    assert "keep it in a tensor on the device" in found


MASK = torch.tensor([True, False, True])
OFFENDERS: dict[str, tuple[Callable[[Tensor], object], str, str]] = {
    "bool": (lambda x: bool(x.any()), "Tensor.item()", "value"),
    "float": (lambda x: float(x.sum()), "Tensor.item()", "value"),
    "equal": (lambda x: torch.equal(x, x + 1), "torch.ops.aten.equal", "value"),
    "allclose": (lambda x: torch.allclose(x, x), "torch.ops.aten.allclose", "value"),
    "inv": (lambda x: torch.linalg.inv(torch.eye(3)), "_linalg_check_errors", "value"),
    "nonzero": (lambda x: x.nonzero(), "torch.ops.aten.nonzero", "shape"),
    "argwhere": (lambda x: torch.argwhere(x), "torch.ops.aten.nonzero", "shape"),
    "masked_select": (lambda x: x.masked_select(MASK), "torch.ops.aten.masked_select", "shape"),
    "x[mask]": (lambda x: x[MASK], "x[mask]", "shape"),
    "x[mask] = y": (lambda x: x.index_put_((MASK,), torch.ones(2)), "torch.ops.aten.index_put_", "shape"),
    "unique": (lambda x: x.unique(), "unique", "shape"),
    "repeat_interleave": (lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])), "repeat_interleave", "shape"),
    "cpu": (lambda x: x.cpu(), "Tensor.cpu()", "device to the host"),
    "numpy": (lambda x: x.numpy(), "Tensor.numpy()", "device to the host"),
    "tolist": (lambda x: x.tolist(), "Tensor.tolist()", "device to the host"),
    "synchronize": (lambda x: torch.cuda.synchronize(), "torch.cuda.synchronize()", "waits for the GPU"),
}


@pytest.mark.parametrize("name", OFFENDERS)
def test_offenders(name: str) -> None:
    offence, what, why = OFFENDERS[name]
    found = explain(body_of(offence, torch.tensor([1.0, 0.0, 2.0])))
    assert found is not None
    assert what in found.split(" at ")[0]
    assert why in found
    assert "test_capture_check.py" in found


def test_fixed_shapes_are_no_offence() -> None:
    x, counts = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1, 2, 3])
    assert explain(body_of(lambda x: x.repeat_interleave(counts, output_size=6), x)) is None
    assert explain(body_of(lambda x: x.index_put_((MASK,), torch.tensor(1.0)), x)) is None
    assert explain(body_of(lambda x: x[torch.tensor([0, 2])], x)) is None


FAKE_OFFENDERS: dict[str, tuple[Callable[[Tensor, Tensor], object], str]] = {
    "cpu": (lambda device, host: device.cpu(), "copies from the device to the host"),
    "to": (lambda device, host: device.to("cpu"), "copies from the device to the host"),
    "copy": (lambda device, host: host.copy_(device), "copies from the device to the host"),
    "upload": (lambda device, host: device + host.to("cuda"), "copies from ordinary host memory to the device"),
    "fill": (lambda device, host: device.copy_(host), "copies from ordinary host memory to the device"),
    "new": (lambda device, host: torch.tensor([1.0, 2.0], device="cuda"), "from ordinary host memory to the device"),
}


@pytest.mark.parametrize("name", FAKE_OFFENDERS)
def test_copies_between_host_and_device(name: str) -> None:
    offence, why = FAKE_OFFENDERS[name]
    with FakeTensorMode():
        device, host = torch.empty(3, device="cuda"), torch.zeros(3)
        found = explain(body_of(lambda device: offence(device, host), device))
    assert found is not None
    assert why in found


def test_beside_a_gpu_the_host_may_do_as_it_likes() -> None:
    numbers = torch.tensor([1.0, 2.0])
    found = explain(body_of(lambda x: x[0].item(), numbers))
    assert found is not None, "on the CPU alone it stands for what would happen on a GPU"
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.empty(3, device="cuda")

        def body() -> None:
            device.mul_(2)
            numbers.tolist()

        assert explain(body) is None


def test_generators_are_named_last() -> None:
    x = torch.ones(4)
    found = explain(body_of(lambda x: x.add_(torch.randn(4)), x))
    assert found is not None
    assert "torch.ops.aten.randn" in found
    assert "philox" in found
    assert explain(body_of(lambda x: torch.randn_like(x), x), random=False) is None
    found = explain(body_of(lambda x: torch.rand(4) * x.sum().item(), x))
    assert found is not None
    assert "Tensor.item()" in found


def test_only_dropout_makes_attention_random() -> None:
    q = torch.randn(1, 1, 4, 8)
    assert explain(body_of(lambda q: F.scaled_dot_product_attention(q, q, q), q)) is None
    found = explain(body_of(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), q))
    assert found is not None
    assert "generator" in found


def test_a_body_that_raises() -> None:
    def broken() -> None:
        raise KeyError("weights")

    assert explain(broken) == "the body raised KeyError: 'weights'"

    def late() -> None:
        torch.ones(2).sum().item()
        raise KeyError("weights")

    found = explain(late)
    assert found is not None
    assert "Tensor.item()" in found


def test_modules_that_raise_are_left() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError

    broken = Broken()

    def body() -> None:
        with contextlib.suppress(KeyError):
            broken(torch.ones(2))
        torch.ones(2).sum().item()

    found = explain(body)
    assert found is not None
    assert "Broken" not in found


def test_leaves_nothing_behind() -> None:
    owners = torch.cuda, torch.cuda.Stream, torch.cuda.Event
    before = [owner.synchronize for owner in owners]
    explain(body_of(Network(Attention())))
    assert [owner.synchronize for owner in owners] == before
    assert not module_hooks._global_forward_pre_hooks
    assert not module_hooks._global_forward_hooks
    torch.ones(2).sum().item()
