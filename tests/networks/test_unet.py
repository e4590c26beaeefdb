"""The U-Net against diffusers' UNet2DModel, with the same random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import unets
from diffusers import UNet2DModel
from fastddpm_kernels.testing import assert_close, errors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from unets import CELEBA_HQ, CIFAR10, SMALL, randomize

from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.files import OLD_WEIGHTS_FILE, WEIGHTS_FILE
from fastddpm.networks.unet.model import UNet

RESNETS: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (16, 24, 8),
}
# What differs from SMALL. Whatever diffusers does with an option, so does fastddpm.
OPTIONS: dict[str, dict[str, Any]] = unets.OPTIONS | {
    "original_sinusoids": {"flip_sin_to_cos": False, "freq_shift": 1},
    "odd_sinusoids": {"block_out_channels": (15, 25), "norm_num_groups": 5, "attention_head_dim": 5},
    "time_embedding_dim": {"time_embedding_dim": 20},
    "scale_shift_attn_groups": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 3},
    "resnet_resampling": {"downsample_type": "resnet", "upsample_type": "resnet", **RESNETS},
    "resnet_resampling_scale_shift": {
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "downsample_type": "resnet",
        "num_class_embeds": 5,
        **RESNETS,
    },
    "resnet_resampling_in_some_blocks": {"upsample_type": "resnet", "layers_per_block": 2},
}


def pair(fields: dict[str, Any]) -> tuple[UNet2DModel, UNet]:
    """diffusers' model and ours over the same, shared, random parameters, none of them 0 or 1 throughout."""
    theirs = UNet2DModel(**fields).eval()
    randomize(theirs)
    return theirs, share(theirs, fields)


def share(theirs: UNet2DModel, fields: dict[str, Any]) -> UNet:
    with torch.device("meta"):
        ours = UNet(**fields)
    ours.load_state_dict(theirs.state_dict(keep_vars=True), assign=True)
    return ours.eval()


