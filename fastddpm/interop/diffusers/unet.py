"""diffusers' UNet2DModel as a `fastddpm.UNet` of the very same parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.common.checks import listed
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.model import UNet

# Attention processors that compute plain attention, each in its own way.
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


def unwrapped(unet: Any) -> Any:
    """The module itself where `torch.compile` has wrapped it."""
    return getattr(unet, "_orig_mod", unet)


def check_unet(unet: Any) -> None:
    """Raises ValueError unless a `UNet2DModel` computes nothing but what its config says, as it is now.

    Raises:
        ValueError: it is of another class, or a layer of it is of another library, has hooks or an attention
            processor of another kind; the message names it.
    """
    kind = type(unet)
    if kind.__name__ != "UNet2DModel" or kind.__module__.partition(".")[0] != "diffusers":
        raise ValueError(f"unet is a {kind.__name__}, must be a UNet2DModel of diffusers")
    for name, module in unet.named_modules():
        where = f"unet.{name}".rstrip(".")
        library = type(module).__module__.partition(".")[0]
        if library not in ("diffusers", "torch"):
            layer = type(module).__name__
            raise ValueError(f"{where} is a {layer} of {library}, must be a layer of diffusers or torch")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise ValueError(f"{where} has hooks or a forward of its own, must have none (offloading sets them, too)")
        processor = type(getattr(module, "processor", None)).__name__
        if processor not in (*_PROCESSORS, "NoneType"):
            raise ValueError(f"{where}.processor is a {processor}, must be one of {', '.join(_PROCESSORS)}")


def share_unet(unet: Any) -> UNet:
    """A `fastddpm.UNet` in eval mode whose parameters are those of a `UNet2DModel`: not copies, the same objects.

    What trains, loads or moves the one does so to the other.

    Raises:
        ValueError: as `check_unet`; a field of its config is not supported, or a parameter is not where it should be.
    """
    check_unet(unet)
    config = _config(dict(unet.config))
    with torch.device("meta"):
        ours = UNet(config)
    parameters = dict(unet.named_parameters())
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


def _config(fields: dict[str, Any]) -> UNetConfig:
    """The config of a U-Net.

    Raises:
        ValueError: fields are not supported; the message lists all that are seen, each with what is.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(UNetConfig)}
    problems: dict[str, str] = {}
    while True:
        try:
            config = UNetConfig.from_dict(fields)
        except ValueError as error:
            name = str(error).partition(" ")[0]  # with which the message begins
            if name not in problems:  # else it is about the default that was put there
                problems[name] = str(error)
                if name in fields:  # on to the next one, as if this were in order
                    fields = {key: defaults[key] if key == name else v for key, v in fields.items() if key in defaults}
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
        out = self.model(sample, timestep, class_labels)
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d import UNet2DOutput

        return UNet2DOutput(sample=out)
