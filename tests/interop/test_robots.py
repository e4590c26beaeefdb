"""Diffusion policies, accelerated: the original's actions at the same random numbers."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import dataclass, field
from typing import Any

import policies_restated as restated
import pytest
import torch
from fastddpm_kernels.testing import check_refuses
from torch import Tensor, nn

from fastddpm.interop import accelerate
from fastddpm.networks.frozen import FrozenUNet, cuda_instructions, why_not

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {"diffusion_step_embed_dim": 16, "down_dims": (16, 24, 32), "kernel_size": 5}
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "prediction_type": "epsilon"}


@dataclass(frozen=True)
class Network:
    why: str
    options: dict[str, Any] = field(default_factory=dict)
    lerobot: bool = False
    length: int = 8

    def make(self, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(0)
        unet: Any
        if self.lerobot:
            config = restated.lerobot_config(**self.options)
            unet = restated.DiffusionConditionalUnet1d(config, global_cond_dim=6)
        else:
            unet = restated.ConditionalUnet1D(**{"input_dim": 3} | SMALL | self.options)
        for parameter in unet.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        return unet.to(dtype)

    def conditions(self, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        found = {}
        if width := 6 if self.lerobot else self.options.get("global_cond_dim"):
            found["global_cond"] = torch.randn(batch, width).to(dtype)
        if width := self.options.get("local_cond_dim"):
            found["local_cond"] = torch.randn(batch, self.length, width).to(dtype)
        return found

    def inputs(self, batch: int, dtype: torch.dtype = torch.float32) -> tuple[int, int, int]:
        return (batch, 2 if self.lerobot else 3, self.length)


NETWORKS = {
    "global": Network("an observation; odd widths", {"global_cond_dim": 7, "cond_predict_scale": True}),
    "shift": Network("FiLM without a factor", {"global_cond_dim": 7}),
    "local": Network("an observation at every position", {"local_cond_dim": 5, "cond_predict_scale": True}),
    "both": Network("both", {"local_cond_dim": 4, "global_cond_dim": 6}),
    "inpainted": Network("no condition: observations are part of the sample", {"kernel_size": 3}, length=20),
    "one_level": Network("no position is halved", {"down_dims": (16,), "global_cond_dim": 2}, length=5),
    "same_widths": Network("residuals without a convolution", {"down_dims": (16, 16), "global_cond_dim": 2}),
    "lerobot": Network("lerobot's layers", lerobot=True),
    "lerobot_shift": Network("as shift", {"use_film_scale_modulation": False, "kernel_size": 3}, True, 16),
}
T = torch.tensor([99, 40, 0])


@pytest.fixture
def default_float64() -> Any:
    """In which the libraries compute their sinusoids."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@torch.no_grad()
def evaluate(network: Network, frozen: FrozenUNet, unet: Any, dtype: torch.dtype, batch: int = 2) -> float:
    """Return the largest error over the rows, relative to the largest value."""
    x, conditions = torch.randn(network.inputs(batch), dtype=dtype), network.conditions(batch, dtype)
    frozen.timesteps = T
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, conditions={k: v.to(frozen.dtype) for k, v in conditions.items()})
    worst = 0.0
    for row in (2, 0):
        if frozen.static:
            program.arena.fill_(255)  # NaN, were it read before it is written
        theirs = unet(x.transpose(1, 2), T[row].expand(batch), **conditions).transpose(1, 2).double()
        error = (program(torch.tensor([row])).double() - theirs).abs().max() / theirs.abs().max()
        worst = max(worst, float(error))
    return worst


@pytest.mark.usefixtures("default_float64")
@pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))
def test_frozen_it_equals_the_network(network: Network) -> None:
    """In float64: in plain torch, by the fused ops, and on the plan of CUDA; in float32 by the native kernels below."""
    unet = network.make(torch.float64)
    assert why_not(unet) is None
    for fused, static in ((False, False), (True, False), (True, True)):
        frozen = FrozenUNet(unet, backend="eager", fused=fused)
        frozen.static = static
        assert evaluate(network, frozen, unet, torch.float64) < 1e-12


@pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))
def test_native_it_equals_the_network(network: Network, native: str) -> None:
    unet = network.make()
    frozen = FrozenUNet(unet, backend=native)
    assert frozen.differs() is None
    assert evaluate(network, frozen, unet, torch.float32) < 1e-5