def inputs(config: UNetConfig, size: int = 8, batch: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(batch, config.in_channels, size, size, dtype=torch.float64)
    t = torch.tensor([7, 999, 0])[:batch]
    labels = None
    if config.class_embed_type == "identity":
        labels = torch.randn(batch, config.embedding_channels)
    elif config.class_embed_type == "timestep":
        labels = torch.tensor([3, 800, 11])[:batch]
    elif config.num_class_embeds is not None:
        labels = torch.tensor([4, 0, 2])[:batch]
    return x, t, labels


def in_float64(theirs: UNet2DModel, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """diffusers' output in float64; it leaves the sinusoids of a class_embed_type "timestep" in float32."""
    if theirs.config.class_embed_type == "timestep":
        theirs.class_embedding.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return theirs(x, t, labels).sample


@pytest.mark.parametrize(
    ("fields", "size", "parameters"),
    [(CIFAR10, 32, 35_746_307), (CELEBA_HQ, 32, 113_673_219)],
    ids=["cifar10", "celebahq"],
)
@torch.no_grad()
def test_published_models(fields: dict[str, Any], size: int, parameters: int) -> None:
    theirs, ours = pair(fields)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    x, t, _ = inputs(ours.config, size, batch=1)
    single, eager = ours(x.float(), t), theirs(x.float(), t).sample
    theirs.double()
    expected = theirs(x, t).sample
    assert_close(share(theirs, fields)(x, t), expected)
    assert_close(single, expected, eager=eager)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_and_gradients(option: str) -> None:
    theirs, ours = pair(SMALL | OPTIONS[option])
    x, t, labels = inputs(ours.config)
    with torch.no_grad():
        single, eager = ours(x.float(), t, labels), theirs(x.float(), t, labels).sample
    theirs.double()
    ours = share(theirs, SMALL | OPTIONS[option])
    x.requires_grad_()
    results = []
    for y in (ours(x, t, labels), in_float64(theirs, x, t, labels)):
        gradient = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        results.append([y, *torch.autograd.grad(y, [x, *theirs.parameters()], gradient)])
    names = ["output", "x", *dict(theirs.named_parameters())]
    for name, actual, expected in zip(names, *results, strict=True):
        if float(expected.detach().abs().max()) < 1e-13:  # zero but for rounding, as a key's bias
            assert float(actual.abs().max()) < 1e-13, name
        else:
            assert errors(actual, expected)[1] < 1e-12, name
    assert_close(single, results[1][0], eager=eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    theirs, ours = pair(SMALL)
    theirs.to(dtype)
    x, t, _ = inputs(ours.config)
    x = x.to(dtype)
    actual, eager = share(theirs, SMALL)(x, t), theirs(x, t).sample
    assert actual.dtype == dtype
    assert_close(actual, theirs.double()(x.double(), t).sample, eager=eager)


@torch.no_grad()
def test_autocast() -> None:
    theirs, ours = pair(SMALL)
    x, t, _ = inputs(ours.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, eager = ours(x.float(), t), theirs(x.float(), t).sample
    assert_close(actual, theirs.double()(x, t).sample, eager=eager)


@torch.no_grad()
def test_memory_format_and_odd_inputs() -> None:
    theirs, ours = pair(SMALL)
    theirs.double()
    ours = share(theirs, SMALL)
    x, t, _ = inputs(ours.config)
    expected = ours(x, t)
    strided = torch.randn(3, 3, 8, 16, dtype=torch.float64)[..., ::2].copy_(x)
    assert_close(ours(strided, t), expected)
    assert_close(ours(x[:, :, :6, :2], t), theirs(x[:, :, :6, :2], t).sample)
    assert ours(x[:0], t[:0]).shape == (0, 3, 8, 8)
    for same in (999, 999.0, torch.tensor(999), torch.full((3,), 999, dtype=torch.int32)):
        assert torch.equal(ours(x, same), ours(x, torch.full((3,), 999)))
    assert_close(ours(x, 0.5), theirs(x, torch.full((3,), 0.5)).sample)
    ours.to(memory_format=torch.channels_last)
    y = ours(x.contiguous(memory_format=torch.channels_last), t)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected)


def test_dropout_is_where_diffusers_has_it() -> None:
    # No attention: after it, diffusers' memory format changes, and with it where the random mask falls.
    plain = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    fields = SMALL | plain | {"dropout": 0.5, "add_attention": False}
    theirs = pair(fields)[0].double()
    ours = share(theirs, fields)
    x, t, _ = inputs(ours.config)
    outputs = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(3)
        y = model(x, t)
        outputs.append(y if isinstance(y, Tensor) else y.sample)
    assert_close(outputs[1].detach(), outputs[0].detach())
    assert errors(ours.eval()(x, t), outputs[0])[0] > 0.1


def test_backends(backend: str, device: torch.device) -> None:
    fields = SMALL | {"resnet_time_scale_shift": "default", "attn_norm_num_groups": 3}
    _, ours = pair(fields)
    ours.to(device)
    exact = copy.deepcopy(ours).double()
    exact.backend = "reference"
    x, t, _ = inputs(ours.config, batch=2)
    x, t = x.to(device), t.to(device)

    def run(unet: UNet, name: str) -> list[Tensor]:
        unet.backend = name
        images = x.to(unet.dtype).requires_grad_()
        y = unet(images, t)
        return [y, *torch.autograd.grad(y.square().sum(), [images, unet.conv_in.weight])]

    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = run(exact, "reference")
        eager = run(ours, "eager")
        actual = run(ours, backend)
    for name, *tensors in zip(("output", "x", "conv_in"), actual, expected, eager, strict=True):
        assert_close(tensors[0], tensors[1], eager=tensors[2], name=name)


def test_backend_reaches_every_layer() -> None:
    unet = UNet(**SMALL)
    unet.backend = "reference"
    named = [m for m in unet.modules() if hasattr(m, "backend")]
    layers = [m for m in unet.modules() if isinstance(m, nn.Conv2d)]
    convolutions = sum(m.kernel_size == (3, 3) and m.stride == (1, 1) for m in layers)
    assert len(named) == 1 + 8 + 4 + convolutions  # the U-Net, residual blocks, attentions
    assert all(m.backend == "reference" for m in named)
    with pytest.raises(ValueError, match="backend is 'cudnn', must be 'auto' or one of"):
        unet.backend = "cudnn"


def test_compiles_to_one_graph() -> None:
    _, ours = pair(SMALL | OPTIONS["classes"] | OPTIONS["scale_shift"])
    x, t, labels = inputs(ours.config)
    x = x.float()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")  # a training step has aot_eager
    expected = torch.autograd.grad(ours(x, t, labels).square().sum(), ours.conv_in.weight)[0]
    actual = torch.autograd.grad(compiled(x, t, labels).square().sum(), ours.conv_in.weight)[0]
    assert_close(compiled(x, t, labels), ours(x, t, labels))
    assert_close(actual, expected)


@torch.no_grad()
def test_diffusers_loads_what_is_saved(tmp_path: Path) -> None:
    fields = SMALL | {"num_class_embeds": 5}
    ours = share(pair(fields)[0], fields | {"null_class": 4})
    ours.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "new" / "unet")
    x, t, labels = inputs(ours.config)
    theirs, info = UNet2DModel.from_pretrained(tmp_path / "new" / "unet", output_loading_info=True)
    assert not any(info.values())
    assert_close(theirs.double()(x, t, labels).sample, copy.deepcopy(ours).double()(x, t, labels))
    again = UNet.from_pretrained(tmp_path / "new" / "unet")
    assert again.config == ours.config
    assert again.config.null_class == 4
    assert not again.training
    for name, parameter in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name
    assert sorted(p.name for p in (tmp_path / "new" / "unet").iterdir()) == ["config.json", WEIGHTS_FILE]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@torch.no_grad()
def test_loads_what_diffusers_saved(tmp_path: Path, safe: bool) -> None:
    theirs, ours = pair(SMALL | OPTIONS["scale_shift"])
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    x, t, _ = inputs(ours.config)
    loaded = UNet.from_pretrained(tmp_path)
    assert torch.equal(loaded(x.float(), t), ours(x.float(), t))
    assert all(p.requires_grad for p in loaded.parameters())
    assert UNet.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match=r"dtype is torch.int8, must be a floating-point type"):
        UNet.from_pretrained(tmp_path, dtype=torch.int8)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_old_names_of_attention(tmp_path: Path, suffix: str) -> None:
    _, ours = pair(SMALL)
    ours.half().save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items():
        head, dot, kind = name.rpartition(".")
        for new, former in old.items():
            head = head.removesuffix(new) + former if head.endswith("." + new) else head
        state[head + dot + kind] = tensor
    assert sum(".proj_attn." in name for name in state) == 2 * 4
    (tmp_path / WEIGHTS_FILE).unlink()
    if suffix == ".bin":
        torch.save(state, tmp_path / OLD_WEIGHTS_FILE)
    else:
        save_file(state, tmp_path / WEIGHTS_FILE)
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    for name, parameter in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name


BAD_INPUT = {
    "x has shape (3, 8, 8), must have shape [N, 3, H, W]": {"x": torch.zeros(3, 8, 8)},
    "x has shape (2, 4, 8, 8), must have shape [N, 3, H, W]": {"x": torch.zeros(2, 4, 8, 8)},
    "x is 8x7 pixels, both must be positive multiples of 2": {"x": torch.zeros(2, 3, 8, 7)},
    "x is 0x8 pixels, both must be positive multiples of 2": {"x": torch.zeros(2, 3, 0, 8)},
    "x has dtype torch.float64, must have": {"x": torch.zeros(2, 3, 8, 8, dtype=torch.float64)},
    "x is on meta, must be": {"x": torch.zeros(2, 3, 8, 8, device="meta")},
    "t has shape (3,), must be one number or have (2,)": {"t": torch.zeros(3)},
    "t has shape (2, 1), must be one number or have (2,)": {"t": torch.zeros(2, 1)},
    "class_labels are missing": {"class_labels": None},
    "class_labels have shape (2, 1), must have (2,)": {"class_labels": torch.zeros(2, 1, dtype=torch.int64)},
    "class_labels have dtype torch.float32, must have": {"class_labels": torch.zeros(2)},
    "class_labels go from 0 to 5, must be in 0..4": {"class_labels": torch.tensor([0, 5])},
    "class_labels go from -1 to 2, must be in 0..4": {"class_labels": torch.tensor([-1, 2])},
    "class_labels are on meta, must be": {"class_labels": torch.zeros(2, dtype=torch.int64, device="meta")},
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input(message: str) -> None:
    unet = UNet(**SMALL, num_class_embeds=5)
    good = {"x": torch.zeros(2, 3, 8, 8), "t": 5, "class_labels": torch.tensor([0, 4])}
    assert unet(**good).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError) as raised:
        unet(**good | BAD_INPUT[message])
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_labels_that_are_not_wanted() -> None:
    with pytest.raises(ValueError, match="class_labels are given, but this U-Net has no classes"):
        UNet(**SMALL)(torch.zeros(1, 3, 8, 8), 0, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("option", ["classes", "scale_shift"])
@torch.no_grad()
def test_to_and_from_diffusers(option: str) -> None:
    theirs, ours = pair(SMALL | OPTIONS[option])
    converted = ours.to_diffusers()
    back = UNet.from_diffusers(converted)
    assert back.config == ours.config
    assert type(converted) is type(theirs)
    for name, parameter in ours.state_dict().items():
        for copied in (back.state_dict()[name], converted.state_dict()[name]):
            assert torch.equal(copied, parameter)
            assert copied.data_ptr() != parameter.data_ptr()
    x, t, labels = inputs(ours.config)
    expected = theirs(x.float(), t, labels).sample
    torch.testing.assert_close(back(x.float(), t, labels), expected, rtol=1e-4, atol=1e-4)


def test_from_diffusers_names_what_it_does_not_know() -> None:
    model = UNet2DModel(**SMALL)
    model.register_to_config(act_fn="tanh")
    with pytest.raises(ValueError, match="act_fn is 'tanh'"):
        UNet.from_diffusers(model)
