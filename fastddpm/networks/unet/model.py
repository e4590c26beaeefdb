"""The compact U-Net: what diffusers' UNet2DModel computes, with its parameter names, on fused norms.

`diffusers.UNet2DModel.from_pretrained` loads a folder that `UNet.save_pretrained` wrote, and the reverse. Every option
with which UNet2DModel runs is here; `config.py` rejects the others by name.
"""

from __future__ import annotations

import math
import re
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from fastddpm_kernels.backend import BACKENDS
from torch import Tensor, nn

from fastddpm.common.checks import listed
from fastddpm.networks.unet import files
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.layers import (
    ACTIVATIONS,
    AdaResnetBlock,
    Attention,
    Block,
    Conv3x3,
    DownBlock,
    Downsample,
    EmbeddingMLP,
    FourierProjection,
    KDownBlock,
    KUpBlock,
    MidBlock,
    ResnetBlock,
    Sinusoids,
    SkipDownBlock,
    SkipUpBlock,
    UpBlock,
    Upsample,
    norm_silu,
)
from fastddpm.networks.unet.plan import BlockPlan, ResnetPlan, plan_down, plan_up

_SKIP_SCALE = math.sqrt(2)  # divides the sums in Skip blocks


def _embedding(count: int, width: int) -> nn.Embedding:
    """Return an embedding, initialised unless it is on `meta`, where torch would import its compiler for that."""
    weight = torch.empty(count, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding(count, width, _weight=weight)


class UNet(nn.Module):
    """The noise-predicting U-Net of Ho et al. 2020, as diffusers' UNet2DModel implements it.

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
        widths, emb, scale = c.block_out_channels, c.embedding_channels, c.mid_block_scale_factor

        self.conv_in = Conv3x3(c.in_channels, widths[0])
        self.time_proj: nn.Module
        if c.time_embedding_type == "fourier":
            self.time_proj = FourierProjection(widths[0])
        elif c.time_embedding_type == "learned":
            assert c.num_train_timesteps is not None
            self.time_proj = _embedding(c.num_train_timesteps, widths[0])
        else:
            self.time_proj = sinusoids(c)
        self.time_embedding = EmbeddingMLP(c.sinusoid_channels, emb)
        self.class_embedding: nn.Module | None = None
        if c.class_embed_type == "timestep":
            self.class_embedding = EmbeddingMLP(c.sinusoid_channels, emb)
        elif c.class_embed_type is None and c.num_class_embeds is not None:
            self.class_embedding = _embedding(c.num_class_embeds, emb)

        self.down_blocks = nn.ModuleList([_down_block(c, plan) for plan in plan_down(c)])
        self.mid_block: MidBlock | None = None
        if c.mid_block_type is not None:
            middle = ResnetPlan(widths[-1], widths[-1], c.mid_groups, c.mid_groups)
            attentions = []
            if c.add_attention:
                attentions.append(
                    Attention(
                        widths[-1],
                        head_dim=c.head_dims[len(widths)],
                        groups=c.mid_attention_groups,
                        eps=c.norm_eps,
                        output_scale=scale,
                    )
                )
            self.mid_block = MidBlock([_resnet(c, middle, output_scale=scale) for _ in range(2)], attentions)
        self.up_blocks = nn.ModuleList([_up_block(c, plan) for plan in plan_up(c)])

        self.conv_norm_out = nn.GroupNorm(c.out_groups, widths[0], c.norm_eps)
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
        """The backend of the layers: "auto", "triton", "native", "eager" or "reference". Setting it sets all layers."""
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, must be 'auto' or one of {', '.join(BACKENDS)}")
        self._backend = backend
        for module in self.modules():
            if isinstance(module, ResnetBlock | AdaResnetBlock | SkipUpBlock | Attention | Conv3x3):
                module.backend = backend

    def enable_gradient_checkpointing(self) -> None:
        """Recompute residual blocks in the backward pass instead of keeping results: less memory, more time."""
        self._checkpoint(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep the results of residual blocks for the backward pass, which is the default."""
        self._checkpoint(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the backward pass recomputes residual blocks."""
        return any(isinstance(module, Block) and module.gradient_checkpointing for module in self.modules())

    def _checkpoint(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, Block):
                module.gradient_checkpointing = value

    def fuse_qkv_projections(self) -> None:
        """Join the layers of queries, keys and values into one in every attention; this makes new parameters."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse()

    def unfuse_qkv_projections(self) -> None:
        """Split the layers that `fuse_qkv_projections` has joined."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse(False)

    def forward(self, x: Tensor, t: float | Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict what the network was trained for, such as the noise: [N, out_channels, H, W].

        Args:
            x: noisy pixels [N, in_channels, H, W], about [-1, 1] before noise, in the U-Net's dtype and any
                memory format; H and W divisible by 2 ** (levels - 1).
            t: the timestep, from 0 (almost clean) to num_train_timesteps - 1 (noise), one for all or a tensor
                [N]. Its range is not checked. With `time_embedding_type` "fourier" it is a noise level.
            class_labels: int64 [N], where the U-Net has classes (see `embed`).

        Raises:
            ValueError: a shape, dtype, device or label is wrong, or labels are missing or not expected.
        """
        self._check_input(x)
        t = torch.as_tensor(t, device=self.device)
        out = self.predict(x, self.embed(t, class_labels, batch_size=x.shape[0]))
        return out / t.reshape(-1, 1, 1, 1) if self.config.time_embedding_type == "fourier" else out

    def embed(self, t: float | Tensor, class_labels: Tensor | None = None, *, batch_size: int) -> Tensor:
        """Return the activation of the time and class embedding, which every block reads: [N, embedding channels].

        For K blocks the embedding itself follows it: [N, 2 * embedding channels].

        Args:
            t: the timestep, one for all or a tensor [1] or [N].
            class_labels: int64 [N] from 0 to num_class_embeds - 1; with `class_embed_type` "timestep" real or
                integer [N]; with "identity" real [N, embedding channels]. The range is checked on the CPU
                only.
            batch_size: N.

        Raises:
            ValueError: a shape, dtype or label is wrong, or labels are missing or not expected.
        """
        t = torch.as_tensor(t, device=self.device)
        if t.shape not in ((), (1,), (batch_size,)):
            raise ValueError(f"t has shape {tuple(t.shape)}, must be one number or have ({batch_size},)")
        self._check_labels(class_labels, batch_size)
        emb = self.time_embedding(self.time_proj(t.expand(batch_size)).to(self.dtype))
        if class_labels is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(self.dtype)
            if self.class_embedding is not None:
                class_labels = self.class_embedding(class_labels)
            emb = emb + class_labels.to(emb.dtype)
        active = ACTIVATIONS[self.config.activation](emb)
        return torch.cat([active, emb], dim=1) if self.config.reads_raw_embedding else active

    def predict(self, x: Tensor, emb: Tensor) -> Tensor:
        """Run the rest of `forward` on `x` and the result of `embed`, without a division by t; check nothing."""
        if self.config.center_input_sample:
            x = 2 * x - 1
        image: Tensor | None = x  # Skip blocks carry it along with the state
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            if isinstance(block, SkipDownBlock):
                x, block_skips, image = block(x, emb, image)
            else:
                x, block_skips = block(x, emb)
            skips += block_skips
        if self.mid_block is not None:
            x = self.mid_block(x, emb)
        image = None
        for block in self.up_blocks:
            if isinstance(block, SkipUpBlock):
                x, image = block(x, emb, skips, image)
            else:
                x = block(x, emb, skips)
        out = self.conv_out(norm_silu(self.conv_norm_out, x, self._backend))
        return out if image is None else out + image

    def _check_input(self, x: Tensor) -> None:
        channels, factor = self.config.in_channels, 2 ** (len(self.config.block_out_channels) - 1)
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, must have shape [N, {channels}, H, W]")
        height, width = x.shape[2:]
        least = self.config.smallest_size
        if height % factor or width % factor or min(height, width) < least:
            more = "" if least == factor else f", at least {least}"
            raise ValueError(f"x is {height}x{width} pixels, both must be positive multiples of {factor}{more}")
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
        # On a GPU the check would wait for the device; under torch.compile it would break the graph.
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            low, high, classes = int(labels.min()), int(labels.max()), self.class_embedding.num_embeddings
            if low < 0 or high >= classes:
                raise ValueError(f"class_labels go from {low} to {high}, must be in 0..{classes - 1}")

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write `folder`/config.json and the weights, each file whole or not at all.

        `diffusers.UNet2DModel.from_pretrained(folder)` loads them, unless the config has values that diffusers does not
        support (`UNetConfig.not_in_diffusers`).

        Args:
            folder: created if it does not exist.
            variant: part of the names of the weights' files: "fp16" for diffusion_pytorch_model.fp16.safetensors.
            max_shard_size: bytes, or text such as "200MB"; larger weights go into several files and an index.
            safe_serialization: write safetensors; False for torch's own format, `diffusion_pytorch_model.bin`.

        Raises:
            ValueError: `max_shard_size` is not a size.
        """
        state = {name: p.detach().cpu().contiguous() for name, p in files.apart(self.state_dict()).items()}
        files.write(Path(folder), self.config.to_dict(), state, variant, max_shard_size, safe_serialization)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        variant: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        low_cpu_mem_usage: bool = True,
    ) -> UNet:
        """Load a U-Net that `save_pretrained` or diffusers' UNet2DModel saved in `folder`, in evaluation mode.

        Reads safetensors, in one file or in shards. Where there are none it reads `diffusion_pytorch_model.bin`, and
        loads only tensors from it, never other objects.

        Args:
            folder: holds config.json and the weights.
            dtype: of the parameters; the file's own (the widest in it) if None.
            device: where to put them.
            variant: of the weights, as diffusers names files: "ema" for diffusion_pytorch_model.ema.safetensors.
            torch_dtype: diffusers' name of `dtype`; "auto" is the file's own.
            low_cpu_mem_usage: has no effect: weights are never held twice.

        Raises:
            FileNotFoundError: the folder does not exist, or has no config or no weights.
            ValueError: a file cannot be read or does not fit; the message names it, and the keys. Or `dtype` and
                `torch_dtype` are both given, or one is not a floating-point type.
        """
        del low_cpu_mem_usage
        folder = Path(folder)
        if torch_dtype is not None:
            if dtype is not None:
                raise ValueError(f"torch_dtype is {torch_dtype} but dtype is {dtype}, must be None: they are the same")
            if torch_dtype != "auto" and not isinstance(torch_dtype, torch.dtype):
                raise ValueError(f"torch_dtype is {torch_dtype!r}, must be a torch.dtype or 'auto'")
            dtype = torch_dtype if isinstance(torch_dtype, torch.dtype) else None
        config = UNetConfig.from_file(folder / files.CONFIG_FILE)
        path, state = files.read(folder, variant)
        _check_layers(folder / files.CONFIG_FILE, config, path, state)
        with torch.device("meta"):
            unet = cls(config)
        _check_state(path, state, unet.state_dict())
        if dtype is None:
            dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, must be a floating-point type")
        # A copy, because the tensors may be views of the file, which another program may overwrite.
        state = {name: tensor.to(device, dtype, copy=True) for name, tensor in state.items()}
        unet.load_state_dict(state, assign=True)
        return unet.eval()

    def load_weights(self, state: dict[str, Tensor], where: str) -> None:
        """Copy weights into the U-Net, which keeps its dtype and device.

        Raises:
            ValueError: weights do not fit; the message begins with `where` and names them.
        """
        _check_state(where, state, self.state_dict())
        self.load_state_dict(state)

    @classmethod
    def from_diffusers(cls, model: nn.Module) -> UNet:
        """Copy a `UNet2DModel` of diffusers: in evaluation mode, with its dtype and on its device.

        Projections that `fuse_qkv_projections` has joined are split.

        Raises:
            ValueError: the model's config has a setting that is not supported, or its weights do not fit the config;
                the message names them.
        """
        with torch.device("meta"):
            unet = cls(UNetConfig.of_diffusers(dict(model.config)))  # type: ignore[arg-type, call-overload]
        joined = [name for name, layer in model.named_modules() if getattr(layer, "fused_projections", False)]
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        state = files.apart(state, joined)
        _check_state(type(model).__name__, state, unet.state_dict())
        unet.load_state_dict(state, assign=True)
        return unet.eval()

    def to_diffusers(self) -> Any:
        """Copy the U-Net as a `UNet2DModel` of diffusers: in evaluation mode, with its dtype and on its device.

        Raises:
            ModuleNotFoundError: diffusers is not installed.
            ValueError: diffusers does not support such a network; the message names the fields.
        """
        from diffusers import UNet2DModel

        if names := self.config.not_in_diffusers:
            values = " and ".join(f"{name} is {getattr(self.config, name)!r}" for name in names)
            raise ValueError(f"{values}, which diffusers' UNet2DModel does not have; fastddpm.UNet does")
        config = {name: value for name, value in self.config.to_dict().items() if not name.startswith("_")}
        # The filters of K blocks are buffers that the state dict leaves out.
        with torch.device(self.device if self.config.reads_raw_embedding else "meta"):
            model: Any = UNet2DModel(**config)
        state = {name: p.detach().clone() for name, p in files.apart(self.state_dict()).items()}
        model.load_state_dict(state, assign=True)
        return model.to(self.dtype).eval()


def _resnet(c: UNetConfig, plan: ResnetPlan, **more: Any) -> ResnetBlock:
    return ResnetBlock(
        plan.in_channels,
        plan.out_channels,
        emb_channels=c.embedding_channels,
        groups=plan.groups,
        groups_out=plan.groups_out,
        eps=c.norm_eps,
        dropout=c.dropout,
        scale_shift=c.resnet_time_scale_shift == "scale_shift",
        activation=c.activation,
        **more,
    )


def _k_resnets(c: UNetConfig, plan: BlockPlan) -> list[AdaResnetBlock]:
    return [
        AdaResnetBlock(
            part.in_channels,
            part.out_channels,
            emb_channels=c.embedding_channels,
            groups=part.groups,
            groups_out=part.groups_out,
            eps=c.norm_eps,
            dropout=c.dropout,
            activation=c.activation,
        )
        for part in plan.resnets
    ]


def _attentions(c: UNetConfig, plan: BlockPlan) -> list[Attention]:
    return [
        Attention(
            plan.channels,
            head_dim=plan.head_dim,
            groups=plan.attention_groups,
            eps=c.norm_eps,
            output_scale=_SKIP_SCALE if plan.family == "skip" else 1.0,
        )
        for _ in range(plan.attentions)
    ]


def _resampling(c: UNetConfig, plan: BlockPlan, **more: Any) -> ResnetBlock:
    """Return the residual block that changes the resolution, with the block's width before and after."""
    groups = c.norm_num_groups if plan.family == "plain" else plan.resnets[-1].groups_out
    assert groups is not None
    return _resnet(c, ResnetPlan(plan.channels, plan.channels, groups, groups), **more)


def _down_block(c: UNetConfig, plan: BlockPlan) -> Block:
    if plan.family == "k":
        return KDownBlock(_k_resnets(c, plan), plan.resample is not None)
    if plan.family == "skip":
        resnets = [_resnet(c, part, output_scale=_SKIP_SCALE) for part in plan.resnets]
        last = plan.resample is None
        by = None if last else _resampling(c, plan, output_scale=_SKIP_SCALE, resample="fir_down", shortcut=True)
        return SkipDownBlock(resnets, _attentions(c, plan), by)
    downsampler: ResnetBlock | Downsample | None = None
    if plan.resample == "resnet":
        downsampler = _resampling(c, plan, resample="down")
    elif plan.resample is not None:
        downsampler = Downsample(plan.channels, None if plan.resample == "plain" else c.downsample_padding)
    return DownBlock([_resnet(c, part) for part in plan.resnets], _attentions(c, plan), downsampler)


def _up_block(c: UNetConfig, plan: BlockPlan) -> Block:
    if plan.family == "k":
        return KUpBlock(_k_resnets(c, plan), plan.resample is not None)
    if plan.family == "skip":
        resnets = [_resnet(c, part, output_scale=_SKIP_SCALE) for part in plan.resnets]
        if plan.resample is None:
            return SkipUpBlock(resnets, _attentions(c, plan), None, None)
        by = _resampling(c, plan, output_scale=_SKIP_SCALE, resample="fir_up", shortcut=True)
        norm = nn.GroupNorm(plan.resnets[-1].groups_out, plan.channels, c.norm_eps)
        return SkipUpBlock(resnets, _attentions(c, plan), by, norm)
    upsampler: ResnetBlock | Upsample | None = None
    if plan.resample == "resnet":
        upsampler = _resampling(c, plan, resample="up")
    elif plan.resample is not None:
        upsampler = Upsample(plan.channels, convolve=plan.resample != "plain")
    return UpBlock([_resnet(c, part) for part in plan.resnets], _attentions(c, plan), upsampler)


def sinusoids(config: UNetConfig) -> Sinusoids:
    """Return the module before the layers of the time embedding: [N] timesteps -> [N, config.sinusoid_channels]."""
    return Sinusoids(
        config.sinusoid_channels,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
        scale=config.timestep_scale,
    )


def _check_layers(config_path: Path, config: UNetConfig, path: Path, state: dict[str, Tensor]) -> None:
    """Compare the numbers of layers and levels with the weights, before thousands of layers take minutes to build."""
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
        raise ValueError(f"{path} does not fit its {files.CONFIG_FILE}; {'; '.join(problems)}")
