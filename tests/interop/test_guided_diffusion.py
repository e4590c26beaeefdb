"""guided-diffusion's and improved-diffusion's networks in ours, against a restatement of them in float64."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastddpm.interop.guided_diffusion import load_classifier, load_sampler, load_unet, shapes
from fastddpm.interop.guided_diffusion.flags import FLAGS, model_flags, unet_config
from fastddpm.networks.frozen import freeze
from fastddpm.networks.unet.model import UNet

# By name: the library, its flags, and the same for the restatement.
SMALL = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2,2",
    "attention_resolutions": "8,4",
}
RESTATED: dict[str, Any] = {"channels": 32, "layers": 1, "mult": (1, 2, 2), "reductions": (2, 4)}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "defaults": ("guided_diffusion", SMALL, RESTATED),
    "published": (
        "guided_diffusion",
        SMALL | {
            "num_res_blocks": "2", "num_head_channels": "16", "resblock_updown": "True",
            "use_new_attention_order": "yes", "class_cond": "True", "learn_sigma": "1", "dropout": "0.1",
            "use_fp16": "True", "use_checkpoint": True,
        },
        RESTATED | {"layers": 2, "head_channels": 16, "updown": True, "new_order": True, "out": 6},
    ),
    "legacy_order": (
        "guided_diffusion",
        SMALL | {"resblock_updown": True, "num_heads": 8, "attention_resolutions": (4, 16)},
        RESTATED | {"updown": True, "heads": 8, "reductions": (4, 1)},
    ),
    "without_film": (
        "guided_diffusion",
        SMALL
        | {"use_scale_shift_norm": False, "num_heads": 2, "num_heads_upsample": 8, "attention_resolutions": "16,5"},
        RESTATED | {"film": False, "heads": 2, "heads_upsample": 8, "reductions": (1, 3)},
    ),
    "new_order_by_heads": (
        "guided_diffusion",
        SMALL | {"use_new_attention_order": True, "resblock_updown": True, "use_scale_shift_norm": False},
        RESTATED | {"new_order": True, "updown": True, "film": False},
    ),
    "without_convolutions": (
        "guided_diffusion",
        SMALL | {"conv_resample": False, "class_cond": True},
        RESTATED | {"conv_resample": False},
    ),
    "one_level": (
        "guided_diffusion",
        SMALL | {"channel_mult": "2", "attention_resolutions": "16", "num_heads": 1},
        RESTATED | {"mult": (2,), "heads": 1, "reductions": (1,)},
    ),
    "512_pixels": (
        "guided_diffusion",
        {"image_size": 512, "num_channels": 64, "num_res_blocks": 1, "attention_resolutions": "32,16"}
        | {"num_head_channels": 32},
        {"channels": 64, "layers": 1, "mult": (0.5, 1, 1, 2, 2, 4, 4), "reductions": (16, 32), "head_channels": 32},
    ),
    "improved": (
        "improved_diffusion",
        {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "rescale_timesteps": False, "num_heads": 2},
        RESTATED | {"mult": (1, 2, 2, 2), "reductions": (2, 4), "heads": 2},
    ),
}  # fmt: skip


def checkpoint(openai: ModuleType, name: str) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None, Tensor]:
    """A network's weights, inputs, and what it makes of them."""
    _, flags, restated = CASES[name]
    w, size = openai.Weights(), 64 if name == "512_pixels" else 16
    x, t = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([999, 3])
    y = torch.tensor([5, 999]) if str(flags.get("class_cond")) == "True" else None
    return w, x, t, y, openai.unet_model(w, x, t, y, **restated)


