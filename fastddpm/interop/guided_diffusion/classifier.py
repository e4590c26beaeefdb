"""guided-diffusion's classifier of noisy images: the way down of its U-Net and a pool to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastddpm_kernels.group_norm_silu import group_norm_silu
from torch import Tensor, nn

from fastddpm.interop.guided_diffusion.flags import GROUPS
from fastddpm.interop.guided_diffusion.weights import encoder_names
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.model import UNet, sinusoids

_FEATURES = 2048  # width of the hidden layer in the spatial pools


class AttentionPool(nn.Module):
    """Attention from the mean over the pixels to all (after CLIP, Radford et al. 2021): [N, C, H, W] -> [N, K]."""

    def __init__(self, channels: int, pixels: int, head_dim: int, num_classes: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.positional_embedding = nn.Parameter(torch.randn(channels, pixels + 1) / channels**0.5)
        self.qkv_proj = nn.Linear(channels, 3 * channels)
        self.c_proj = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2) + self.positional_embedding
        q, k, v = self.qkv_proj(x.transpose(1, 2)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.c_proj(F.scaled_dot_product_attention(q[:, :, :1], k, v).flatten(1))


class Classifier(nn.Module):
    """`EncoderUNetModel`, which gives the logits of noisy images.

    Args:
        config: the U-Net whose way down it has.
        pool: "attention", "adaptive" (the mean over the pixels), "spatial" or "spatial_v2" (the means of all blocks,
            followed by two layers).
        num_classes: K.

    Raises:
        ValueError: the pool is "attention" and the way down leaves no pixels.
    """

    def __init__(self, config: UNetConfig, pool: str, num_classes: int) -> None:
        super().__init__()
        self.config, self.pool_type, self.num_classes = config, pool, num_classes
        unet = UNet(config)
        assert unet.mid_block is not None
        self.conv_in, self.time_embedding = unet.conv_in, unet.time_embedding
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
        widths, layers = config.block_out_channels, config.layers_per_block
        if pool.startswith("spatial"):
            features = widths[0] + sum((layers + 1) * width for width in widths)  # the last level's is the mid block
            self.linear_1 = nn.Linear(features, _FEATURES)
            self.norm = nn.GroupNorm(GROUPS, _FEATURES) if pool == "spatial_v2" else None
            self.linear_2 = nn.Linear(_FEATURES, num_classes)
            return
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], config.norm_eps)
        if pool == "adaptive":
            self.conv_out = nn.Conv2d(widths[-1], num_classes, 1)
            return
        size, head_dim = config.sample_size, config.head_dims[len(widths)]
        assert isinstance(size, int)
        left = size // 2 ** (len(widths) - 1)
        if not left:
            raise ValueError(f"image_size is {size}, must be at least {2 ** (len(widths) - 1)}")
        self.pool = AttentionPool(widths[-1], left**2, head_dim or widths[-1], num_classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the logits [N, K] of noisy images x [N, 3, H, W], about [-1, 1] before noise, at timesteps t [N]."""
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        emb = F.silu(self.time_embedding(sinusoids(self.config)(t).to(x.dtype)))
        x = self.conv_in(x)
        features = [x]
        for block in self.down_blocks:
            x, skips = block(x, emb)
            features += skips
        x = self.mid_block(x, emb)
        if self.pool_type.startswith("spatial"):
            h = self.linear_1(torch.cat([feature.mean(dim=(2, 3)) for feature in [*features, x]], dim=1))
            return self.linear_2(F.relu(h) if self.norm is None else F.silu(self.norm(h)))
        norm = self.norm_out
        x = group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, eps=norm.eps)
        if self.pool_type == "attention":
            return self.pool(x)
        return self.conv_out(x.mean(dim=(2, 3), keepdim=True)).flatten(1)

    def gradient(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """Return the gradient of log p(class_labels | x) in x, which `Sampler` takes as `classifier_fn`.

        Args:
            x: float32 [N, 3, H, W].
            t: timesteps [N].
            class_labels: int64 [N].

        Raises:
            ValueError: `class_labels` is None.
        """
        if class_labels is None:
            raise ValueError("class_labels are missing, but a classifier guides to classes")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = F.log_softmax(self(x.to(self.conv_in.weight.dtype), t), dim=1)
            return torch.autograd.grad(log_p.gather(1, class_labels[:, None]).sum(), x)[0]

    def names(self) -> dict[str, str]:
        """Return the names of the modules in an `EncoderUNetModel`, keyed by ours."""
        return encoder_names(self) | {
            "norm_out": "out.0",
            "pool": "out.2",
            "conv_out": "out.3",
            "linear_1": "out.0",
            "norm": "out.1",
            "linear_2": "out.2" if self.pool_type == "spatial" else "out.3",
        }
