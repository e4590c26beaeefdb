"""A frozen U-Net of any kind is that U-Net: exactly in float64, to rounding in other dtypes, and with few kernels."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import unets
from denoising_diffusion_pytorch import KarrasUnet1D, Unet
from denoising_diffusion_pytorch import classifier_free_guidance as cfg
from fastddpm_kernels import tuned
from fastddpm_kernels.backend import why_not as why_not_backend
from fastddpm_kernels.conv.upsampling import transposed_weight as upsample_conv
from torch import Tensor, nn
from unets import CIFAR10, SMALL

from fastddpm import NoiseSchedule, Sampler
from fastddpm.networks.frozen import FrozenUNet, cuda_instructions, freeze, instructions, why_not
from fastddpm.networks.frozen.kinds.unet import folding
from fastddpm.networks.frozen.program import plan_memory
from fastddpm.networks.frozen.time_table import TimeTable
from fastddpm.networks.network import Network
from fastddpm.networks.unet.layers import Attention
from fastddpm.networks.unet.model import UNet
from fastddpm.sampling.cuda_graph import explain

RESNETS: dict[str, Any] = {
    "block_out_channels": (16, 24, 8),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "layers_per_block": 1,
}
OPTIONS: dict[str, dict[str, Any]] = unets.OPTIONS | {
    "one_head_narrow": {"attention_head_dim": 13},
    "padding_0_two_layers": {"downsample_padding": 0, "layers_per_block": 2, "attention_head_dim": None},
    "scale_shift_classes": {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5},
    # What changes the resolution by residual blocks, pooling or plain upsampling, and heads by block.
    "resnets": RESNETS | {},
    "guided_diffusion": RESNETS
    | {
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "num_class_embeds": 5,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "layers_per_block": 2,
        "out_channels": 6,
    },
    "pool_and_nearest": RESNETS
    | {
        "downsample_type": "pool",
        "upsample_type": "nearest",
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "pool_up_by_resnet": RESNETS | {"downsample_type": "pool", "num_class_embeds": 5},
    "heads_by_block": RESNETS | {"attention_head_dim": (16, 6, 8, 4, 8, 12, 16)},
    "timesteps_scaled": RESNETS | {"timestep_scale": 0.25, "timestep_channels": 24, "time_embedding_dim": 40},
    "resnets_centred": RESNETS | {"center_input_sample": True, "mid_block_scale_factor": 1.3, "layers_per_block": 2},
}
# Of denoising_diffusion_pytorch.
LUCIDRAINS_SMALL: dict[str, Any] = {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2}
LUCIDRAINS: dict[str, dict[str, Any]] = {
    "lucidrains": {},
    "lucidrains_one_level": {"dim_mults": (1,)},
    "lucidrains_three_levels": {"dim_mults": (1, 3, 2)},
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
    "lucidrains_classes": {"num_classes": 5},
    "lucidrains_no_class": {"num_classes": 5},
}
ALL = [*OPTIONS, *LUCIDRAINS]
TIMESTEPS = torch.tensor([999, 500, 499, 3, 0])


@torch.no_grad()
def make_unet(option: str | dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Random parameters, none of them 0 or 1 throughout, of about the scale that keeps activations near 1."""
    torch.manual_seed(seed)
    unet: Any
    if isinstance(option, str) and option in LUCIDRAINS:
        fields = LUCIDRAINS_SMALL | LUCIDRAINS[option]
        unet = (cfg.Unet if "num_classes" in fields else Unet)(**fields).to(dtype)
    else:
        unet = UNet(**SMALL | (OPTIONS[option] if isinstance(option, str) else option)).to(dtype)
    randomize(unet)
    return unet.eval()


@torch.no_grad()
def randomize(unet: nn.Module) -> None:
    if not isinstance(unet, UNet):
        for parameter in unet.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        return
    unets.randomize(unet)


