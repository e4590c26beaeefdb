"""A frozen U-Net is the U-Net: exactly in float64, to rounding in other dtypes, and with few kernels."""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.backend import why_not as why_not_backend
from torch import Tensor, nn

from fastddpm.networks.frozen import FrozenUNet, cuda_instructions, freeze, instructions, why_not
from fastddpm.networks.frozen.folding import upsample_conv
from fastddpm.networks.frozen.kinds.unet import folding
from fastddpm.networks.frozen.program import plan_memory
from fastddpm.networks.frozen.time_table import TimeTable
from fastddpm.networks.unet.layers import Attention
from fastddpm.networks.unet.model import UNet

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 24),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "heads_of_8": {},
    "one_head": {"attention_head_dim": None},
    "head_dim_not_a_divisor": {"attention_head_dim": 7},
    "one_head_narrow": {"attention_head_dim": 13},
    "padding_0": {"downsample_padding": 0},
    "padding_0_two_layers": {"downsample_padding": 0, "layers_per_block": 2, "attention_head_dim": None},
    "classes": {"num_class_embeds": 5},
    "class_timestep": {"class_embed_type": "timestep"},
    "class_identity": {"class_embed_type": "identity"},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift_classes": {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5},
    "attn_groups": {"attn_norm_num_groups": 2, "norm_eps": 1e-2},
    "mid_scale": {"mid_block_scale_factor": 1.7},
    "no_mid_attention": {"add_attention": False},
    "no_mid_block": {"mid_block_type": None},
    "centred": {"center_input_sample": True},
    "channels": {"in_channels": 1, "out_channels": 6, "layers_per_block": 2},
    "one_level": {
        "block_out_channels": (16,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    },
    "three_levels": {
        "block_out_channels": (8, 24, 16),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    },
}
TIMESTEPS = torch.tensor([999, 500, 499, 3, 0])
# google/ddpm-cifar10-32.
CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


def make_unet(fields: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> UNet:
    """Random parameters, none of them 0 or 1 throughout, of about the scale that keeps activations near 1."""
    torch.manual_seed(seed)
    unet = UNet(**SMALL | fields).to(dtype)
    randomize(unet)
    return unet.eval()


@torch.no_grad()
def randomize(unet: UNet) -> None:
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                norm = isinstance(module, nn.GroupNorm) and name == "weight"
                parameter.normal_(mean=1.0 if norm else 0.0, std=0.3)


def make_inputs(unet: UNet, batch: int = 3, size: int = 8) -> tuple[Tensor, Tensor | None]:
    c = unet.config
    x = torch.randn(batch, c.in_channels, size, size, dtype=torch.float64)
    if not c.has_classes:
        return x, None
    if c.class_embed_type == "identity":
        return x, torch.randn(batch, c.embedding_channels, dtype=torch.float64)
    return x, torch.tensor([3, 4, 0] if c.class_embed_type is None else [3, 800, 11])[:batch]


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


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_equals_the_unet_in_float64(option: str, fused: bool) -> None:
    unet = make_unet(OPTIONS[option])
    x, labels = make_inputs(unet)
    frozen = FrozenUNet(unet, backend="eager", fused=fused)
    frozen.timesteps = TIMESTEPS
    for row in (0, 2, 4):
        expected = unet(x, TIMESTEPS[row], labels)
        assert_within(run(frozen, x, row, labels), expected, 1e-10)


@torch.no_grad()
def test_equals_the_unet_of_cifar10() -> None:
    unet = make_unet(CIFAR10)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    frozen = freeze(unet, [700, 3])
    assert_within(run(frozen, x, 1), unet(x, 3), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", ["one_head", "padding_0", "scale_shift", "classes", "three_levels"])
@torch.no_grad()
def test_rounding_is_bounded_by_the_unets_own(option: str, dtype: torch.dtype) -> None:
    unet = make_unet(OPTIONS[option])
    x, labels = make_inputs(unet)
    expected = unet(x, TIMESTEPS[1], labels)
    plain = copy.deepcopy(unet).to(dtype)(x.to(dtype), TIMESTEPS[1], labels)
    frozen = freeze(unet, TIMESTEPS, dtype, backend="eager")
    lost, plain_lost = (rms(out.double() - expected) for out in (run(frozen, x, 1, labels), plain))
    assert lost <= 1.5 * plain_lost


@pytest.mark.skipif(why_not_backend("triton", "cpu") is not None, reason=str(why_not_backend("triton", "cpu")))
@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ("one_head", torch.float32),
        ("padding_0", torch.float16),
        ("scale_shift_classes", torch.float16),
        ("channels", torch.float32),
    ],
    ids=str,
)
@torch.no_grad()
def test_triton_kernels_compute_the_unet(option: str, dtype: torch.dtype) -> None:
    unet = make_unet(OPTIONS[option])
    x, labels = make_inputs(unet, batch=2)
    expected = unet(x, TIMESTEPS[1], labels)
    plain = copy.deepcopy(unet).to(dtype)(x.to(dtype), TIMESTEPS[1], labels)
    frozen = freeze(unet, TIMESTEPS, dtype, backend="triton")
    assert frozen.fused
    lost, plain_lost = (rms(out.double() - expected) for out in (run(frozen, x, 1, labels), plain))
    assert lost <= 1.5 * plain_lost


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
    q, k, v = F.linear(x.flatten(2).transpose(1, 2), weight, bias).split(
        [inner, inner, len(bias) - 2 * inner], dim=2
    )
    q, k, v = (part.unflatten(2, (layer.heads, -1)).transpose(1, 2) for part in (q, k, v))
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if not folding.folds_output(layer):
        h = layer.to_out[0](h)
    assert_within(x + h.transpose(1, 2).unflatten(2, (3, 3)), layer(x), 1e-13)


