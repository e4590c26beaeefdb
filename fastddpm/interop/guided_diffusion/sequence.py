"""guided-diffusion's `UNetModel` with `dims=1`, for sequences [N, C, L]."""

from __future__ import annotations

from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.layers import Conv3x3, Downsample, ResnetBlock, Upsample
from fastddpm.networks.unet.model import UNet


class SequenceUNet(nn.Module):
    """A `UNet` on images of height 1, whose convolutions and resampling work along the width alone.

    Its weights are those of `UNet`, but for convolutions [out, in, 1, 3]. It is not prepared for sampling: `Sampler`
    calls it as it is.

    Args:
        config: of the `UNet`; `sample_size` is the length of a sequence.

    Attributes:
        unet: the layers.
        config: the fields that `Sampler` reads, with `sample_size` (L,).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.unet = UNet(config)
        assert isinstance(config.sample_size, int)
        self.config = SimpleNamespace(
            sample_size=(config.sample_size,), in_channels=config.in_channels, out_channels=config.out_channels,
            has_classes=config.has_classes, num_class_embeds=config.num_class_embeds, null_class=config.null_class,
        )  # fmt: skip
        for block in list(self.unet.modules()):
            for name, layer in list(block.named_children()):
                if isinstance(layer, Conv3x3):
                    setattr(block, name, _along(layer))
                elif isinstance(layer, Downsample):
                    setattr(block, name, _Halve(layer))
                elif isinstance(layer, Upsample):
                    setattr(block, name, _Double(layer))
            if isinstance(block, ResnetBlock) and block.resample is not None:
                block.resample = f"{block.resample}_along"

    def forward(self, x: Tensor, t: float | Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict what the network was trained for: [N, out_channels, L].

        Args:
            x: noisy sequences [N, in_channels, L], L divisible by 2 ** (levels - 1).
            t, class_labels: as for `UNet.forward`.

        Raises:
            ValueError: a shape is wrong, or labels are missing or not expected.
        """
        channels, factor = self.config.in_channels, 2 ** (len(self.unet.config.block_out_channels) - 1)
        if x.ndim != 3 or x.shape[1] != channels or x.shape[2] % factor or not x.shape[2]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, must have shape [N, {channels}, L], L a positive multiple of {factor}"
            )
        emb = self.unet.embed(t, class_labels, batch_size=len(x))
        return self.unet.predict(x.unsqueeze(2), emb).squeeze(2)


class _Halve(Downsample):
    """`Downsample` along the width."""

    def __init__(self, layer: Downsample) -> None:
        nn.Module.__init__(self)
        self.padding = layer.padding
        self.conv = None if layer.conv is None else _along(layer.conv)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (1, 2)) if self.conv is None else self.conv(x)


class _Double(nn.Module):
    """`Upsample` along the width."""

    def __init__(self, layer: Upsample) -> None:
        super().__init__()
        self.conv = None if layer.conv is None else _along(layer.conv)

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat_interleave(2, dim=3)
        return x if self.conv is None else self.conv(x)


def _along(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution of size 3 along the width, of the same channels and stride."""
    device, stride = conv.weight.device, (1, conv.stride[1])
    return nn.Conv2d(conv.in_channels, conv.out_channels, (1, 3), stride, padding=(0, 1), device=device)