def make_inputs(unet: Any, option: str = "", batch: int = 3) -> tuple[Tensor, Tensor | None]:
    """What the frozen network reads, and its labels; 5 is none of the classes of denoising_diffusion_pytorch."""
    if not isinstance(unet, UNet):
        x = torch.randn(batch, unet.init_conv.in_channels, 8, 4, dtype=torch.float64)
        of = {"lucidrains_classes": [0, 4, 2], "lucidrains_no_class": [5, 5, 5]}
        return x, torch.tensor(of[option])[:batch] if option in of else None
    c = unet.config
    x = torch.randn(batch, c.in_channels, 8, 12 if len(c.block_out_channels) > 2 else 8, dtype=torch.float64)
    if not c.has_classes:
        return x, None
    if c.class_embed_type == "identity":
        return x, torch.randn(batch, c.embedding_channels, dtype=torch.float64)
    return x, torch.tensor([3, 4, 0] if c.class_embed_type is None else [3, 800, 11])[:batch]


@torch.no_grad()
def theirs(unet: Any, option: str, x: Tensor, t: int, labels: Tensor | None) -> Tensor:
    """What the U-Net itself computes."""
    times = torch.full((len(x),), int(t), device=x.device)
    if isinstance(unet, UNet):
        return unet(x, times, labels)
    if labels is not None:
        return unet(x, times, labels.clamp(max=4), cond_drop_prob=float(option == "lucidrains_no_class"))
    if unet.self_condition:
        return unet(x[:, unet.channels :], times, x[:, : unet.channels])
    return unet(x, times)


def in_dtype(unet: Any, dtype: torch.dtype) -> Any:
    """A copy in another dtype; of denoising_diffusion_pytorch with the sinusoids of float32."""
    copied = copy.deepcopy(unet).to(dtype)
    if not isinstance(unet, UNet):
        copied.time_mlp[0] = nn.Sequential(copied.time_mlp[0], _To(dtype))
    return copied


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


@pytest.fixture
def default_float64() -> Iterator[None]:
    """In which denoising_diffusion_pytorch computes its sinusoids."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's convolutions in place of those of CUDA, so that the plan of CUDA runs here."""

    def conv(x: Tensor, w: Tensor, stride: int, padding: int, allow_tf32: bool, out: Tensor) -> None:
        out.copy_(F.conv2d(x, w, None, stride, padding))

    def conv_transpose(x: Tensor, w: Tensor, allow_tf32: bool) -> Tensor:
        return F.conv_transpose2d(x, w, None, stride=2, padding=1).contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(instructions, "cudnn_conv", conv)
    monkeypatch.setattr(instructions, "cudnn_conv_transpose", conv_transpose)


def run(frozen: FrozenUNet, x: Tensor, row: int, labels: Tensor | None = None) -> Tensor:
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, labels=labels)
    step = torch.tensor([row])
    with torch.no_grad():
        first = program(step).clone()
        again = program(step)
    assert torch.equal(first, again), "a run changed what the next one reads"
    return first


