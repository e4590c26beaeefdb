"""A frozen `Unet` of denoising_diffusion_pytorch is that network: exactly in float64, to rounding in other dtypes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.backend import why_not as why_not_backend
from torch import Tensor, nn

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

from denoising_diffusion_pytorch import Unet, Unet1D
from denoising_diffusion_pytorch import classifier_free_guidance as cfg

from fastddpm import NoiseSchedule, Sampler
from fastddpm.networks.frozen import FrozenUNet, cuda_instructions, freeze, instructions, why_not
from fastddpm.networks.network import Network
from fastddpm.sampling.cuda_graph import explain

SMALL: dict[str, Any] = {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "one_level": {"dim_mults": (1,)},
    "three_levels": {"dim_mults": (1, 3, 2)},
    "init_dim": {"init_dim": 12, "dropout": 0.5},
    "learned_sinusoidal": {"learned_sinusoidal_cond": True},
    "random_fourier": {"random_fourier_features": True, "learned_sinusoidal_dim": 6},
    "theta": {"sinusoidal_pos_emb_theta": 300},
    "full_attention_first": {"full_attn": (True, False)},
    "no_full_attention": {"full_attn": (False, False), "flash_attn": True},
    "odd_heads": {"attn_heads": 3, "attn_dim_head": 5},
    "heads_by_level": {"attn_heads": (1, 3), "attn_dim_head": (7, 4)},
    "one_channel": {"channels": 1, "out_dim": 4},
    "self_condition": {"self_condition": True},
    "learned_variance": {"learned_variance": True},
}
KINDS = [*OPTIONS, "classes", "no_class"]
TIMESTEPS = torch.tensor([999, 500, 3])


@torch.no_grad()
def make_unet(option: str, dtype: torch.dtype = torch.float64) -> Any:
    """Random parameters, g and the learned keys and values among them, none of them 0 or 1 throughout."""
    torch.manual_seed(0)
    if option in OPTIONS:
        unet: Any = Unet(**SMALL | OPTIONS[option])
    else:
        unet = cfg.Unet(num_classes=5, **SMALL)
    unet.to(dtype)
    randomize(unet)
    return unet.eval()


@torch.no_grad()
def randomize(unet: nn.Module) -> None:
    for parameter in unet.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In which the library computes its sinusoids."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_inputs(unet: Any, option: str, batch: int = 3) -> tuple[Tensor, Tensor | None]:
    """What the frozen network reads, and its labels; 5 is none of the classes."""
    channels = unet.init_conv.in_channels
    x = torch.randn(batch, channels, 8, 4 if option == "default" else 8, dtype=torch.float64)
    labels = {"classes": torch.tensor([0, 4, 2]), "no_class": torch.tensor([5, 5, 5])}.get(option)
    return x, None if labels is None else labels[:batch]


@torch.no_grad()
def theirs(unet: Any, option: str, x: Tensor, t: int, labels: Tensor | None) -> Tensor:
    times = torch.full((len(x),), t)
    if labels is not None:
        return unet(x, times, labels.clamp(max=4), cond_drop_prob=float(option == "no_class"))
    if unet.self_condition:
        return unet(x[:, unet.channels :], times, x[:, : unet.channels])
    return unet(x, times)


def run(frozen: FrozenUNet, x: Tensor, row: int, labels: Tensor | None = None) -> Tensor:
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, labels=labels)
    step = torch.tensor([row])
    first = program(step).clone()
    assert torch.equal(first, program(step)), "a run changed what the next one reads"
    return first


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_within(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert rms(actual.double() - expected) <= tolerance * rms(expected)


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
@pytest.mark.parametrize("option", KINDS)
def test_equals_theirs_in_float64(option: str, fused: bool) -> None:
    with default_dtype(torch.float64):
        unet = make_unet(option)
        x, labels = make_inputs(unet, option)
        frozen = FrozenUNet(unet, backend="eager", fused=fused)
        frozen.timesteps = TIMESTEPS
        for row in (0, 2):
            expected = theirs(unet, option, x, int(TIMESTEPS[row]), labels)
            assert_within(run(frozen, x, row, labels), expected)


@pytest.mark.parametrize("option", KINDS)
def test_activations_in_one_block_of_memory(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but for the library that convolves: every result in its place, which others use before and after."""

    def conv(x: Tensor, w: Tensor, stride: int, padding: int, allow_tf32: bool, out: Tensor) -> None:
        out.copy_(F.conv2d(x, w, None, stride, padding))

    def conv_transpose(x: Tensor, w: Tensor, allow_tf32: bool) -> Tensor:
        return F.conv_transpose2d(x, w, None, stride=2, padding=1).contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(instructions, "cudnn_conv", conv)
    monkeypatch.setattr(instructions, "cudnn_conv_transpose", conv_transpose)
    with default_dtype(torch.float64):
        unet = make_unet(option)
        x, labels = make_inputs(unet, option)
        frozen = FrozenUNet(unet, backend="eager", fused=True)
        frozen.static, frozen.timesteps = True, TIMESTEPS
        inputs = frozen.new_input(x.shape)
        inputs.copy_(x)
        program = frozen.bind(inputs, labels=labels)
        for row in (2, 1):
            program.arena.fill_(255)  # NaN, were it read before it is written
            expected = theirs(unet, option, x, int(TIMESTEPS[row]), labels)
            assert_within(program(torch.tensor([row])), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("option", ["three_levels", "full_attention_first", "classes"])
def test_rounding_is_bounded_by_their_own(option: str, backend: str, dtype: torch.dtype) -> None:
    unet = make_unet(option, torch.float32)
    x, labels = make_inputs(unet, option)
    expected = theirs(in_dtype(unet, torch.float64), option, x, 500, labels)
    plain = theirs(in_dtype(unet, dtype), option, x.to(dtype), 500, labels)
    frozen = freeze(unet, TIMESTEPS, dtype, backend=backend)
    lost, plain_lost = (rms(out.double() - expected) for out in (run(frozen, x, 1, labels), plain))
    # Winograd's transforms lose a few bits more than a direct convolution, in float32 alone.
    assert lost <= (4 if frozen.backend == "native" else 1.5) * plain_lost


def in_dtype(unet: Any, dtype: torch.dtype) -> Any:
    """A copy in another dtype, with the sinusoids of float32."""
    copied = copy.deepcopy(unet).to(dtype)
    copied.time_mlp[0] = nn.Sequential(copied.time_mlp[0], _To(dtype))
    return copied


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


@pytest.mark.skipif(why_not_backend("triton", "cpu") is not None, reason=str(why_not_backend("triton", "cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_kernels_compute_the_unet(dtype: torch.dtype) -> None:
    unet = make_unet("default", torch.float32)
    x, _ = make_inputs(unet, "default", batch=2)
    expected = theirs(in_dtype(unet, torch.float64), "default", x, 500, None)
    frozen = freeze(unet, TIMESTEPS, dtype, backend="triton")
    assert frozen.fused
    eager = freeze(unet, TIMESTEPS, dtype, backend="eager")
    lost, plain_lost = (rms(run(each, x, 1).double() - expected) for each in (frozen, eager))
    assert lost <= 1.5 * plain_lost


def test_self_condition_may_be_left_out() -> None:
    """As theirs takes it for zeros."""
    with default_dtype(torch.float64):
        unet = make_unet("self_condition")
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            expected = unet(x, torch.full((2,), 500))
        assert_within(run(freeze(unet, TIMESTEPS), x, 1), expected)
        wide = FrozenUNet(unet, backend="eager", fused=True)
        wide.timesteps, wide.in_channels = TIMESTEPS, 8  # filled up to a whole vector, as on CUDA
        inputs = wide.new_input((4, 3, 8, 8))
        inputs[2:].copy_(x)
        assert_within(wide.bind(inputs[2:])(torch.tensor([1])), expected)
    with pytest.raises(ValueError, match=r"inputs have shape \(1, 4, 8, 8\), must have shape \[N, 6, H, W\]"):
        freeze(unet, TIMESTEPS).bind(torch.zeros(1, 4, 8, 8))


def test_new_weights_are_taken_over() -> None:
    with default_dtype(torch.float64):
        unet = make_unet("classes")
        x, labels = make_inputs(unet, "classes")
        frozen = freeze(unet, TIMESTEPS)
        inputs = frozen.new_input(x.shape)
        inputs.copy_(x)
        program = frozen.bind(inputs, labels=labels)
        before = program(torch.tensor([1])).clone()
        unet.null_classes_emb.data.add_(1)  # of no effect, as all labels are classes
        program.load()
        assert torch.equal(program(torch.tensor([1])), before)
        for parameter in unet.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))  # which autograd does not see
        program.load()
        assert_within(program(torch.tensor([1])), theirs(unet, "classes", x, 500, labels))


@pytest.mark.parametrize("option", ["default", "self_condition", "classes"])
def test_a_graph_can_hold_it(option: str) -> None:
    """The plan of CUDA: its operations need no values on the host, and nothing that a capture refuses."""
    unet = make_unet(option, torch.float32)
    x, labels = make_inputs(unet, option)
    frozen = FrozenUNet(unet, backend="eager", fused=True)
    frozen.timesteps = TIMESTEPS
    program = frozen.bind(frozen.new_input(x.shape), labels=labels)
    program.load()
    assert explain(partial(program, torch.tensor([1]))) is None


def test_default_unet_takes_few_kernels() -> None:
    """The library itself launches 617 operations a step."""
    with torch.device("meta"):
        unet = Unet(64)
    for batch in (1, 16):
        kernels = {}
        for instruction in cuda_instructions(unet, batch):
            kernels[instruction.kind] = kernels.get(instruction.kind, 0) + instruction.kernels
        assert kernels == {
            "time": 1, "conv": 47, "norm": 53, "pointwise": 13, "residual": 9, "other": 9, "attention": 78
        }  # fmt: skip
        assert sum(kernels.values()) == 210


def test_what_cannot_be_frozen_is_named() -> None:
    for make, reason in (
        (lambda: Unet1D(8, dim_mults=(1, 2)), "it is a Unet1D, must be a fastddpm.UNet or a Unet of denoising"),
        (lambda: _with(make_unet("default"), "final_conv", nn.ConvTranspose2d(8, 3, 1)), "its layer final_conv is a"),
        (lambda: _with(make_unet("default"), "forward", lambda x: x), "its forward has been replaced"),
        (
            lambda: _with(make_unet("default"), "init_conv", nn.Conv2d(3, 8, 7, padding=3, padding_mode="circular")),
            "its layer init_conv has groups, dilation and padding_mode (1, (1, 1), 'circular')",
        ),
    ):
        assert reason in str(why_not(make()))
    unet = make_unet("default")
    unet.ups[1][2] = nn.Identity()
    assert why_not(unet) == "its layer ups.1 is of ResnetBlock, ResnetBlock, Identity, Conv2d"
    unet = make_unet("default")
    unet.mid_attn.register_forward_hook(lambda *_: None)
    assert why_not(unet) == "its layer mid_attn has hooks"

    class Own(Unet):
        pass

    assert "it is a Own" in str(why_not(Own(**SMALL)))


def _with(unet: Any, name: str, value: Any) -> Any:
    setattr(unet, name, value)
    return unet


@pytest.mark.parametrize("option", ["default", "self_condition", "classes"])
def test_one_that_computes_something_else_runs_as_it_is(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version of the library may have the same layers and another forward."""
    unet = make_unet(option, torch.float32)
    frozen = FrozenUNet(unet, torch.float32)
    assert frozen.differs() is None
    if option == "classes":
        return
    assert Network(unet, freeze=True).frozen is not None
    own = type(unet).forward
    monkeypatch.setattr(type(unet), "forward", lambda self, x, t, x_self_cond=None: 1.01 * own(self, x, t, x_self_cond))
    assert "frozen it differs by" in str(frozen.differs())
    network = Network(unet, freeze=True)
    assert network.frozen is None
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([3])
    with torch.no_grad():
        assert torch.equal(network(x, t, None), unet(x, t))


def test_sampler_takes_it_directly() -> None:
    unet = make_unet("self_condition", torch.float32)
    arguments = {"num_inference_steps": 4, "prediction_type": "v_prediction"}
    for self_condition in (False, True):
        frozen, plain = (
            Sampler(model, NoiseSchedule.cosine(20), self_condition=self_condition, **arguments)
            for model in (unet, lambda x, t, x_self_cond=None: unet(x, t, x_self_cond))
        )
        assert frozen.network.frozen is not None
        images = (sampler.sample(2, shape=(3, 8, 8), seed=1) for sampler in (frozen, plain))
        torch.testing.assert_close(*images, rtol=0, atol=1e-4)  # within [-1, 1]


def test_dropping_classes_at_random_is_not_frozen() -> None:
    """A call of the class-conditional network drops labels with probability 1/2, which is for training."""
    assert Network(make_unet("classes", torch.float32), freeze=True).frozen is None
    assert why_not(make_unet("classes")) is None


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["default", "three_levels", "full_attention_first", "self_condition", "classes"])
def test_cuda_computes_the_unet(option: str, dtype: torch.dtype) -> None:
    unet = make_unet(option, torch.float32)
    x, labels = make_inputs(unet, option)
    expected = theirs(in_dtype(unet, torch.float64), option, x, 500, labels)
    eager = run(freeze(unet, TIMESTEPS, dtype, backend="eager"), x, 1, labels)
    frozen = freeze(unet, TIMESTEPS, dtype, "cuda")
    assert frozen.static
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, labels=None if labels is None else labels.cuda())
    out = program(torch.tensor([1], device="cuda")).clone()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    assert torch.equal(program(torch.tensor([1], device="cuda")), out)
    assert torch.cuda.memory_allocated() == held
    lost, plain_lost = (rms(y.double().cpu() - expected) for y in (out, eager))
    assert lost <= 2 * plain_lost