@pytest.mark.parametrize("name", ["global", "local", "lerobot"])
def test_native_in_bfloat16_it_loses_no_more_than_torch(name: str, native_bfloat16: str) -> None:
    network = NETWORKS[name]
    unet = network.make()
    half = FrozenUNet(unet, torch.bfloat16, backend="native")
    assert half.backend == "native", "odd widths are no reason against it"
    plain = FrozenUNet(unet, torch.bfloat16, backend="eager")
    ours, eager = (evaluate(network, each, unet, torch.float32) for each in (half, plain))
    assert ours <= 2 * eager + 1e-3


def test_on_triton_it_equals_the_network(device: torch.device) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    network = NETWORKS["both"]
    unet = network.make().to(device)
    frozen = FrozenUNet(unet, backend="triton")
    assert frozen.differs() is None


def test_a_step_on_cuda_is_as_many_kernels_as_layers() -> None:
    """Beside the row of the time table: a convolution and a norm each, and the residuals' convolutions."""
    unet = NETWORKS["global"].make()
    kinds = [one.kind for one in cuda_instructions(unet, size=(8,))]  # type: ignore[arg-type]
    blocks = sum(hasattr(m, "cond_encoder") for m in unet.modules())
    assert kinds.count("norm") == 2 * blocks + 1
    assert kinds.count("conv") == sum(isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)) for m in unet.modules())
    assert len(kinds) == kinds.count("norm") + kinds.count("conv") + 2, kinds


@pytest.mark.parametrize("how", ["in_place", "data"])
def test_it_takes_over_changed_weights(how: str) -> None:
    unet = NETWORKS["local"].make()
    sampler = accelerate((unet, ddpm(4)), check_weights=how == "data")
    local = torch.randn(1, 8, 5)
    first = sampler.sample((1, 8, 3), local_cond=local, generator=seeded())
    for parameter in unet.parameters():
        with torch.no_grad():
            (parameter.data if how == "data" else parameter).mul_(0.9)
    second = sampler.sample((1, 8, 3), local_cond=local, generator=seeded())
    fresh = accelerate((unet, ddpm(4))).sample((1, 8, 3), local_cond=local, generator=seeded())
    assert torch.equal(second, fresh)
    assert not torch.equal(first, second)


def ddpm(steps: int = 10, **options: Any) -> Any:
    return diffusers.DDPMScheduler(num_train_timesteps=steps, **SCHEDULE | options)