def assert_within(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert rms(actual.double() - expected) <= tolerance * rms(expected)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.usefixtures("default_float64", "cudnn")
@pytest.mark.parametrize("option", ALL)
@torch.no_grad()
def test_equals_the_unet_in_float64(option: str) -> None:
    """In plain torch, by the fused ops, and by the plans of CUDA, where every result has its place in one block."""
    unet = make_unet(option)
    x, labels = make_inputs(unet, option)
    expected = {row: theirs(unet, option, x, int(TIMESTEPS[row]), labels) for row in (0, 2, 4)}
    for fused in (False, True):
        frozen = FrozenUNet(unet, backend="eager", fused=fused)
        frozen.timesteps = TIMESTEPS
        for row in (0, 4):
            assert_within(run(frozen, x, row, labels), expected[row], 1e-10)
    for fusion in ("parts", "full"):
        frozen = FrozenUNet(unet, backend="eager", fused=True, fusion=fusion)
        frozen.static, frozen.timesteps = True, TIMESTEPS
        inputs = frozen.new_input(x.shape)
        inputs.copy_(x)
        program = frozen.bind(inputs, labels=labels)
        for row in (4, 2):
            program.arena.fill_(255)  # NaN, were it read before it is written
            assert_within(program(torch.tensor([row])), expected[row], 1e-12)


@pytest.mark.usefixtures("default_float64", "cudnn")
@pytest.mark.parametrize("option", ALL)
@torch.no_grad()
def test_changed_weights_reach_every_plan(option: str) -> None:
    """A weight that is read in two forms, as parts and in a whole layer, has a name for each."""
    unet = make_unet(option)
    x, labels = make_inputs(unet, option)
    programs = []
    for fusion in ("auto", "full"):
        frozen = FrozenUNet(unet, backend="eager", fused=True, fusion=fusion)
        frozen.timesteps = TIMESTEPS
        inputs = frozen.new_input(x.shape)
        programs.append(frozen.bind(inputs.copy_(x), labels=labels))
    for parameter in unet.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    expected = theirs(unet, option, x, int(TIMESTEPS[2]), labels)
    for program in programs:
        program.load()
        assert_within(program(torch.tensor([2])), expected, 1e-10)


@torch.no_grad()
def test_equals_the_unet_of_cifar10() -> None:
    unet = make_unet(CIFAR10)
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    frozen = freeze(unet, [700, 3])
    assert_within(run(frozen, x, 1), unet(x, 3), 1e-10)


@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        *((name, torch.float32) for name in ("padding_0", "three_levels", "guided_diffusion", "lucidrains_classes")),
        *((name, torch.bfloat16) for name in ("classes", "guided_diffusion", "lucidrains_three_levels")),
        *((name, torch.float16) for name in ("pool_and_nearest", "three_levels", "full_attention_first")),
    ],
    ids=str,
)
def test_rounding_is_bounded_by_the_unets_own(option: str, dtype: torch.dtype) -> None:
    ours = option in OPTIONS  # natively, test_frozen_native.py holds it to what its algorithms must lose
    unet = make_unet(option, torch.float64 if ours else torch.float32)
    x, labels = make_inputs(unet, option)
    expected = theirs(in_dtype(unet, torch.float64), option, x, 500, labels)
    plain = rms(theirs(in_dtype(unet, dtype), option, x.to(dtype), 500, labels).double() - expected)
    for backend in ("eager",) if ours else ("eager", "auto"):
        frozen = freeze(unet, TIMESTEPS, dtype, backend=backend)
        # Winograd's transforms lose a few bits more than a direct convolution, in float32 alone.
        allowed = 4 if frozen.backend == "native" else 1.5
        assert rms(run(frozen, x, 1, labels).double() - expected) <= allowed * plain, backend


@pytest.mark.skipif(why_not_backend("triton", "cpu") is not None, reason=str(why_not_backend("triton", "cpu")))
@pytest.mark.parametrize(
    ("option", "dtype"),
    [("one_head", torch.float32), ("scale_shift_classes", torch.float16), ("lucidrains", torch.float16)],
    ids=str,
)
def test_triton_kernels_compute_the_unet(option: str, dtype: torch.dtype) -> None:
    unet = make_unet(option, torch.float32)
    x, labels = make_inputs(unet, option, batch=1)
    expected = theirs(in_dtype(unet, torch.float64), option, x, 500, labels)
    plain_lost = rms(run(freeze(unet, TIMESTEPS, dtype, backend="eager"), x, 1, labels).double() - expected)
    for fusion in ("parts", "full"):
        frozen = freeze(unet, TIMESTEPS, dtype, backend="triton", fusion=fusion)
        assert frozen.fused
        lost = rms(run(frozen, x, 1, labels).double() - expected)
        assert lost <= 1.5 * plain_lost, fusion


