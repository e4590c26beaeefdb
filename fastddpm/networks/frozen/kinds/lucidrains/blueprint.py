"""The `Unet`s of denoising_diffusion_pytorch (2.0 and later) as freezing sees them.

They are recognised by the names of their classes, so the library is not imported.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.networks.comparing import why_not_layers
from fastddpm.networks.frozen.blueprint import Blueprint, Embeddings
from fastddpm.networks.frozen.folding import side_by_side
from fastddpm.networks.frozen.kinds.lucidrains.lowering import Lowering, SequenceLowering

LIBRARY = "denoising_diffusion_pytorch"
_SHARED = {"ResnetBlock", "Block", "RMSNorm", "LinearAttention", "Attention"}
_SHARED |= {"SinusoidalPosEmb", "RandomOrLearnedSinusoidalPosEmb"}
_OF_TORCH = {nn.Conv1d, nn.Conv2d, nn.Dropout, nn.Embedding, nn.GELU, nn.Identity, nn.Linear, nn.ModuleList}
_OF_TORCH |= {nn.Sequential, nn.SiLU, nn.Upsample}


class LucidrainsEmbeddings(Embeddings):
    """See `Embeddings`. With classes, time and class fill separate columns, and their sum holds both.

    The sinusoids are computed as in the library: in torch's default dtype, or in the dtype of learned or random
    frequencies. Their angles are large and sensitive to rounding, so half-precision frequencies become float32.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        sinusoids, *mlp = unet.time_mlp
        self.sinusoids = copy.deepcopy(sinusoids)
        if (frequencies := next(self.sinusoids.parameters(), None)) is not None and frequencies.dtype.itemsize < 4:
            self.sinusoids.float()
        self.time = copy.deepcopy(nn.Sequential(*mlp)).double()
        self._time_width: int = mlp[-1].out_features
        self.classes: nn.Embedding | None = None
        if hasattr(unet, "classes_emb"):
            known, none = unet.classes_emb.weight.detach(), unet.null_classes_emb.detach()
            self.classes = nn.Embedding.from_pretrained(torch.cat([known, none[None]]).double())
            self.classes_mlp: nn.Sequential = copy.deepcopy(unet.classes_mlp).double()
            self._classes_width: int = unet.classes_mlp[-1].out_features
            self.num_labels = len(self.classes.weight)

    def of_time(self, t: Tensor) -> Tensor:
        """Return the embeddings [S, E] of timesteps int64 [S]."""
        embedding = self.time(self.sinusoids(t).double())
        return embedding if self.classes is None else F.pad(embedding, (0, self._classes_width))

    def of_labels(self, labels: Tensor) -> Tensor:
        """Return the embeddings [N, E] of labels int64 [N]; the label num_classes means "no class"."""
        assert self.classes is not None
        return F.pad(self.classes_mlp(self.classes(labels)), (self._time_width, 0))


class LucidrainsBlueprint(Blueprint):
    """`denoising_diffusion_pytorch.Unet`."""

    name = f"a Unet of {LIBRARY}"
    builder = Lowering
    foreign = True
    has_labels = False
    _kind = (f"{LIBRARY}.{LIBRARY}", "Unet")
    _attend = frozenset({(f"{LIBRARY}.attend", "Attend"), ("einops.layers.torch", "Rearrange")})
    _wrappers: tuple[str, ...] = ()

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.in_channels, self.out_channels = unet.init_conv.in_channels, unet.out_dim
        self.optional_channels = unet.channels if getattr(unet, "self_condition", False) else 0
        self.factor = 2 ** (len(unet.downs) - 1)

    @classmethod
    def takes(cls, model: object) -> bool:
        return _name(type(model)) == cls._kind

    @classmethod
    def why_not(cls, model: Any) -> str | None:
        own = {(cls._kind[0], name) for name in (*_SHARED, *cls._wrappers, cls._kind[1])} | cls._attend
        if reason := why_not_layers(model, lambda kind: kind in _OF_TORCH or _name(kind) in own):
            return reason
        for name, module in model.named_modules():
            wrong = _unusual(module)
            if wrong is not None:
                return f"its layer {name} {wrong}"
        attentions = ("Residual",) if cls._wrappers else ("LinearAttention", "Attention")
        for name, levels in (("downs", model.downs), ("ups", model.ups)):
            for index, level in enumerate(levels):
                kinds = [type(part).__name__ for part in level]
                usual = len(kinds) == 4 and kinds[:2] == 2 * ["ResnetBlock"] and kinds[2] in attentions
                if not usual or kinds[3] not in ("Conv1d", "Conv2d", "Sequential"):
                    return f"its layer {name}.{index} is of {', '.join(kinds)}"
        return None

    def embeddings(self) -> Embeddings:
        return LucidrainsEmbeddings(self.unet)

    def time_projections(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        blocks = [(name, m) for name, m in self.unet.named_modules() if type(m).__name__ == "ResnetBlock"]
        return side_by_side((name, block.mlp[1].weight, block.mlp[1].bias) for name, block in blocks)


class ClassConditionalBlueprint(LucidrainsBlueprint):
    """`denoising_diffusion_pytorch.classifier_free_guidance.Unet`; the label num_classes means "no class".

    No label is dropped: this calls the U-Net with `cond_drop_prob` 0, which is not its default.
    """

    alone = False
    has_labels = True
    _kind = (f"{LIBRARY}.classifier_free_guidance", "Unet")
    _attend = frozenset()
    _wrappers = ("Residual", "PreNorm")

    def call(self, x: Tensor, t: Tensor, labels: Tensor | None, **more: Tensor) -> Tensor:
        return self.unet(x, t, labels, cond_drop_prob=0.0, **more)


class RepaintBlueprint(LucidrainsBlueprint):
    """`denoising_diffusion_pytorch.repaint.Unet`."""

    _kind = (f"{LIBRARY}.repaint", "Unet")


class SequenceBlueprint(LucidrainsBlueprint):
    """`denoising_diffusion_pytorch.Unet1D`."""

    name = f"a Unet1D of {LIBRARY}"
    builder = SequenceLowering
    dims = 1
    _kind = (f"{LIBRARY}.{LIBRARY}_1d", "Unet1D")
    _attend = frozenset()
    _wrappers = ("Residual", "PreNorm")


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _unusual(module: Any) -> str | None:
    """Return which setting of a layer differs from the library's and would be ignored, or None."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        own = (module.groups, module.dilation, module.padding_mode)
        usual = (1, (1,) * len(module.dilation), "zeros")
        return None if own == usual else f"has groups, dilation and padding_mode {own}"
    if isinstance(module, nn.Upsample):
        mode, factor = module.mode, module.scale_factor
        return None if (mode, factor) == ("nearest", 2.0) else f"has mode {mode} and scale_factor {factor}"
    name = type(module).__name__
    if name == "ResnetBlock" and module.mlp is None:
        return "has no projection of the time"
    if name == "Attend" and module.scale is not None:
        return f"has scale {module.scale}"
    return None