def ddim(steps: int = 20, **options: Any) -> Any:
    return diffusers.DDIMScheduler(num_train_timesteps=steps, **SCHEDULE | {"set_alpha_to_one": True} | options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy_of(name: str, scheduler: Any, **options: Any) -> Any:
    """A policy of diffusion_policy with observations of 4 values."""
    ways = {"global": {"global_cond_dim": 8}, "local": {"local_cond_dim": 4}, "inpainted": {"input_dim": 7}}
    unet = Network("", ways[name] | {"cond_predict_scale": name == "global"}).make()
    return restated.DiffusionUnetLowdimPolicy(
        unet, scheduler, horizon=12, obs_dim=4, action_dim=3, n_action_steps=5, n_obs_steps=2,
        obs_as_local_cond=name == "local", obs_as_global_cond=name == "global", **options,
    )  # fmt: skip


POLICIES = {
    "global": ("global", ddpm(), {}),
    "local": ("local", ddpm(), {}),
    "inpainted": ("inpainted", ddpm(), {}),
    "sample": ("global", ddpm(prediction_type="sample", variance_type="fixed_large"), {}),
    "not_clipped": ("inpainted", ddpm(clip_sample=False, beta_schedule="linear"), {}),
    "ddim": ("global", ddim(), {"num_inference_steps": 8}),
    "ddim_inpainted": ("inpainted", ddim(), {"num_inference_steps": 5}),
    "ddim_eta": ("local", ddim(), {"num_inference_steps": 5, "eta": 0.7, "use_clipped_model_output": True}),
}


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Rounding of float32 grows along the loop by the gain of the steps at its beginning."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("name", "backend"), [*((name, "native") for name in POLICIES), ("ddim_inpainted", "eager")])
def test_predict_action(name: str, backend: str, native: str) -> None:
    """The same actions, and the generator where the original leaves it: here torch's own."""
    way, scheduler, options = POLICIES[name]
    theirs = policy_of(way, copy.deepcopy(scheduler), **options)
    ours = accelerate(theirs, backend=backend)
    assert type(ours).__name__ == type(theirs).__name__
    assert isinstance(ours, restated.DiffusionUnetLowdimPolicy)
    for count in (2, 1, 2):
        obs = {"obs": torch.randn(count, 3, 4)}
        found = []
        for policy in (theirs, ours):
            torch.manual_seed(5)
            found.append((policy.predict_action(obs), torch.rand(1)))
        for key in ("action", "action_pred"):
            assert_same(found[1][0][key], found[0][0][key])
        assert torch.equal(found[0][1], found[1][1])


def test_conditional_sample_with_a_generator() -> None:
    """Also of the network as `torch.compile` wraps it, and in place."""
    theirs = policy_of("global", ddpm())
    data, cond = torch.zeros(2, 12, 3), torch.randn(2, 8)
    mask = torch.zeros_like(data, dtype=torch.bool)
    mask[0, 1] = True
    with torch.no_grad():
        expected = theirs.conditional_sample(data, mask, global_cond=cond, generator=seeded())
    theirs.model = torch.compile(theirs.model)
    ours = accelerate(theirs, inplace=True)
    assert ours is theirs
    assert_same(ours.conditional_sample(data, mask, global_cond=cond, generator=seeded()), expected)


@pytest.mark.parametrize("scheduler", [ddpm(), ddim()], ids=["ddpm", "ddim"])
def test_select_action(scheduler: Any) -> None:
    """Of lerobot, with its queues: two chunks of actions, then another episode, and the original apart."""
    config = restated.lerobot_config(num_inference_steps=10)
    torch.manual_seed(0)
    theirs = restated.DiffusionPolicy(config, scheduler)
    ours = accelerate(theirs)
    assert type(ours) is type(theirs)
    assert isinstance(ours.diffusion, restated.DiffusionModel)
    assert ours.diffusion.unet is theirs.diffusion.unet
    state = [{"observation.state": torch.randn(1, 3)} for _ in range(5)]
    found = []
    for policy in (theirs, ours):
        torch.manual_seed(3)
        actions = [policy.select_action(dict(batch)) for batch in state]
        policy.reset()
        found.append([*actions, policy.select_action(dict(state[0]))])
    for theirs_action, ours_action in zip(*found, strict=True):
        torch.testing.assert_close(ours_action, theirs_action, rtol=0, atol=2e-4)
    noise, batch, found = torch.randn(1, 16, 2), {"observation.state": torch.ones(1, 2, 3)}, []
    for model in (theirs.diffusion, accelerate(theirs.diffusion)):
        torch.manual_seed(4)
        with torch.no_grad():
            found.append(model.generate_actions(batch, noise=noise))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["global", "local", "lerobot"])
def test_network_and_scheduler(name: str, native: str) -> None:
    """The loop of the policies, as one native program where it is to run natively."""
    network = NETWORKS[name]
    unet, scheduler = network.make(), ddpm(20)
    ours = accelerate((unet, scheduler))
    shape, conditions = (2, network.length, network.inputs(1)[1]), network.conditions(2)
    generator = seeded()
    x = torch.randn(shape, generator=generator)
    scheduler.set_timesteps(7)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = unet(x, torch.full((2,), int(t)), **conditions)
            x = scheduler.step(out, t, x, generator=generator).prev_sample
    again = seeded()
    assert_same(ours.sample(shape, **conditions, generator=again, num_inference_steps=7), x)
    assert torch.equal(torch.rand(1, generator=again), torch.rand(1, generator=generator))
    report = ours._engine._prepared.sampler.graph_report()
    assert report["mode"] == "native"
    assert pickle.loads(pickle.dumps(ours._engine)).options == ours._engine.options