def test_upsampling_convolution_is_a_transposed_one() -> None:
    weight, x = torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randn(2, 3, 4, 7, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    folded = F.conv_transpose2d(x, upsample_conv(weight), stride=2, padding=1)
    assert_within(folded, expected, 1e-13)


@pytest.mark.parametrize(("channels", "head_dim"), [(16, None), (16, 8), (24, 16)])
@torch.no_grad()
def test_attention_projections(channels: int, head_dim: int | None) -> None:
    torch.manual_seed(0)
    layer = Attention(channels, head_dim=head_dim, groups=None, eps=1e-5).double()
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64)
    weight, bias = folding.attention_projections(layer)
    inner = layer.heads * layer.head_dim
    q, k, v = F.linear(x.flatten(2).transpose(1, 2), weight, bias).split([inner, inner, len(bias) - 2 * inner], dim=2)
    q, k, v = (part.unflatten(2, (layer.heads, -1)).transpose(1, 2) for part in (q, k, v))
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if not folding.folds_output(layer):
        h = layer.to_out[0](h)
    assert_within(x + h.transpose(1, 2).unflatten(2, (3, 3)), layer(x), 1e-13)


@torch.no_grad()
def test_labels_without_a_table_of_all_classes() -> None:
    """Where a row per class and step would be too large, rows are computed."""
    unet = make_unet("classes")
    x, labels = make_inputs(unet)
    frozen = freeze(unet, TIMESTEPS)
    frozen.time_table = lambda m, t, labels, _, n: TimeTable(  # type: ignore[method-assign]
        m, frozen.embeddings, frozen.time_weight, frozen.time_bias, t, labels, n, torch.float64, max_bytes=1
    )
    assert_within(run(frozen, x, 1, labels), unet(x, TIMESTEPS[1], labels), 1e-10)


@torch.no_grad()
def test_new_values_need_no_new_program() -> None:
    unet = make_unet("classes")
    x, labels = make_inputs(unet)
    assert labels is not None
    frozen = freeze(unet, TIMESTEPS)
    inputs, timesteps, own_labels = frozen.new_input(x.shape), TIMESTEPS.clone(), labels.clone()
    inputs.copy_(x)
    program = frozen.bind(inputs, timesteps, own_labels)
    step = torch.tensor([1])
    assert_within(program(step), unet(x, 500, labels), 1e-10)
    inputs.copy_(2 * x)
    own_labels.copy_(labels.flip(0))
    timesteps[1] = 77
    program.load()
    assert_within(program(step), unet(2 * x, 77, labels.flip(0)), 1e-10)
    assert program.loads == 2
    program.load()
    assert program.loads == 2, "nothing had changed"

    places = {name: tensor.data_ptr() for name, tensor in frozen.constants.tensors.items()}
    randomize(unet)
    program.load()
    assert_within(program(step), unet(2 * x, 77, labels.flip(0)), 1e-10)
    assert places == {name: tensor.data_ptr() for name, tensor in frozen.constants.tensors.items()}


@torch.no_grad()
def test_freezing_leaves_the_unet_alone() -> None:
    unet = make_unet("one_head").train()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    x, _ = make_inputs(unet)
    run(freeze(unet, TIMESTEPS, torch.float16), x, 0)
    assert unet.training
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_needs_no_context() -> None:
    """Outside of no_grad too, nothing of a run is recorded."""
    unet = make_unet("classes")
    x, labels = make_inputs(unet)
    frozen = freeze(unet, TIMESTEPS)
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, labels=labels)
    assert not program(torch.tensor([1])).requires_grad
    program.load()
    assert not program(torch.tensor([0])).requires_grad


def test_memory_is_shared_by_what_does_not_live_at_the_same_time() -> None:
    with torch.device("meta"):
        unet = UNet(**CIFAR10)
    frozen = FrozenUNet(unet, torch.float16, "meta")
    program = frozen.bind(frozen.new_input((4, 3, 32, 32)), TIMESTEPS.to("meta"))
    # Half a megabyte and more is written by each instruction at the highest resolution alone.
    assert program.arena.numel() < 10 * 2**20

    sizes, first, last = {}, {}, {}
    for index, instruction in enumerate(program.instructions):
        for slot in instruction.writes:
            first.setdefault(slot, index)
            sizes[slot] = 100 + 37 * slot
        for slot in (*instruction.reads, *instruction.writes):
            last[slot] = index
    offsets, total = plan_memory(sizes, first, last)
    assert total < sum(sizes.values()) / 4
    for a in first:
        assert offsets[a] % 256 == 0
        assert offsets[a] + sizes[a] <= total
        for b in first:
            if a < b and first[a] <= last[b] and first[b] <= last[a]:
                assert offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]