@torch.no_grad()
def test_labels_without_a_table_of_all_classes() -> None:
    """Where a row per class and step would be too large, rows are computed."""
    unet = make_unet(OPTIONS["classes"])
    x, labels = make_inputs(unet)
    frozen = freeze(unet, TIMESTEPS)
    frozen.time_table = lambda m, t, labels, n: TimeTable(  # type: ignore[method-assign]
        m, frozen.embeddings, frozen.time_weight, frozen.time_bias, t, labels, n, torch.float64, max_bytes=1
    )
    assert_within(run(frozen, x, 1, labels), unet(x, TIMESTEPS[1], labels), 1e-10)


@torch.no_grad()
def test_new_values_need_no_new_program() -> None:
    unet = make_unet(OPTIONS["classes"])
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
    unet = make_unet(OPTIONS["one_head"]).train()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    x, _ = make_inputs(unet)
    run(freeze(unet, TIMESTEPS, torch.float16), x, 0)
    assert unet.training
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_needs_no_context() -> None:
    """Outside of no_grad too, nothing of a run is recorded."""
    unet = make_unet(OPTIONS["classes"])
    x, labels = make_inputs(unet)
    frozen = freeze(unet, TIMESTEPS)
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, labels=labels)
    assert not program(torch.tensor([1])).requires_grad
    program.load()
    assert not program(torch.tensor([0])).requires_grad


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_activations_in_one_block_of_memory(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but for the library that convolves: every result in its place, which others use before and after."""

    def conv(x: Tensor, w: Tensor, stride: int, padding: int, allow_tf32: bool, out: Tensor) -> None:
        out.copy_(F.conv2d(x, w, None, stride, padding))

    def conv_transpose(x: Tensor, w: Tensor, allow_tf32: bool) -> Tensor:
        return F.conv_transpose2d(x, w, None, stride=2, padding=1).contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(instructions, "cudnn_conv", conv)
    monkeypatch.setattr(instructions, "cudnn_conv_transpose", conv_transpose)
    unet = make_unet(OPTIONS[option])
    x, labels = make_inputs(unet)
    frozen = FrozenUNet(unet, backend="eager", fused=True)
    frozen.static, frozen.timesteps = True, TIMESTEPS
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, labels=labels)
    for row in (4, 1):
        program.arena.fill_(255)  # NaN, were it read before it is written
        assert_within(program(torch.tensor([row])), unet(x, TIMESTEPS[row], labels), 1e-10)


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


def test_cifar10_takes_at_most_160_kernels() -> None:
    with torch.device("meta"):
        unet = UNet(**CIFAR10)
    for batch in (1, 8, 64, 256, 1024):
        # The reverse step and the counter come on top.
        total = sum(instruction.kernels for instruction in cuda_instructions(unet, batch)) + 2
        assert total <= 160, batch
        assert total == (137 if batch == 1 else 136), f"{batch}: the README says otherwise"


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


def test_bad_input() -> None:
    frozen = freeze(make_unet({}), TIMESTEPS)
    with pytest.raises(ValueError, match=r"inputs are 7x8 pixels, both must be positive multiples of 2"):
        frozen.bind(frozen.new_input((1, 3, 7, 8)))
    with pytest.raises(ValueError, match=r"inputs have shape \(1, 4, 8, 8\), must have shape \[N, 3, H, W\]"):
        frozen.bind(frozen.new_input((1, 4, 8, 8)))
    with pytest.raises(ValueError, match="class_labels are given, but this U-Net has no classes"):
        frozen.bind(frozen.new_input((1, 3, 8, 8)), labels=torch.tensor([1]))
    with_classes = freeze(make_unet(OPTIONS["classes"]), TIMESTEPS)
    with pytest.raises(ValueError, match="class_labels are missing"):
        with_classes.bind(with_classes.new_input((1, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"class_labels have shape \(1,\), must have \(2,\)"):
        with_classes.bind(with_classes.new_input((2, 3, 8, 8)), labels=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"class_labels have dtype torch\.int32, must have torch\.int64"):
        with_classes.bind(with_classes.new_input((1, 3, 8, 8)), labels=torch.tensor([1], dtype=torch.int32))
    identity = freeze(make_unet(OPTIONS["class_identity"]), TIMESTEPS)
    with pytest.raises(ValueError, match=r"class_labels have shape \(1,\), must have \(1, 64\)"):
        identity.bind(identity.new_input((1, 3, 8, 8)), labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="inputs are 0x8 pixels"):
        frozen.bind(frozen.new_input((1, 3, 0, 8)))
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
        unet = make_unet(OPTIONS[option]).bfloat16()
        x, labels = make_inputs(unet)
        expected = copy.deepcopy(unet).double()(x, TIMESTEPS[1], labels)
        assert_within(run(freeze(unet, TIMESTEPS, torch.float64), x, 1, labels), expected, 1e-10)


@torch.no_grad()
def test_autocast_does_not_choose_the_dtype() -> None:
    unet = make_unet(OPTIONS["one_head"], torch.float32)
    x, _ = make_inputs(unet)
    frozen = freeze(unet, TIMESTEPS)
    expected = run(frozen, x, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(frozen, x, 1), expected)


def test_gradients_are_not_recorded() -> None:
    unet = make_unet(OPTIONS["classes"])
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


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", [*OPTIONS, "cifar10"])
@torch.no_grad()
def test_cuda_computes_the_unet(option: str, dtype: torch.dtype) -> None:
    cifar10 = option == "cifar10"
    unet = make_unet(CIFAR10 if cifar10 else OPTIONS[option])
    x, labels = make_inputs(unet, size=32 if cifar10 else 8)
    expected = unet(x, TIMESTEPS[1], labels)
    labels = None if labels is None else labels.cuda()
    # Chosen from the same algorithms as the frozen one's; without `enabled` this would switch cuDNN off.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=False):
        eager = copy.deepcopy(unet).to("cuda", dtype)
        eager.backend = "eager"
        plain = eager(x.to("cuda", dtype), TIMESTEPS[1].cuda(), labels)
    frozen = freeze(unet, TIMESTEPS, dtype, "cuda")
    assert frozen.static
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, labels=labels)
    out = program(torch.tensor([1], device="cuda"))
    lost, plain_lost = (rms(y.double().cpu() - expected) for y in (out, plain))
    assert lost <= 1.5 * plain_lost


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