@pytest.mark.parametrize("name", CASES)
def test_networks_are_equal(openai: ModuleType, name: str, tmp_path: Path) -> None:
    """The U-Net, its frozen form, and what is saved and loaded again; and that it trains."""
    library, flags, _ = CASES[name]
    w, x, t, y, expected = checkpoint(openai, name)
    unet = load_unet(w, library=library, **flags)
    assert not unet.training
    assert unet.config.dropout == float(flags.get("dropout", 0))
    limit = 1e-12 * float(expected.abs().max())
    actual = unet(x, t, y)
    assert float((actual.detach() - expected).abs().max()) < limit
    assert float((run_frozen(unet, x[:1], t[:1], y) - expected[:1]).abs().max()) < 1e2 * limit
    if name not in ("published", "without_film", "without_convolutions"):
        return
    actual.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in used(unet))
    unet.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert again.config == unet.config
    assert torch.equal(again(x, t, y), actual)


@pytest.mark.parametrize(
    ("more", "restated"),
    [
        ({"class_cond": True}, {}),
        ({"resblock_updown": True, "use_scale_shift_norm": False}, {"updown": True, "film": False}),
        ({"conv_resample": False, "use_new_attention_order": True}, {"conv_resample": False, "new_order": True}),
    ],
)
@torch.no_grad()
def test_sequences(openai: ModuleType, more: dict[str, Any], restated: dict[str, Any]) -> None:
    """`dims=1` and another number of channels, as `UNetModel(dims=1, in_channels=2)` and as a sampler."""
    flags = {**SMALL, **more, "dims": 1, "in_channels": 2, "image_size": 16}
    own = {**RESTATED, **restated, "out": 2, "heads": 2}
    flags["num_heads"] = 2
    w, x, t = openai.Weights(), torch.randn(2, 2, 16, dtype=torch.float64), torch.tensor([999, 3])
    y = torch.tensor([5, 999]) if "class_cond" in more else None
    expected = openai.unet_model(w, x, t, y, **own)
    unet = load_unet(w, **flags)
    assert float((unet(x, t, y) - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert shapes(**flags) == {name: tuple(tensor.shape) for name, tensor in w.items()}
    sampler = load_sampler(w, "4", **flags)
    images = sampler.sample(3, seed=0, class_labels=None if y is None else 7)
    assert images.shape == (3, 2, 16)
    assert bool(images.isfinite().all())
    with pytest.raises(ValueError, match=r"x has shape \(1, 2, 15\), must have shape \[N, 2, L\], L a positive"):
        unet(x[:1, :, :15], t[:1], None if y is None else y[:1])


def used(unet: UNet) -> list[Tensor]:
    """Parameters whose gradient is not zero by nature: what a norm or a softmax takes away has none."""
    return [p for name, p in unet.named_parameters() if not name.endswith(("to_k.bias", "conv1.bias"))]


@torch.no_grad()
def run_frozen(unet: UNet, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    frozen = freeze(unet, t)
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    return frozen.bind(inputs, labels=None if y is None else y[:1])(torch.tensor([0]))


@pytest.mark.parametrize("name", ["published", "without_film"])
@torch.no_grad()
def test_diffusers_is_given_what_it_can_be(openai: ModuleType, name: str) -> None:
    library, flags, _ = CASES[name]
    w, x, t, y, expected = checkpoint(openai, name)
    unet = load_unet(w, library=library, **flags)
    if name == "published":
        theirs = unet.to_diffusers()(x, t, y).sample
        assert float((theirs - expected).abs().max()) < 1e-11 * float(expected.abs().max())
    else:  # so many heads, whose channels differ from level to level
        assert unet.config.attention_head_dim == (16, 64, 64, 32, 64, 64, 4)
        with pytest.raises(ValueError, match=r"attention_head_dim is \(16, .*, which diffusers' UNet2DModel does not"):
            unet.to_diffusers()


@torch.no_grad()
def test_timesteps_are_rescaled(openai: ModuleType) -> None:
    """improved-diffusion tells its networks timesteps of 0 to 1000, however many there are."""
    w, x, _, _, _ = checkpoint(openai, "improved")
    library, flags, restated = CASES["improved"]
    flags = flags | {"diffusion_steps": "4000", "rescale_timesteps": "True"}
    unet, t = load_unet(w, library=library, **flags), torch.tensor([3999, 6])
    expected = openai.unet_model(w, x, t.float() * (1000.0 / 4000), **restated)
    assert float((unet(x, t) - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert float((run_frozen(unet, x[:1], t[:1], None) - expected[:1]).abs().max()) < 1e-10
    assert unet.config.not_in_diffusers == ["timestep_scale"]
    assert unet.config.to_dict()["timestep_scale"] == 0.25


PUBLISHED = {
    # As in guided-diffusion's README; parameters in millions as in the paper.
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
    "--learn_sigma True --noise_schedule cosine "
    "--num_channels 192 --num_head_channels 64 --num_res_blocks 3 --resblock_updown True "
    "--use_new_attention_order True --use_fp16 True --use_scale_shift_norm True": 296,
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 --learn_sigma True "
    "--noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 --resblock_updown True --use_fp16 "
    "True --use_scale_shift_norm True": 422,
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 256 --learn_sigma True "
    "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
    "--use_fp16 True --use_scale_shift_norm True": 554,
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 512 --learn_sigma True "
    "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
    "--use_fp16 False --use_scale_shift_norm True": 559,
}
MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


@pytest.mark.parametrize("line", PUBLISHED, ids=lambda line: re.search(r"image_size (\d+)", line)[1])
def test_published_flags(openai: ModuleType, line: str) -> None:
    """Every name and shape, without values."""
    flags = dict(part.split(" ") for part in line.removeprefix("--").split(" --"))
    size = int(flags["image_size"])
    w = openai.Weights("meta", torch.float32)
    x = torch.empty(1, 3, size, size, device="meta")
    reductions = [size // int(text) for text in flags["attention_resolutions"].split(",")]
    label = torch.empty(1, dtype=torch.int64, device="meta")
    openai.unet_model(
        w, x, label, label, channels=int(flags["num_channels"]), mult=MULT[size], layers=int(flags["num_res_blocks"]),
        reductions=reductions, updown=True, out=6, head_channels=int(flags.get("num_head_channels", -1)),
    )  # fmt: skip
    unet = load_unet(w, device="meta", **flags)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == PUBLISHED[line]
    assert unet.config.sample_size == size


@pytest.mark.parametrize(
    ("library", "size", "expected"),
    [("improved_diffusion", 32, (1, 2, 2, 2)), ("improved_diffusion", 64, (1, 2, 3, 4)),
     ("improved_diffusion", 256, (1, 1, 2, 2, 4, 4)), ("guided_diffusion", 128, (1, 1, 2, 3, 4))],
)  # fmt: skip
def test_widths_of_an_image_size(library: str, size: int, expected: tuple[int, ...]) -> None:
    config = unet_config(model_flags(library, {"image_size": size}))
    assert config.block_out_channels == tuple(128 * multiple for multiple in expected)


def test_flags_and_defaults() -> None:
    """Those of `model_and_diffusion_defaults()`, and an argument of `UNetModel`."""
    both = {
        "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
        "attention_resolutions": "16,8", "dropout": 0.0, "class_cond": False, "use_checkpoint": False,
        "use_scale_shift_norm": True, "learn_sigma": False, "diffusion_steps": 1000, "noise_schedule": "linear",
        "timestep_respacing": "", "use_kl": False, "predict_xstart": False, "conv_resample": True, "in_channels": 3,
        "dims": 2,
    }  # fmt: skip
    guided = {
        "num_head_channels": -1, "channel_mult": "", "resblock_updown": False, "use_fp16": False,
        "use_new_attention_order": False, "rescale_timesteps": False, "rescale_learned_sigmas": False,
    }  # fmt: skip
    improved = {"sigma_small": False, "rescale_timesteps": True, "rescale_learned_sigmas": True}
    defaults = {"guided_diffusion": both | guided, "improved_diffusion": both | improved}
    assert defaults == FLAGS


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files(openai: ModuleType, tmp_path: Path, suffix: str) -> None:
    w, x, t, y, _ = checkpoint(openai, "published")
    path = tmp_path / f"model{suffix}"
    save_file(dict(w), path) if suffix == ".safetensors" else torch.save(dict(w), path)
    flags = CASES["published"][1]
    assert torch.equal(load_unet(path, **flags)(x, t, y), load_unet(w, **flags)(x, t, y))
    assert load_unet(path, dtype=torch.float16, **flags).dtype == torch.float16
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_unet(tmp_path / "nowhere.pt", **flags)


def test_the_state_dict_stays_the_callers(openai: ModuleType) -> None:
    w, _, _, _, _ = checkpoint(openai, "defaults")
    unet, before = load_unet(w, **CASES["defaults"][1]), {name: tensor.clone() for name, tensor in w.items()}
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    assert all(torch.equal(w[name], tensor) for name, tensor in before.items())


# By flags that differ from those of the weights ("published" of CASES): what the message says.
WRONG_FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "num_channels": ({"num_channels": 64}, "weights are those of num_channels=32 (not 64); of another shape: "),
    "learn_sigma": ({"learn_sigma": False}, "learn_sigma=True (not False); of another shape: out.2.bias [6] in "),
    "class_cond": ({"class_cond": False}, "class_cond=True (not False); unexpected: label_emb.weight"),
    "film": ({"use_scale_shift_norm": False}, "use_scale_shift_norm=True (not False); of another shape: "),
    "num_res_blocks": ({"num_res_blocks": 3}, "those of num_res_blocks=2 (not 3); missing: "),
    "resblock_updown": (
        {"resblock_updown": False},
        "resblock_updown=True (not False); missing: input_blocks.3.0.op.bias, input_blocks.3.0.op.weight",
    ),
    "channel_mult": ({"channel_mult": "1,2"}, "those of channel_mult='1,2,2' (not '1,2'); unexpected: "),
    "attention": ({"attention_resolutions": "8"}, "attention_resolutions='8,4' (not '8'); missing: "),
    "two": ({"num_channels": 64, "learn_sigma": False}, "num_channels=32 (not 64), learn_sigma=True (not False); of"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_wrong_flags_are_named(openai: ModuleType, name: str) -> None:
    w, *_ = checkpoint(openai, "published")
    changed, message = WRONG_FLAGS[name]
    with pytest.raises(ValueError) as raised:
        load_unet(w, **CASES["published"][1] | changed)
    assert message in str(raised.value)
    assert str(raised.value).startswith("state dict does not fit its flags; the weights are those of ")
    assert "\n" not in str(raised.value)


BAD_FLAGS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "num_chanels, atention are no flags of guided_diffusion, which has image_size, ": (
        TypeError, {"num_chanels": 3, "atention": 1}),
    "sigma_small is no flag of guided_diffusion, which has": (TypeError, {"sigma_small": True}),
    "image_size is 96, must be one of 512, 256, 128, 64 where channel_mult is not given": (
        ValueError, {"image_size": 96}),
    "image_size is 128, must be one of 256, 64, 32": (ValueError, {"library": "improved_diffusion", "image_size": 128}),
    "image_size is '6 4', must be a positive integer": (ValueError, {"image_size": "6 4"}),
    "num_res_blocks is 0, must be a positive integer": (ValueError, {"num_res_blocks": 0}),
    "num_head_channels is -2, must be a positive integer or -1": (ValueError, {"num_head_channels": -2}),
    "learn_sigma is 'maybe', must be True or False": (ValueError, {"learn_sigma": "maybe"}),
    "dropout is 'x', must be a number from 0": (ValueError, {"dropout": "x"}),
    "attention_resolutions is '8;4', must be positive integers with commas": (
        ValueError, {"attention_resolutions": "8;4"}),
    "attention_resolutions is '0', must be positive": (ValueError, {"attention_resolutions": "0"}),
    "num_channels is 24, must make the widths of all levels multiples of 32": (ValueError, {"num_channels": 24}),
    "num_heads is 5, must divide the width of every level with attention": (ValueError, {"num_heads": 5}),
    "num_heads_upsample is 7, must divide": (ValueError, {"num_heads_upsample": 7}),
    "num_head_channels is 48, must divide": (ValueError, {"num_head_channels": 48, "num_channels": 64}),
    "dims is 3, must be 1, for sequences, or 2": (ValueError, {"dims": 3}),
    "library is 'openai', must be one of guided_diffusion, improved_diffusion": (ValueError, {"library": "openai"}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_FLAGS)
def test_bad_flags(message: str) -> None:
    kind, flags = BAD_FLAGS[message]
    with pytest.raises(kind) as raised:
        load_unet({}, **flags)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    if "sigma_small" in message:
        assert str(raised.value).endswith("; library='improved_diffusion' has them")


@pytest.mark.parametrize("given", [{"a": 1}, {"model": {"a": torch.zeros(1)}}], ids=["numbers", "nested"])
def test_what_is_no_state_dict(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"state dict has '(a|model)' of type (int|dict), must have tensors alone"):
        load_unet(given)


CLASSIFIER = {"image_size": 64, "classifier_width": "64", "classifier_depth": 1}
ENCODER: dict[str, Any] = {"channels": 64, "mult": (1, 2, 3, 4), "layers": 1, "reductions": (2, 4, 8)}


@pytest.mark.parametrize(
    ("pool", "flags", "restated"),
    [
        ("attention", {}, {}),
        (
            "adaptive",
            {"classifier_resblock_updown": "False", "classifier_use_fp16": True},
            {"updown": False, "classes": 7},
        ),
        ("spatial", {"classifier_use_scale_shift_norm": "False"}, {"film": False}),
        ("spatial_v2", {"classifier_attention_resolutions": "16"}, {"reductions": (4,)}),
    ],
)
def test_classifiers_are_equal(openai: ModuleType, pool: str, flags: dict[str, Any], restated: dict[str, Any]) -> None:
    w = openai.Weights()
    count, size = (1, 64) if pool == "attention" else (2, 16)  # its positions are learned
    x, t = torch.randn(count, 3, size, size, dtype=torch.float64), torch.tensor([999, 3])[:count]
    x.requires_grad_()
    expected = openai.encoder_model(w, x, t, pool=pool, **ENCODER | restated)
    classifier = load_classifier(w, classifier_pool=pool, **CLASSIFIER | flags)
    logits = expected.detach()
    assert float((classifier(x, t).detach() - logits).abs().max()) < 1e-12 * float(logits.abs().max())
    labels = torch.tensor([6, 0])[:count]
    gradient = torch.autograd.grad(torch.log_softmax(expected, 1)[range(count), labels].sum(), x)[0]
    actual = classifier.gradient(x.detach(), t, labels)
    assert float((actual - gradient).abs().max()) < 1e-11 * float(gradient.abs().max())
    assert not any(p.requires_grad for p in classifier.parameters())


def test_wrong_classifiers_are_named(openai: ModuleType) -> None:
    w = openai.Weights()
    openai.encoder_model(
        w, torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.tensor([1]), pool="adaptive", **ENCODER
    )
    with pytest.raises(ValueError, match=r"state dict does not fit its flags; missing: .*out\.2\.c_proj"):
        load_classifier(w, **CLASSIFIER)
    with pytest.raises(ValueError, match="classifier_pool is 'mean', must be one of attention, adaptive, spatial, "):
        load_classifier(w, classifier_pool="mean")
    with pytest.raises(ValueError, match="classifier_width is 24, must make the widths"):
        load_classifier(w, classifier_width=24)
    with pytest.raises(TypeError, match="num_channels is no flag of a classifier of guided_diffusion, which has"):
        load_classifier(w, num_channels=24)
    classifier = load_classifier(w, classifier_pool="adaptive", **CLASSIFIER)
    with pytest.raises(ValueError, match="class_labels are missing, but a classifier guides to classes"):
        classifier.gradient(torch.randn(1, 3, 16, 16), torch.tensor([1]), None)


def test_shapes_are_those_of_a_checkpoint(openai: ModuleType) -> None:
    w, *_ = checkpoint(openai, "published")
    assert shapes(**CASES["published"][1]) == {name: tuple(tensor.shape) for name, tensor in w.items()}