def test_it_is_recorded_as_one_native_program(native: str) -> None:
    """No operation of torch runs in a step."""
    unet = NETWORKS["local"].make()
    ours = accelerate((unet, ddpm()))
    ours.sample((1, 8, 3), local_cond=torch.randn(1, 8, 5))
    (runner,) = ours._engine._prepared.sampler._pool.idle
    assert [program.is_native for program in runner._programs.values()] == [True]


def test_a_condition_may_be_left_out() -> None:
    """Calls with and without it do not share loops."""
    unet, cond = NETWORKS["both"].make(), NETWORKS["both"].conditions(1)
    sampler = accelerate((unet, ddpm()))
    few = {"global_cond": cond["global_cond"]}
    found = [sampler.sample((1, 8, 3), **given, generator=seeded()) for given in (cond, few, cond)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], accelerate((unet, ddpm())).sample((1, 8, 3), **few, generator=seeded()))
    assert not torch.allclose(found[0], found[1])


def test_an_edited_network_is_called_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    theirs = policy_of("local", ddpm())
    theirs.model.final_conv[0].block[2] = nn.SiLU()
    check_refuses(accelerate, ValueError, "final_conv.0.block.2 is a SiLU", obj=theirs, allow_general=False)
    with caplog.at_level(logging.WARNING):
        ours = accelerate(theirs)
    assert "called as it is" in caplog.text
    obs = {"obs": torch.randn(1, 2, 4)}
    torch.manual_seed(0)
    expected = theirs.predict_action(obs)["action"]
    torch.manual_seed(0)
    assert_same(ours.predict_action(obs)["action"], expected)


class OwnLoop(restated.DiffusionUnetLowdimPolicy):
    def conditional_sample(self, *arguments: Any, **named: Any) -> Tensor:
        raise NotImplementedError


def test_bad_input() -> None:
    policy, sampler = accelerate(policy_of("global", ddpm())), accelerate((NETWORKS["local"].make(), ddpm()))
    both = accelerate((NETWORKS["both"].make(), ddpm()))
    one = (1, 8, 3)
    zeros = torch.zeros
    for message, call, arguments in (
        (r"global_cond has shape \(1, 10\), must have \(1, 8\)", policy.predict_action,
         {"obs_dict": {"obs": zeros(1, 2, 5)}}),
        ("global_cond is missing", both.sample, {"shape": one}),
        ("global_cond is given, but this U-Net does not take it", sampler.sample,
         {"shape": one, "global_cond": zeros(1, 3)}),
        (r"local_cond has shape \(1, 8, 6\)", sampler.sample, {"shape": one, "local_cond": zeros(1, 8, 6)}),
        ("local_cond has 4 positions, must have 8", sampler.sample, {"shape": one, "local_cond": zeros(1, 4, 5)}),
        ("horizon is 10, must be a positive multiple of 4: the network halves it 2 times", sampler.sample,
         {"shape": (1, 10, 3)}),
        ("4 values at a position, must have 3, the network's input_dim", sampler.sample, {"shape": (1, 8, 4)}),
        (r"shape is \(1, 0, 3\)", sampler.sample, {"shape": (1, 0, 3)}),
    ):  # fmt: skip
        check_refuses(call, ValueError, message, **arguments)
    data = torch.zeros(1, 12, 3)
    check_refuses(
        policy.conditional_sample, TypeError, "eta is given but the scheduler is a DDPMScheduler",
        condition_data=data, condition_mask=data > 0, global_cond=torch.zeros(1, 8), eta=0.5,
    )  # fmt: skip
    own = policy_of("local", ddpm())
    own.__class__ = OwnLoop
    check_refuses(accelerate, ValueError, "OwnLoop has its own conditional_sample", obj=own)
    euler = diffusers.EulerDiscreteScheduler()
    check_refuses(accelerate, ValueError, "EulerDiscreteScheduler scales the network's input", obj=(own.model, euler))
    check_refuses(accelerate, ValueError, "inplace is True but obj is a tuple", obj=(own.model, ddpm()), inplace=True)
    check_refuses(accelerate, ValueError, "network is torch.float64", obj=(own.model.double(), ddpm()))
    transformer = type("DiffusionTransformerLowdimPolicy", (nn.Module,), {"__module__": "diffusion_policy.policy.t"})()
    check_refuses(accelerate, TypeError, "DiffusionTransformerLowdimPolicy, must be", obj=transformer)
