"""diffusers' UNet2DModel as a `fastddpm.UNet` of the very same parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.common.checks import listed
from fastddpm.interop.shared import kind_of
from fastddpm.networks.comparing import changed, difference, evaluating, settings_of, some_noise, why_not_layers
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.layers import Attention
from fastddpm.networks.unet.model import UNet

# Attention processors that compute plain attention, each in its own way.
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
# The one that reads queries, keys and values from one layer.
_JOINED = "FusedAttnProcessor2_0"


def _library(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is_diffusers(kind: type) -> bool:
    return _library(kind) == "diffusers"


def unwrapped(unet: Any) -> Any:
    """The module itself where `torch.compile` has wrapped it."""
    return getattr(unet, "_orig_mod", unet)


def managed(unet: Any) -> str | None:
    """Return what moves or converts a U-Net's weights while it runs, in words, or None.

    That is offloading, of whole models or group by group, and layerwise casting.
    """
    for module in unet.modules():
        if hasattr(module, "_hf_hook"):
            return "unet is offloaded by accelerate's hooks, and runs as it is"
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        if hooks:
            return f"unet has diffusers' hook {next(iter(hooks))!r}, and runs as it is"
    return None


def check_unet(unet: Any) -> None:
    """Raise ValueError, by the name of the layer, where a `UNet2DModel` is not made of plain layers of its library.

    Raises:
        ValueError: it is of another class, or a layer is of another library, has hooks, a replaced method or an
            attention processor of another kind.
    """
    kind = type(unet)
    if kind.__name__ != "UNet2DModel" or not _is_diffusers(kind):
        raise ValueError(f"unet is a {kind_of(unet)}, must be a UNet2DModel of diffusers")
    if reason := why_not_layers(unet, lambda kind: _is_diffusers(kind) or _library(kind) == "torch"):
        raise ValueError(f"unet cannot be replaced: {reason}")
    for name, module in unet.named_modules():
        processor = type(getattr(module, "processor", None))
        known = processor.__name__ in _PROCESSORS
        if processor.__name__ == _JOINED:
            known = getattr(module, "fused_projections", False)
        if processor is not type(None) and not (known and _is_diffusers(processor)):
            raise ValueError(
                f"unet.{name}.processor is a {processor.__name__} of {_library(processor)}, must be one of "
                f"{', '.join(_PROCESSORS)} of diffusers"
            )


def check_same(unet: Any, ours: UNet) -> None:
    """Evaluate a `UNet2DModel` and what `share_unet` made of it once, on one small sample.

    Raises:
        ValueError: they differ by more than rounding; the message names the layer that is not as its config says.
    """
    size = 2 ** len(ours.config.block_out_channels)
    x = some_noise((ours.config.in_channels, size, size), unet.conv_in.weight)
    t = torch.tensor([min(500, (ours.config.num_train_timesteps or 1000) - 1)], device=x.device)
    with evaluating(unet):
        apart = difference(unet(x, t).sample, ours(x, t), x.dtype)
    if apart is None:
        return
    with torch.device("meta"):
        made = type(unet)(**{name: v for name, v in unet.config.items() if not name.startswith("_")})
    found = changed(settings_of(made), settings_of(unet), of_another=True)
    why = found or "a method or a processor has been changed"
    raise ValueError(f"unet computes something else than its config says ({apart} on a sample): {why}")


def share_unet(unet: Any) -> UNet:
    """Return a `fastddpm.UNet` in eval mode with the very parameters of a `UNet2DModel`, not copies.

    Training, loading or moving one does so to the other.

    Raises:
        ValueError: as `check_unet`; a field of its config is not supported, or a parameter is not where it should be.
    """
    check_unet(unet)
    config = _config(dict(unet.config))
    joined: list[str] = []
    with torch.device("meta"):
        ours = UNet(config)
    for name, module in unet.named_modules():  # joined projections, and not those that they were made of
        if type(getattr(module, "processor", None)).__name__ == _JOINED:
            attention = ours.get_submodule(name)
            assert isinstance(attention, Attention)
            attention.fuse()
            joined.append(name)
    parameters = {name: p for name, p in unet.named_parameters() if not _unread(name, joined)}
    own = dict(ours.named_parameters())
    problems = {
        "lacks": own.keys() - parameters.keys(),
        "has, unexpectedly,": parameters.keys() - own.keys(),
        "has in another shape": {
            name for name in own.keys() & parameters.keys() if own[name].shape != parameters[name].shape
        },
    }
    for what, names in problems.items():
        if names:
            raise ValueError(f"unet {what} {listed(names)} ({len(names)} of its parameters)")
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(path), leaf, parameter)
    return ours.eval()


def _unread(name: str, joined: list[str]) -> bool:
    """Return whether attention leaves a parameter aside: one of `fuse_projections`, or of what that replaced."""
    layer, _, leaf = name.rpartition(".to_")
    return bool(layer) and leaf.partition(".")[0] in (("q", "k", "v") if layer in joined else ("qkv",))


def _config(fields: dict[str, Any]) -> UNetConfig:
    """Return the config of a U-Net.

    Raises:
        ValueError: fields are not supported; the message lists each once, with what it may be.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(UNetConfig)}
    problems: dict[str, str] = {}
    while True:
        try:
            config = UNetConfig.of_diffusers(fields)
        except ValueError as error:
            named = {text.partition(" ")[0]: text for text in str(error).split("; ")}
            new = named.keys() - problems.keys()  # the others are about the defaults that were put there
            problems = named | problems
            if new & fields.keys():  # on to the next ones, as if these were in order
                fields = {k: defaults[k] if k in new else v for k, v in fields.items() if k in defaults}
                continue
        if problems:
            raise ValueError(f"unet.config: {'; '.join(problems.values())}")
        return config


class AsUNet2D(nn.Module):
    """A `fastddpm.UNet` that is called, and answers, as diffusers' UNet2DModel does.

    Args:
        model: the U-Net.
        theirs: the UNet2DModel whose parameters it has.
    """

    def __init__(self, model: UNet, theirs: Any) -> None:
        super().__init__()
        self.model, self.config = model, theirs.config

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.device

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `UNet2DModel.forward`: sample [N, C, H, W], one timestep or [N] -> `UNet2DOutput`, or a tuple."""
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor([timestep], dtype=torch.long)  # as there, where a float is cut off
        out = self.model(sample, timestep, class_labels)
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d import UNet2DOutput

        return UNet2DOutput(sample=out)
