"""One evaluation of a U-Net: frozen, as the sampling loop runs it, beside the same network in torch and in its library.

Networks are published architectures with random weights. "eager" is fastddpm's U-Net, or the library's own where
fastddpm has none of the kind, in plain torch; "compiled" is the library's under torch.compile with its best settings.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from measuring import (
    ARMS,
    PEERS,
    PRECISIONS,
    Candidate,
    Session,
    Unavailable,
    assert_network_close,
    compiled_network,
    peer,
)
from networks import Problem, flops_of, make_problem, plain_unet, unet_name
from torch import Tensor, nn

from fastddpm.networks.frozen import freeze

T = 500
LUCIDRAINS = "denoising_diffusion_pytorch"


class Example(NamedTuple):
    network: str  # of gpu.networks.CONFIGS, or "lucidrains"
    dtype: torch.dtype
    batch: int
    compile: bool = True  # minutes for a large network
    dim: int = 64  # of lucidrains'


EXAMPLES = {
    "small": {
        "small fp32 batch 2": Example("small", torch.float32, 2),
        "cifar10 fp32 batch 1": Example("cifar10", torch.float32, 1, compile=False),
        "lucidrains dim 16 fp32 batch 2": Example("lucidrains", torch.float32, 2, compile=False, dim=16),
    },
    "full": {
        "cifar10 fp16 batch 1": Example("cifar10", torch.float16, 1, compile=False),
        "cifar10 fp16 batch 8": Example("cifar10", torch.float16, 8, compile=False),
        "cifar10 fp16 batch 64": Example("cifar10", torch.float16, 64),
        "cifar10 fp16 batch 256": Example("cifar10", torch.float16, 256, compile=False),
        "celeba256 fp16 batch 8": Example("celeba256", torch.float16, 8, compile=False),
        "lucidrains dim 64 fp16 batch 64": Example("lucidrains", torch.float16, 64, compile=False),
    },
}


class Network(NamedTuple):
    """A network to be evaluated: ours, and what the library's own is."""

    unet: nn.Module  # float32
    shape: tuple[int, ...]
    problem: Problem | None

    def library(self, dtype: torch.dtype) -> nn.Module:
        """Return the library's own, channels-last, with the projections of attention fused where it can."""
        if self.problem is not None:
            return plain_unet(self.problem, dtype, channels_last=True, fused=True)
        return deepcopy(self.unet).to(memory_format=torch.channels_last)

    def evaluate(self, unet: Callable[..., Any], x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return its output at T. denoising_diffusion_pytorch's embeds time in float32: autocast lowers the rest."""
        autocast = self.problem is None and dtype.itemsize < 4
        t = torch.full((len(x),), T, device=x.device, dtype=dtype if dtype == torch.float64 else torch.int64)
        given = x.to(torch.float32 if autocast else dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(x.device.type, dtype if autocast else None, enabled=autocast):
            out = unet(given, t)
        return out if isinstance(out, Tensor) else out.sample


def network_of(of: Example, device: torch.device) -> Network:
    """Return the network of an example.

    Raises:
        Missing: its library is not installed.
    """
    if of.network != "lucidrains":
        problem = make_problem(of.network, device)
        return Network(problem.unet, problem.shape, problem)
    peer(LUCIDRAINS)
    from denoising_diffusion_pytorch import Unet

    unet: Any = Unet(dim=of.dim)
    return Network(unet.to(device).eval().requires_grad_(False), (3, 32, 32), None)


@pytest.mark.parametrize("arm", [*ARMS, *PEERS])
def test_unet_step(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    def build(arm: str) -> Candidate:
        if not session.timed and example.network == "cifar10":
            raise Unavailable("a smoke test of the same code is run on the small network")
        if arm == "compiled" and not example.compile:
            raise Unavailable("torch.compile takes minutes for this network; it is measured for another")
        if arm in PEERS and (arm == LUCIDRAINS) != (example.network == "lucidrains"):
            raise Unavailable("the network is of another library")
        torch.manual_seed(0)
        network = network_of(example, session.device)
        x = torch.randn(example.batch, *network.shape, device=session.device)
        call, settings, counted = evaluating(session, arm, example, network, x)

        def check() -> None:
            eager = network.evaluate(network.library(example.dtype), x, example.dtype)
            assert_network_close(call(), in_float64(network, x), eager, example.dtype, settings.get("backend", ""))

        t = torch.full((1,), T, device=session.device)
        flops = flops_of(network.unet, x[:1], t) * example.batch
        counted = {"flops_as_written": flops} | counted
        return Candidate(
            [call],
            None if arm == "reference" else check,
            bytes=counted.pop("bytes", 0),
            flops=counted.pop("flops", flops),
            precision=PRECISIONS[example.dtype],
            settings=settings | counted,
            graph=arm not in PEERS,
        )

    compare(build, seconds=2.0)


def in_float64(network: Network, x: Tensor) -> Tensor:
    """Evaluate the network in float64."""
    exact = deepcopy(network.unet).double()
    if network.problem is not None:
        exact.backend = "reference"  # type: ignore[assignment]
    return network.evaluate(exact, x, torch.float64)


def evaluating(
    session: Session, arm: str, of: Example, network: Network, x: Tensor
) -> tuple[Callable[[], Tensor], dict[str, Any], dict[str, int]]:
    """Return what an arm calls, its settings, and what is counted of it."""
    if arm == "fused":
        frozen = freeze(network.unet, [T], of.dtype, session.device)
        inputs = frozen.new_input(x.shape)
        inputs.copy_(x)
        program, step = frozen.bind(inputs), torch.zeros(1, dtype=torch.int64, device=session.device)
        total = {name: sum(getattr(i, name) for i in program.instructions) for name in ("flops", "bytes")}
        settings = {"backend": frozen.backend, "instructions": len(program.instructions)}
        return lambda: program(step), settings, total
    if arm == "reference":
        return lambda: in_float64(network, x), {"dtype": "float64"}, {}
    settings: dict[str, Any] = {"channels_last": True}
    if arm == "eager" and network.problem is not None:
        unet = deepcopy(network.unet).to(of.dtype).to(memory_format=torch.channels_last)
        unet.backend = "eager"  # type: ignore[assignment]
    else:
        unet = network.library(of.dtype)
    if arm in PEERS:
        settings["network"] = unet_name(unet) if network.problem is not None else "Unet"
    run: Callable[..., Any] = unet
    if arm == "compiled":
        run, options = compiled_network(session, unet)
        settings |= options
    return lambda: network.evaluate(run, x, of.dtype), settings, {}
