"""The compact U-Net: what diffusers' UNet2DModel computes, with its parameter names, on fused norms.

A folder written by `UNet.save_pretrained` is one that `diffusers.UNet2DModel.from_pretrained` loads, and the
other way round. Every option of the public google/ddpm-* models is here, and class embeddings and FiLM
(`scale_shift`); `unet_config.py` says no, by name, to the rest.
"""

from __future__ import annotations

import re
from functools import partial, reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fastddpm_kernels.backend import BACKENDS
from safetensors.torch import save_file
from torch import Tensor, nn

from fastddpm.common.checks import listed
from fastddpm.common.files import atomic_write, read_json, read_weights, write_json
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.layers import (
    Attention,
    Conv3x3,
    DownBlock,
    Downsample,
    EmbeddingMLP,
    MidBlock,
    ResnetBlock,
    UpBlock,
    Upsample,
    norm_silu,
    timestep_embedding,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
OLD_WEIGHTS_FILE = "diffusion_pytorch_model.bin"

# What old versions of diffusers called the attention's linear layers.
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class UNet(nn.Module):
    """The noise-predicting U-Net of Ho et al. 2020, as diffusers' UNet2DModel has it.

    Args:
        config: a `UNetConfig`; its defaults if None.
        **fields: fields of `UNetConfig` that replace those of `config`.

    Raises:
        ValueError: an unknown field, or a value that is not supported; the message names it.
    """

    def __init__(self, config: UNetConfig | None = None, **fields: Any) -> None:
        super().__init__()
        self.config = c = (config or UNetConfig()).replace(**fields)
        self._backend = "auto"
        widths = c.block_out_channels
        emb = c.embedding_channels
        resnet = partial(
            ResnetBlock,
            emb_channels=emb,
            groups=c.norm_num_groups,
            eps=c.norm_eps,
            dropout=c.dropout,
            scale_shift=c.resnet_time_scale_shift == "scale_shift",
        )
        groups, scale = c.norm_num_groups, c.mid_block_scale_factor
        attention = partial(Attention, groups=groups, eps=c.norm_eps)

        self.conv_in = Conv3x3(c.in_channels, widths[0])
        self.time_embedding = EmbeddingMLP(c.sinusoid_channels, emb)
        self.class_embedding: nn.Module | None = None
        if c.class_embed_type == "timestep":
            self.class_embedding = EmbeddingMLP(c.sinusoid_channels, emb)
        elif c.class_embed_type is None and c.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(c.num_class_embeds, emb)

        levels, layers = len(widths), c.layers_per_block
        self.down_blocks = nn.ModuleList()
        skip_widths = [widths[0]]
        for i, (out, kind) in enumerate(zip(widths, c.down_block_types, strict=True)):
            ins = [widths[max(i - 1, 0)]] + [out] * (layers - 1)
            last, head_dim = i == levels - 1, c.head_dims[i]
            downsampler: ResnetBlock | Downsample | None = None
            if not last and _by_resnet(kind, c.downsample_type):
                downsampler = resnet(out, out, resample="down")
            elif not last:
                downsampler = Downsample(out, None if c.downsample_type == "pool" else c.downsample_padding)
            self.down_blocks.append(
                DownBlock(
                    [resnet(n, out) for n in ins],
                    [attention(out, head_dim=head_dim) for _ in ins if kind == "AttnDownBlock2D"],
                    downsampler,
                )
            )
            skip_widths += [out] * (layers if last else layers + 1)

        self.mid_block: MidBlock | None = None
        if c.mid_block_type is not None:
            resnets = [resnet(widths[-1], widths[-1], output_scale=scale) for _ in range(2)]
            middle = partial(attention, head_dim=c.head_dims[levels], groups=c.mid_attention_groups, output_scale=scale)
            self.mid_block = MidBlock(resnets, [middle(widths[-1])] if c.add_attention else [])

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, (out, kind) in enumerate(zip(reversed(widths), c.up_block_types, strict=True)):
            ins = [n + skip_widths.pop() for n in [below] + [out] * layers]
            last, head_dim = i == levels - 1, c.head_dims[levels + 1 + i]
            upsampler: ResnetBlock | Upsample | None = None
            if not last and _by_resnet(kind, c.upsample_type):
                upsampler = resnet(out, out, resample="up")
            elif not last:
                upsampler = Upsample(out, convolve=c.upsample_type != "nearest")
            self.up_blocks.append(
                UpBlock(
                    [resnet(n, out) for n in ins],
                    [attention(out, head_dim=head_dim) for _ in ins if kind == "AttnUpBlock2D"],
                    upsampler,
                )
            )
            below = out

        self.conv_norm_out = nn.GroupNorm(groups, widths[0], c.norm_eps)
        self.conv_out = Conv3x3(widths[0], c.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.conv_in.weight.device

    @property
    def backend(self) -> str:
        """Which backend the layers use: "auto", "triton", "native", "eager" or "reference". Set it for all."""
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, must be 'auto' or one of {', '.join(BACKENDS)}")
        self._backend = backend
        for module in self.modules():
            if isinstance(module, ResnetBlock | Attention | Conv3x3):
                module.backend = backend

    def forward(self, x: Tensor, t: float | Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network's prediction of what it was trained for (the noise, say): [N, out_channels, H, W].

        Args:
            x: noisy pixels [N, in_channels, H, W], about [-1, 1] where clean, in the U-Net's dtype and any
                memory format; H and W divisible by 2 ** (levels - 1).
            t: the timestep, from 0 (almost clean) to num_train_timesteps - 1 (noise), one for all or a tensor
                [N]. Its range is not checked.
            class_labels: int64 [N], where the U-Net has classes (see `embed`).

        Raises:
            ValueError: a wrong shape, dtype, device or label; or labels missing or not wanted.
        """
        self._check_input(x)
        return self.predict(x, self.embed(t, class_labels, batch_size=x.shape[0]))

    def embed(self, t: float | Tensor, class_labels: Tensor | None = None, *, batch_size: int) -> Tensor:
        """SiLU of the time and class embedding, as every block takes it: [N, embedding channels].

        Args:
            t: the timestep, one for all or a tensor [N].
            class_labels: int64 [N] from 0 to num_class_embeds - 1; with `class_embed_type` "timestep" real or
                integer [N], with "identity" real [N, embedding channels]. The range is checked on the CPU
                only.
            batch_size: N.

        Raises:
            ValueError: a wrong shape, dtype or label; or labels missing or not wanted.
        """
        t = torch.as_tensor(t, device=self.device)
        if t.shape not in ((), (batch_size,)):
            raise ValueError(f"t has shape {tuple(t.shape)}, must be one number or have ({batch_size},)")
        self._check_labels(class_labels, batch_size)
        emb = self.time_embedding(sinusoids(self.config, t.expand(batch_size)).to(self.dtype))
        if class_labels is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = sinusoids(self.config, class_labels).to(self.dtype)
            if self.class_embedding is not None:
                class_labels = self.class_embedding(class_labels)
            emb = emb + class_labels.to(emb.dtype)
        return F.silu(emb)

    def predict(self, x: Tensor, emb: Tensor) -> Tensor:
        """`forward` after `embed`: from `x` and `emb` [N, embedding channels]. Checks nothing."""
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, emb)
            skips += block_skips
        if self.mid_block is not None:
            x = self.mid_block(x, emb)
        for block in self.up_blocks:
            x = block(x, emb, skips)
        return self.conv_out(norm_silu(self.conv_norm_out, x, self._backend))

    def _check_input(self, x: Tensor) -> None:
        channels, factor = self.config.in_channels, 2 ** (len(self.config.block_out_channels) - 1)
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, must have shape [N, {channels}, H, W]")
        height, width = x.shape[2:]
        if height % factor or width % factor or not height or not width:
            raise ValueError(f"x is {height}x{width} pixels, both must be positive multiples of {factor}")
        if x.device != self.device:
            raise ValueError(f"x is on {x.device}, must be where the U-Net is, on {self.device}")
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x has dtype {x.dtype}, must have the U-Net's, {self.dtype}")

    def _check_labels(self, labels: Tensor | None, batch_size: int) -> None:
        c = self.config
        if not c.has_classes:
            if labels is not None:
                raise ValueError("class_labels are given, but this U-Net has no classes")
            return
        if labels is None:
            raise ValueError("class_labels are missing, but this U-Net is class-conditional")
        shape = (batch_size, c.embedding_channels) if c.class_embed_type == "identity" else (batch_size,)
        if labels.shape != shape:
            raise ValueError(f"class_labels have shape {tuple(labels.shape)}, must have {shape}")
        if labels.device != self.device:
            raise ValueError(f"class_labels are on {labels.device}, must be with the U-Net, on {self.device}")
        if not isinstance(self.class_embedding, nn.Embedding):
            return
        if labels.dtype != torch.int64:
            raise ValueError(f"class_labels have dtype {labels.dtype}, must have torch.int64")
        # On a GPU the check would wait for the device; compiled, it would break the graph.
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            low, high, classes = int(labels.min()), int(labels.max()), self.class_embedding.num_embeddings
            if low < 0 or high >= classes:
                raise ValueError(f"class_labels go from {low} to {high}, must be in 0..{classes - 1}")

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes `folder`/config.json and the weights as safetensors, each whole or not at all.

        `diffusers.UNet2DModel.from_pretrained(folder)` loads them, unless the config has what diffusers cannot be
        (`UNetConfig.not_in_diffusers`).
        """
        folder = Path(folder)
        state = {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()}
        atomic_write(folder / WEIGHTS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"}))
        write_json(folder / CONFIG_FILE, self.config.to_dict())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        variant: str | None = None,
    ) -> UNet:
        """The U-Net that `save_pretrained`, or diffusers' UNet2DModel, saved in `folder`; in evaluation mode.

        Reads safetensors; where there are none, `diffusion_pytorch_model.bin`, and of it tensors only, never
        other objects.

        Args:
            folder: holds config.json and the weights.
            dtype: of the parameters; the file's own (the widest in it) if None.
            device: where to put them.
            variant: of the weights, as diffusers names files: "ema" for diffusion_pytorch_model.ema.safetensors.

        Raises:
            FileNotFoundError: no such folder, no config or no weights in it.
            ValueError: a file cannot be read or does not fit; the message names it, and the keys.
        """
        folder = Path(folder)
        config = UNetConfig.from_file(folder / CONFIG_FILE)
        path, state = _read_weights(folder, variant)
        _check_layers(folder / CONFIG_FILE, config, path, state)
        with torch.device("meta"):
            unet = cls(config)
        _check_state(path, state, unet.state_dict())
        if dtype is None:
            dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, must be a floating-point type")
        # A copy, since the tensors read may be a view of the file, which someone may overwrite.
        state = {name: tensor.to(device, dtype, copy=True) for name, tensor in state.items()}
        unet.load_state_dict(state, assign=True)
        return unet.eval()

    def load_weights(self, state: dict[str, Tensor], where: str) -> None:
        """Copy weights into the U-Net, which keeps its dtype and device.

        Raises:
            ValueError: they do not fit; the message begins with `where` and names them.
        """
        _check_state(where, state, self.state_dict())
        self.load_state_dict(state)

    @classmethod
    def from_diffusers(cls, model: nn.Module) -> UNet:
        """A copy of a `UNet2DModel` of diffusers, in evaluation mode, with its dtype and where it is.

        Raises:
            ValueError: its config has a setting that is not supported, or its weights do not fit it; the message
                names them.
        """
        with torch.device("meta"):
            unet = cls(UNetConfig.from_dict(dict(model.config)))  # type: ignore[arg-type, call-overload]
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        _check_state(type(model).__name__, state, unet.state_dict())
        unet.load_state_dict(state, assign=True)
        return unet.eval()

    def to_diffusers(self) -> Any:
        """A copy as a `UNet2DModel` of diffusers, in evaluation mode, with its dtype and where it is.

        Raises:
            ModuleNotFoundError: diffusers is not installed.
            ValueError: diffusers cannot be such a network; the message names the fields.
        """
        from diffusers import UNet2DModel

        if names := self.config.not_in_diffusers:
            values = " and ".join(f"{name} is {getattr(self.config, name)!r}" for name in names)
            raise ValueError(f"{values}, which diffusers' UNet2DModel does not have; fastddpm.UNet does")
        config = {name: value for name, value in self.config.to_dict().items() if not name.startswith("_")}
        with torch.device("meta"):
            model: Any = UNet2DModel(**config)
        model.load_state_dict({name: p.detach().clone() for name, p in self.state_dict().items()}, assign=True)
        return model.eval()


def sinusoids(config: UNetConfig, t: Tensor) -> Tensor:
    """What the layers of a U-Net's time embedding read: [N] timesteps -> float32 [N, config.sinusoid_channels]."""
    return timestep_embedding(
        t,
        config.sinusoid_channels,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
        scale=config.timestep_scale,
    )


def _by_resnet(kind: str, resample_type: str) -> bool:
    """Whether a block of that type changes the resolution by a residual block."""
    return kind.startswith("Resnet") or (kind.startswith("Attn") and resample_type == "resnet")


def weights_files(variant: str | None = None) -> tuple[str, str]:
    """What the files of weights are called, the one that is preferred first."""
    if variant is None:
        return WEIGHTS_FILE, OLD_WEIGHTS_FILE
    new, old = (f".{variant}.".join(name.rsplit(".", 1)) for name in (WEIGHTS_FILE, OLD_WEIGHTS_FILE))
    return new, old


def index_files(variant: str | None = None) -> tuple[str, str]:
    """Return the names of the files that list the shards of weights, in the same order."""
    infix = "" if variant is None else f".{variant}"
    return f"{WEIGHTS_FILE}.index{infix}.json", f"{OLD_WEIGHTS_FILE}.index{infix}.json"


def shards(index: Path) -> list[str]:
    """Return the names of the files that hold sharded weights.

    Raises:
        FileNotFoundError, ValueError: the index is missing or is none; the message names it.
    """
    places = read_json(index).get("weight_map")
    names = sorted(set(places.values()), key=str) if isinstance(places, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{index}: weight_map must name, for each tensor, a file beside it")
    return names


def _read_weights(folder: Path, variant: str | None) -> tuple[Path, dict[str, Tensor]]:
    """Return where the weights are, in one file or in shards that an index lists, and the tensors."""
    names = weights_files(variant)
    for name, index in zip(names, index_files(variant), strict=True):
        path = folder / name if (folder / name).is_file() else folder / index
        if path.is_file():
            parts = [path] if path.name == name else [folder / shard for shard in shards(path)]
            state: dict[str, Tensor] = {}
            for part in parts:
                if not part.is_file():
                    raise FileNotFoundError(f"{part} is missing, which {index} lists")
                state |= {_new_name(key): tensor for key, tensor in read_weights(part).items()}
            return path, state
    raise FileNotFoundError(f"{folder} has neither {' nor '.join(names)}, whole or in shards")


def _new_name(name: str) -> str:
    match = _OLD_ATTENTION.fullmatch(name)
    return f"{match[1]}.{_NEW_ATTENTION[match[2]]}.{match[3]}" if match else name


def _check_layers(config_path: Path, config: UNetConfig, path: Path, state: dict[str, Tensor]) -> None:
    """Hold the numbers of layers against the weights before any is built: thousands would take minutes."""
    blocks = {match[0] for name in state if (match := re.match(r"down_blocks\.\d+\.", name))}
    layers = {match[0] for name in state if (match := re.match(r"down_blocks\.0\.resnets\.\d+\.", name))}
    if config.layers_per_block != len(layers):
        raise ValueError(f"{config_path}: layers_per_block is {config.layers_per_block}, but {path} has {len(layers)}")
    if len(config.block_out_channels) != len(blocks):
        widths = len(config.block_out_channels)
        raise ValueError(f"{config_path}: block_out_channels has {widths} widths, but {path} has {len(blocks)} levels")


def _check_state(path: Path | str, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    shared = expected.keys() & state.keys()
    wrong = {
        "missing": expected.keys() - shared,
        "unexpected": state.keys() - shared,
        "of another shape": {name for name in shared if expected[name].shape != state[name].shape},
    }
    integers = {name: tensor.dtype for name, tensor in state.items() if not tensor.dtype.is_floating_point}
    if integers:
        name, dtype = next(iter(integers.items()))
        raise ValueError(f"{path}: {name} has dtype {dtype}, must be a floating-point type")
    problems = []
    for what, names in wrong.items():
        if names:
            problems.append(f"{what}: {listed(names)}")
    if problems:
        raise ValueError(f"{path} does not fit its {CONFIG_FILE}; {'; '.join(problems)}")
