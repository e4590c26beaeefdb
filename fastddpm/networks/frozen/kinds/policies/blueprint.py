"""The U-Nets of diffusion policies (Chi et al. 2023, arXiv:2303.04137) as freezing sees them.

`ConditionalUnet1D` is diffusion_policy's, `DiffusionConditionalUnet1d` is lerobot's. They are recognised by the names
of their classes, so the libraries are not imported. They take sequences [N, L, C]; here these are [N, C, L].
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.networks.comparing import why_not_layers
from fastddpm.networks.frozen.blueprint import Blueprint, Condition, Embeddings
from fastddpm.networks.frozen.folding import side_by_side
from fastddpm.networks.frozen.kinds.policies.lowering import LeRobotLowering, Lowering

_OF_TORCH = {nn.Conv1d, nn.ConvTranspose1d, nn.GroupNorm, nn.Identity, nn.Linear, nn.Mish, nn.ModuleList, nn.Sequential}


class PolicyEmbeddings(Embeddings):
    """See `Embeddings`. Time and observation fill separate columns, so their projections add up.

    The sinusoids are computed as in the library, in torch's default dtype.
    """

    separates = True

    def __init__(self, unet: Any, observed: int) -> None:
        super().__init__()
        sinusoids, *mlp = unet.diffusion_step_encoder
        self.sinusoids = copy.deepcopy(sinusoids)
        self.time = copy.deepcopy(nn.Sequential(*mlp)).double()
        self._width, self._observed = mlp[-1].out_features, observed
        self.conditions = ("global_cond",) if observed else ()

    def of_time(self, t: Tensor) -> Tensor:
        """Return the embeddings [S, E] of timesteps int64 [S]."""
        return F.pad(self.time(self.sinusoids(t).double()), (0, self._observed))

    def of_conditions(self, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings [N, E] of `global_cond` [N, G]."""
        return F.pad(conditions["global_cond"].double(), (self._width, 0))

    def activate(self, emb: Tensor) -> Tensor:
        """Return the Mish of embeddings [.., E]."""
        return F.mish(emb)


class PolicyBlueprint(Blueprint):
    """`ConditionalUnet1D` of diffusion_policy."""

    name = "a ConditionalUnet1D of diffusion_policy"
    builder = Lowering
    dims = 1
    alone = False  # it takes [N, L, C]
    foreign = True
    pairs = False
    has_labels = False
    _library, _class = "diffusion_policy", "ConditionalUnet1D"
    _layers: tuple[str, ...] = (
        "ConditionalResidualBlock1D", "Conv1dBlock", "Downsample1d", "Upsample1d", "SinusoidalPosEmb", "Rearrange",
    )  # fmt: skip

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.in_channels = _convolutions(unet.down_modules[0][0])[0].in_channels
        self.out_channels = unet.final_conv[1].out_channels
        self.factor = 2 ** sum(not isinstance(level[2], nn.Identity) for level in unet.down_modules)
        self._observed = unet.mid_modules[0].cond_encoder[1].in_features - unet.diffusion_step_encoder[-1].out_features
        self.conditions = {"global_cond": Condition((self._observed,))} if self._observed else {}
        if (local := self._local_encoder()) is not None:
            self.conditions["local_cond"] = Condition((None, _convolutions(local)[0].in_channels), optional=True)

    @classmethod
    def takes(cls, model: object) -> bool:
        return _is(type(model), cls._library, cls._class)

    @classmethod
    def why_not(cls, model: Any) -> str | None:
        def known(kind: type) -> bool:
            library = "einops" if kind.__name__ == "Rearrange" else cls._library
            return kind in _OF_TORCH or any(_is(kind, library, name) for name in (cls._class, *cls._layers))

        if reason := why_not_layers(model, known):
            return reason
        for name, module in model.named_modules():
            if wrong := _unusual(module):
                return f"its layer {name} {wrong}"
        halved, doubled = (
            sum(not isinstance(level[2], nn.Identity) for level in levels)
            for levels in (model.down_modules, model.up_modules)
        )
        return None if halved == doubled else f"it halves the sequence {halved} times and doubles it {doubled} times"

    def embeddings(self) -> Embeddings:
        return PolicyEmbeddings(self.unet, self._observed)

    def time_projections(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        blocks = [(name, m) for name, m in self.unet.named_modules() if hasattr(m, "cond_encoder")]
        used = [(name, m.cond_encoder[1]) for name, m in blocks if name != "local_cond_encoder.1"]
        return side_by_side((name, linear.weight, linear.bias) for name, linear in used)

    def call(self, x: Tensor, t: Tensor, labels: Tensor | None, **more: Tensor) -> Tensor:
        result: Tensor = self.unet(x.transpose(1, 2), t, **more)
        return result.transpose(1, 2)

    def some_conditions(
        self, batch: int, device: torch.device | str, dtype: torch.dtype = torch.float32, *, optional: bool = False
    ) -> dict[str, Tensor]:
        """See `Blueprint.some_conditions`; local conditions are as long as the smallest sequence."""
        found = super().some_conditions(batch, device, dtype, optional=optional)
        if "local_cond" in found:
            found["local_cond"] = found["local_cond"][:, :1].repeat(1, self.factor, 1)
        return found

    def _local_encoder(self) -> Any:
        encoders = getattr(self.unet, "local_cond_encoder", None)
        return None if encoders is None else encoders[0]


class LeRobotBlueprint(PolicyBlueprint):
    """`DiffusionConditionalUnet1d` of lerobot."""

    name = "a DiffusionConditionalUnet1d of lerobot"
    builder = LeRobotLowering
    _library, _class = "lerobot", "DiffusionConditionalUnet1d"
    _layers = ("DiffusionConditionalResidualBlock1d", "DiffusionConv1dBlock", "DiffusionSinusoidalPosEmb")


def _is(kind: type, library: str, name: str) -> bool:
    return kind.__qualname__ == name and kind.__module__.partition(".")[0] == library


def _convolutions(block: Any) -> list[Any]:
    return [module for module in block.modules() if isinstance(module, nn.Conv1d)]


def _unusual(module: Any) -> str | None:
    """Return which setting of a layer differs from the library's and would be ignored, or None."""
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        own = (module.groups, module.dilation, module.padding_mode)
        if own != (1, (1,), "zeros"):
            return f"has groups, dilation and padding_mode {own}"
        if isinstance(module.padding, str):
            return f"has padding {module.padding!r}"
    if isinstance(module, nn.ConvTranspose1d):
        sizes = (*module.kernel_size, *module.stride, *module.padding, *module.output_padding)
        return None if sizes == (4, 2, 1, 0) else f"has kernel, stride, padding and output_padding {sizes}"
    if isinstance(module, nn.GroupNorm) and not module.affine:
        return "has no weight and bias"
    return None