def test_launches_of_cifar10() -> None:
    """In parts, and in whole layers: two kernels a residual block, one an attention block."""
    with torch.device("meta"):
        unet = UNet(**CIFAR10)
    for batch in (1, 2, 8, 64, 256, 1024):
        # The reverse step and the counter come on top.
        parts, full = (
            sum(i.kernels for i in cuda_instructions(unet, batch, fusion=fusion)) + 2 for fusion in ("auto", "full")
        )
        assert parts == (137 if batch < 4 else 136), f"{batch}: the README says otherwise"
        assert full == (61 if batch < 1024 else 62), f"{batch}: docs/sampling.md says otherwise"
    whole = cuda_instructions(unet, 1, fusion="full")
    of_block = [i for i in whole if i.name.startswith("down_blocks.1.resnets.0.")]
    assert [(i.name.rpartition(".")[2], i.kernels) for i in of_block] == [("conv1", 1), ("conv2", 1)]
    assert sum(i.kernels for i in whole if ".attentions." in i.name) == 6


def test_whole_layers_need_a_gpu_or_their_name() -> None:
    assert FrozenUNet(make_unet({}), backend="eager", fused=True).fusion == "auto"
    assert FrozenUNet(make_unet({})).fusion == "parts"
    with pytest.raises(ValueError, match="fusion is 'full', must be 'auto' or 'parts' on cpu with eager"):
        FrozenUNet(make_unet({}), fusion="full")
    with pytest.raises(ValueError, match="fusion is 'half', must be one of 'auto', 'full', 'parts'"):
        FrozenUNet(make_unet({}), fusion="half")


@torch.no_grad()
def test_a_table_decides_layer_by_layer() -> None:
    """By "auto" a layer is whole where a tuned table names a tile, and else the vendor's; the result is the same."""
    unet = make_unet("padding_0")
    x, labels = make_inputs(unet, "padding_0")
    expected = unet(x, TIMESTEPS[1], labels)

    def bound() -> list[str]:
        frozen = FrozenUNet(unet, backend="eager", fused=True)
        frozen.timesteps = TIMESTEPS
        assert_within(run(frozen, x, 1, labels), expected, 1e-12)
        program = frozen.bind(frozen.new_input(x.shape), labels=labels)
        for factor in (1.25, 0.8):  # weights that change reach whole layers and parts, too
            for parameter in unet.parameters():
                parameter.mul_(factor)
            assert_within(run(frozen, x, 1, labels), unet(x, TIMESTEPS[1], labels), 1e-12)
        return [one.name for one in program.instructions if one.kind == "norm"]

    with tuned.recording() as seen:
        norms = bound()
    keys = [key for key in seen if key.op == "fused_conv" and key.named()["unit"] == 0 and key.named()["groups"]]
    tile = {"block_m": 64, "block_n": 64, "block_k": 32, "splits": 1, "one_launch": True, "num_warps": 4,
            "num_stages": 3, "norm": "merge", "pdl": False}  # fmt: skip
    for chosen in ([keys[0]], keys[1:3], keys):
        with tuned.using(
            torch.device("cpu"), {key: {"implementation": "vendor"} for key in keys} | dict.fromkeys(chosen, tile)
        ):
            fewer = bound()
        assert len(fewer) < len(norms)
    assert not any("resnets" in name for name in fewer)


def test_counts_flops() -> None:
    """Those of the published U-Net, 6.222 GMAC, less what the folds save."""
    with torch.device("meta"):
        unet = UNet(**CIFAR10)
    total = sum(instruction.flops for instruction in cuda_instructions(unet, 2)) / 2
    assert 5.5e9 < total / 2 < 6.222e9


@torch.no_grad()
def test_refuses_what_it_does_not_know() -> None:
    unet = make_unet({})
    assert why_not(unet) is None
    assert "Identity" in str(why_not(nn.Identity()))
    handle = unet.mid_block.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="unet cannot be frozen: its layer mid_block has hooks"):
        freeze(unet, TIMESTEPS)
    handle.remove()
    unet.conv_in = nn.Sequential(unet.conv_in)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="its layer conv_in is a Sequential"):
        freeze(unet, TIMESTEPS)


BAD: dict[str, tuple[str, tuple[int, ...], Tensor | None]] = {
    "inputs are 7x8 pixels, both must be positive multiples of 2": ("heads_of_8", (1, 3, 7, 8), None),
    "inputs are 0x8 pixels": ("heads_of_8", (1, 3, 0, 8), None),
    "must have shape [N, 3, H, W]": ("heads_of_8", (1, 4, 8, 8), None),
    "class_labels are given": ("heads_of_8", (1, 3, 8, 8), torch.tensor([1])),
    "class_labels are missing": ("classes", (1, 3, 8, 8), None),
    "have shape (1,), must have (2,)": ("classes", (2, 3, 8, 8), torch.tensor([1])),
    "have dtype torch.int32": ("classes", (1, 3, 8, 8), torch.tensor([1], dtype=torch.int32)),
    "have shape (1,), must have (1, 64)": ("class_identity", (1, 3, 8, 8), torch.tensor([1])),
    "must have shape [N, 6, H, W]": ("self_condition", (1, 4, 8, 8), None),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    option, shape, labels = BAD[message]
    frozen = freeze(make_unet(option), TIMESTEPS)
    with pytest.raises(ValueError) as raised:
        frozen.bind(frozen.new_input(shape), labels=labels)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        freeze(make_unet({}), TIMESTEPS, torch.int8)
    without = FrozenUNet(make_unet({}))
    with pytest.raises(ValueError, match="timesteps is None"):
        without.bind(without.new_input((1, 3, 8, 8)))


@pytest.mark.parametrize("change", ["scaled", "flipped", "constant", "one"])
@torch.no_grad()
def test_weights_written_past_autograd_are_taken_over(change: str) -> None:
    """As what averages weights does, through `.data`."""
    unet = make_unet({})
    x, _ = make_inputs(unet)
    frozen = freeze(unet, TIMESTEPS)
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs)
    program(torch.tensor([1]))
    version = unet.conv_norm_out.weight._version
    if change == "scaled":
        for parameter in unet.parameters():
            parameter.data.mul_(1.5)
    elif change == "flipped":
        unet.conv_out.weight.data.neg_()
    elif change == "constant":
        unet.conv_norm_out.weight.data.fill_(2)
    else:
        unet.conv_out.bias.data[0] += 1e-3
    assert unet.conv_norm_out.weight._version == version
    program.load()
    assert_within(program(torch.tensor([1])), unet(x, TIMESTEPS[1]), 1e-10)


@torch.no_grad()
def test_a_unet_that_changed_its_layers_is_refused() -> None:
    unet = make_unet({})
    program = freeze(unet, TIMESTEPS).bind(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    program.load()
    handle = unet.mid_block.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="unet has changed since it was frozen .*: its layer mid_block has hooks"):
        program.load()
    handle.remove()
    program.load()
    own, unet.conv_in.weight = unet.conv_in.weight, nn.Parameter(torch.zeros(8, 3, 3, 3).double())
    for _ in range(2):  # what has failed is not taken for done
        with pytest.raises(RuntimeError):
            program.load()
    unet.conv_in.weight = own
    program.load()
    assert program(torch.tensor([1])).isfinite().all()


def test_replaced_methods_are_not_passed_over() -> None:
    unet = make_unet({})
    unet.predict = lambda x, emb: x  # type: ignore[method-assign]
    assert why_not(unet) == "its predict has been replaced"
    unet = make_unet({})
    unet.conv_in.forward = lambda x: x  # type: ignore[method-assign]
    assert why_not(unet) == "its conv_in.forward has been replaced"


def test_devices_without_float64_are_named() -> None:
    assert why_not(make_unet({}), "mps") == "weights are folded in float64, which mps may not have"
    assert why_not(make_unet({}), "cuda") is None


@torch.no_grad()
def test_time_is_not_rounded_to_the_dtype_of_the_unet() -> None:
    """A U-Net in bfloat16 that is run in float64 is that U-Net converted."""
    for option in ("one_head", "class_timestep"):
        unet = make_unet(option).bfloat16()
        x, labels = make_inputs(unet)
        expected = copy.deepcopy(unet).double()(x, TIMESTEPS[1], labels)
        assert_within(run(freeze(unet, TIMESTEPS, torch.float64), x, 1, labels), expected, 1e-10)


@torch.no_grad()
def test_autocast_does_not_choose_the_dtype() -> None:
    unet = make_unet("one_head", torch.float32)
    x, _ = make_inputs(unet)
    frozen = freeze(unet, TIMESTEPS)
    expected = run(frozen, x, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(frozen, x, 1), expected)


def test_gradients_are_not_recorded() -> None:
    unet = make_unet("classes")
    frozen = freeze(unet, TIMESTEPS)
    program = frozen.bind(frozen.new_input((1, 3, 8, 8)), labels=torch.tensor([2]))
    assert not program(torch.tensor([1])).requires_grad
    assert not program(torch.tensor([2])).requires_grad


def test_inference_mode_is_left() -> None:
    with torch.inference_mode():
        unet = make_unet({})
        frozen = freeze(unet, TIMESTEPS)
        inputs = frozen.new_input((1, 3, 8, 8))
        program = frozen.bind(inputs)
        first = program(torch.tensor([1])).clone()
        for parameter in unet.parameters():
            parameter.mul_(0.5)  # inference tensors do not count this
    program.load()
    second = program(torch.tensor([1]))
    assert not torch.equal(first, second)
    with torch.no_grad():
        assert_within(second, unet(inputs, TIMESTEPS[1]), 1e-10)


@torch.no_grad()
def test_programs_of_several_threads_all_get_new_weights() -> None:
    unet = make_unet({})
    x, _ = make_inputs(unet)
    frozen = freeze(unet, TIMESTEPS)
    put, first = frozen.constants.put, threading.Barrier(2)

    def slow_put(name: str, *arguments: Any) -> Tensor:
        if name == "conv_in.weight":
            with contextlib.suppress(threading.BrokenBarrierError):
                first.wait(0.2)  # both threads are here at once, unless one keeps the other out
            missing = name not in frozen.constants.tensors
            with contextlib.suppress(threading.BrokenBarrierError):
                first.wait(0.2)
            if missing:
                frozen.constants.tensors.pop(name, None)
        return put(name, *arguments)

    frozen.constants.put = slow_put  # type: ignore[method-assign]
    programs: list[Any] = []

    def bind() -> None:
        inputs = frozen.new_input(x.shape)
        inputs.copy_(x)
        programs.append(frozen.bind(inputs))

    threads = [threading.Thread(target=bind) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    frozen.constants.put = put  # type: ignore[method-assign]
    for program in programs:
        program.load()
    randomize(unet)
    for program in programs:
        program.load()
        assert_within(program(torch.tensor([1])), unet(x, TIMESTEPS[1]), 1e-10)


def test_kernels_of_guided_diffusion_at_64_pixels() -> None:
    """The published ImageNet model: 64 pixels, 192 channels, 3 residual blocks a level, up and down by such blocks."""
    with torch.device("meta"):
        unet = UNet(
            sample_size=64,
            out_channels=6,
            block_out_channels=(192, 384, 576, 768),
            down_block_types=("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
            up_block_types=(*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
            layers_per_block=3,
            attention_head_dim=64,
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=1000,
        )
    assert sum(parameter.numel() for parameter in unet.parameters()) == 295_904_454  # 296M in the paper
    found = cuda_instructions(unet, 8)
    resampling = [i for i in found if i.name.endswith((".halve", ".double"))]
    assert len(resampling) == 3 * 2 + 3  # both paths on the way down; on the way up the convolution upsamples
    assert sum(i.kernels for i in found) + 2 == 292  # with the reverse step and the counter


# Of denoising_diffusion_pytorch.


@pytest.mark.usefixtures("default_float64")
def test_self_condition_may_be_left_out() -> None:
    """As theirs takes it for zeros."""
    unet = make_unet("self_condition")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = unet(x, torch.full((2,), 500))
    assert_within(run(freeze(unet, TIMESTEPS), x, 1), expected, 1e-10)
    wide = FrozenUNet(unet, backend="eager", fused=True)
    wide.timesteps, wide.in_channels = TIMESTEPS, 8  # filled up to a whole vector, as on CUDA
    inputs = wide.new_input((4, 3, 8, 8))
    inputs[2:].copy_(x)
    assert_within(wide.bind(inputs[2:])(torch.tensor([1])), expected, 1e-10)


@pytest.mark.parametrize("option", ["lucidrains", "self_condition", "lucidrains_classes"])
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
        (lambda: KarrasUnet1D(seq_len=8, dim=8, dim_max=8), "it is a KarrasUnet1D, must be a fastddpm.UNet"),
        (lambda: _with(make_unet("lucidrains"), "final_conv", nn.ConvTranspose2d(8, 3, 1)), "layer final_conv is a"),
        (lambda: _with(make_unet("lucidrains"), "forward", lambda x: x), "its forward has been replaced"),
        (
            lambda: _with(make_unet("lucidrains"), "init_conv", nn.Conv2d(3, 8, 7, padding=3, padding_mode="circular")),
            "its layer init_conv has groups, dilation and padding_mode (1, (1, 1), 'circular')",
        ),
    ):
        assert reason in str(why_not(make()))
    unet = make_unet("lucidrains")
    unet.ups[1][2] = nn.Identity()
    assert why_not(unet) == "its layer ups.1 is of ResnetBlock, ResnetBlock, Identity, Conv2d"
    unet = make_unet("lucidrains")
    unet.mid_attn.register_forward_hook(lambda *_: None)
    assert why_not(unet) == "its layer mid_attn has hooks"

    class Own(Unet):
        pass

    assert "it is a Own" in str(why_not(Own(**LUCIDRAINS_SMALL)))


def _with(unet: Any, name: str, value: Any) -> Any:
    setattr(unet, name, value)
    return unet


@pytest.mark.parametrize("option", ["lucidrains", "self_condition", "lucidrains_classes"])
def test_one_that_computes_something_else_runs_as_it_is(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version of the library may have the same layers and another forward."""
    unet = make_unet(option, torch.float32)
    frozen = FrozenUNet(unet, torch.float32)
    assert frozen.differs() is None
    if option == "lucidrains_classes":
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
    assert Network(make_unet("lucidrains_classes", torch.float32), freeze=True).frozen is None
    assert why_not(make_unet("lucidrains_classes")) is None


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ALL)
@torch.no_grad()
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
    lost, plain_lost = (rms(y.double().cpu() - expected) for y in (out, eager))
    assert lost <= 2 * plain_lost


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_launches_what_was_counted() -> None:
    """Kernels of one step, as the profiler sees them. Libraries may split a convolution: at most 160 in all."""
    unet = make_unet(CIFAR10, torch.float32)
    for batch in (1, 64):
        frozen = freeze(unet, TIMESTEPS, torch.float16, "cuda")
        program = frozen.bind(frozen.new_input((batch, 3, 32, 32)))
        step = torch.tensor([1], device="cuda")
        for _ in range(3):
            program(step)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            program(step)
            torch.cuda.synchronize()
        launched = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
        counted = sum(instruction.kernels for instruction in program.instructions)
        assert len(launched) + 2 <= 160, sorted(launched)
        assert len(launched) >= counted


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_steps_do_not_wait_nor_grow() -> None:
    unet = make_unet(CIFAR10, torch.float32)
    frozen = freeze(unet, TIMESTEPS, torch.float16, "cuda")
    program = frozen.bind(frozen.new_input((2, 3, 32, 32)))
    step = torch.tensor([1], device="cuda")
    for _ in range(3):
        program(step)
    torch.cuda.synchronize()
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            program(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.memory_reserved() == reserved
