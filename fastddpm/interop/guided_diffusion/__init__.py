"""Load checkpoints of OpenAI's guided-diffusion and improved-diffusion into our U-Net and sampler.

Their files are bare state dicts. The flags of their command line describe the network, and the caller gives them:

    flags = {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "learn_sigma": True, ...}
    sampler = load_sampler("64x64_diffusion.pt", timestep_respacing="250", device="cuda", **flags)
    images = sampler.sample(16, seed=0, class_labels=207)  # float32 [16, 3, 64, 64] in [-1, 1]

An upsampler has the flags large_size and small_size, and takes the small images when it samples:

    upsampler = load_sampler("64_256_upsampler.pt", "250", large_size=256, small_size=64, num_channels=192, ...)
    larger = upsampler.sample(16, low_res=images, class_labels=207)

One of their classifiers guides like any other `classifier_fn` of `Sampler`:

    classifier = load_classifier("64x64_classifier.pt", classifier_depth=4, device="cuda")
    sampler = load_sampler(..., classifier_fn=classifier.gradient, classifier_scale=1.0)

For equal noise the samples are those of `p_sample_loop`, or of `ddim_sample_loop` where the respacing is such as
"ddim25". The U-Net is a `fastddpm.UNet`: it trains, saves and prepares for sampling like any other.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fastddpm.common.files import read_weights
from fastddpm.interop.guided_diffusion import weights
from fastddpm.interop.guided_diffusion.classifier import Classifier
from fastddpm.interop.guided_diffusion.flags import Flags, classifier_flags, model_flags, noise_schedule, unet_config
from fastddpm.interop.guided_diffusion.sequence import SequenceUNet
from fastddpm.interop.guided_diffusion.upsampler import Upsampler
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.sampler import Sampler

CLASSES = 1000

# The flags that set up the sampler.
_SAID = (
    "model", "schedule", "method", "num_inference_steps", "timestep_spacing", "prediction_type", "variance_type",
    "clip_sample", "steps_offset", "timesteps", "convention", "use_clipped_model_output", "set_alpha_to_one",
    "solver_order", "lower_order_final", "final_sigmas_type", "self_condition",
)  # fmt: skip
# The last layer of each pool; its rows are the classes.
_LOGITS = {"attention": "out.2.c_proj", "adaptive": "out.3", "spatial": "out.2", "spatial_v2": "out.3"}


def load_unet(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    library: str = "guided_diffusion",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **flags: Any,
) -> UNet | SequenceUNet:
    """Load a `UNetModel` as our U-Net, in eval mode. Nothing in a file is executed.

    Args:
        path_or_state_dict: a file, such as 64x64_diffusion.pt, or its state dict.
        library: the library of the flags, "guided_diffusion" or "improved_diffusion"; they differ in defaults and in
            the widths for an image size.
        dtype: of the parameters; None for the file's own.
        device: where to put them.
        **flags: as on the command line, text allowed: image_size, num_channels, num_res_blocks, num_heads, ... and
            those of the diffusion. Other flags have the library's default, which is seldom that of a published file.
            With rescale_timesteps the U-Net takes the timesteps of the diffusion, from 0 to diffusion_steps - 1, and
            scales them itself. With large_size or small_size it is a `SuperResModel`, which reads x and, as further
            channels, the small images enlarged (bilinear). The weights say how many classes there are. dropout is for
            training; use_fp16 (see `dtype`), use_checkpoint, use_kl and rescale_learned_sigmas change nothing here.
            conv_resample, in_channels (of an image) and dims are arguments of `UNetModel` that no flag of theirs sets;
            dims 1 is for sequences of the length image_size, and gives a `SequenceUNet`.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: a flag is not known.
        ValueError: a flag has a wrong value, the file cannot be read, or the weights do not fit the flags. The message
            lists keys and shapes, and the flags that the weights imply, as far as they show.
    """
    return _load_unet(path_or_state_dict, model_flags(library, flags), dtype, device)


def load_sampler(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    timestep_respacing: str | int = "",
    *,
    library: str = "guided_diffusion",
    use_ddim: bool | None = None,
    clip_denoised: bool = True,
    **flags: Any,
) -> Sampler:
    """Load a `UNetModel` and its diffusion as a `Sampler`; for equal noise its samples are the library's.

    A `SuperResModel` becomes an `Upsampler`, whose `sample` takes `low_res`.

    Args:
        path_or_state_dict, library: as for `load_unet`.
        timestep_respacing: "" for all steps, "250", "ddim25", or "10,15,20": so many in each of equal sections.
        use_ddim: sample by DDIM in place of ancestral sampling; None: where the respacing is "ddim" and a number.
        clip_denoised: clip the predicted x0 to [-1, 1].
        **flags: of the model and the diffusion, as for `load_unet`; and settings of `Sampler` that have no flag, such
            as device, dtype, eta, classifier_fn and classifier_scale.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `load_unet` and `Sampler`.
    """
    known = [name for name in inspect.signature(Sampler).parameters if name not in _SAID]
    settings = {name: flags.pop(name) for name in known if name in flags}
    parsed = model_flags(library, {**flags, "timestep_respacing": timestep_respacing})
    schedule, said = sampler_settings(parsed, use_ddim=use_ddim)
    method = said["method"]
    for name, other in (("convention", "ddpm"), ("use_clipped_model_output", "ddim")):
        if method != other:
            del said[name]
    unet = _load_unet(path_or_state_dict, parsed, None, settings.get("device") or "cpu")
    kind = Sampler if parsed.small_size is None else Upsampler
    return kind(unet, schedule, **said, clip_sample=clip_denoised, **settings)


def sampler_settings(flags: Flags, *, use_ddim: bool | None = None) -> tuple[NoiseSchedule, dict[str, Any]]:
    """Return the schedule and the settings of `Sampler` that flags mean, those of methods "ddpm" and "ddim" alike.

    Raises:
        ValueError: the respacing is not possible.
    """
    schedule, respacing = noise_schedule(flags), flags.timestep_respacing.strip()
    if use_ddim is None:
        use_ddim = respacing.startswith("ddim")
    try:
        schedule.timesteps(respacing or None, "guided_diffusion")
    except ValueError as error:  # the message names num_inference_steps, the caller gave timestep_respacing
        raise ValueError(str(error).replace("num_inference_steps", "timestep_respacing")) from None
    variance = "fixed_small" if flags.sigma_small else "fixed_large"
    return schedule, {
        "method": "ddim" if use_ddim else "ddpm",
        "num_inference_steps": respacing or None,
        "timestep_spacing": "guided_diffusion",
        "prediction_type": "sample" if flags.predict_xstart else "epsilon",
        "variance_type": "learned_range" if flags.learn_sigma else variance,
        "convention": "guided_diffusion",
        "use_clipped_model_output": True,
    }


def load_classifier(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **flags: Any,
) -> Classifier:
    """Load an `EncoderUNetModel` of guided-diffusion for `Sampler(classifier_fn=classifier.gradient)`, in eval mode.

    It takes the timesteps of the diffusion. Its parameters need no gradients.

    Args:
        path_or_state_dict, dtype, device: as for `load_unet`.
        **flags: as on the command line: image_size, classifier_width, classifier_depth,
            classifier_attention_resolutions, classifier_use_scale_shift_norm, classifier_resblock_updown,
            classifier_pool, classifier_use_fp16 (see `dtype`), and those of the diffusion; only its rescale_timesteps
            and diffusion_steps have an effect.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `load_unet`.
    """
    parsed, pool = classifier_flags(flags)
    where, state = _state(path_or_state_dict)
    bias = state.get(f"{_LOGITS[pool]}.bias")
    classes = len(bias) if bias is not None and bias.ndim else CLASSES
    with torch.device("meta"):
        classifier = Classifier(unet_config(parsed, channels_name="classifier_width"), pool, classes)
    found = weights.sources(classifier, classifier.names())
    weights.check(where, state, found, {})
    _take(classifier, state, found, parsed, dtype, device)
    return classifier.requires_grad_(False)


def shapes(library: str = "guided_diffusion", **flags: Any) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a checkpoint of a `UNetModel` with the flags of `load_unet`.

    Raises:
        TypeError, ValueError: as `load_unet`.
    """
    parsed = model_flags(library, flags)
    _, found = _new_unet(unet_config(parsed, CLASSES if parsed.class_cond else None), parsed)
    return {source.name: source.shape for source in found.values()}


def _new_unet(config: UNetConfig, flags: Flags) -> tuple[UNet | SequenceUNet, dict[str, weights.Source]]:
    """Return a U-Net on "meta", and the sources of the tensors of its `UNet`."""
    with torch.device("meta"):
        if flags.dims == 1:
            sequences = SequenceUNet(config)
            return sequences, weights.sources(sequences.unet, weights.unet_names(sequences.unet), along=True)
        unet = UNet(config)
    return unet, weights.sources(unet, weights.unet_names(unet))


def _load_unet(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    flags: Flags,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> UNet | SequenceUNet:
    config = unet_config(flags, CLASSES if flags.class_cond else None)
    where, state = _state(path_or_state_dict)
    labels = state.get("label_emb.weight")
    if flags.class_cond and labels is not None and labels.ndim == 2:
        config = config.replace(num_class_embeds=len(labels))
    if config.layers_per_block > len(state):  # checked before thousands of layers are built
        blocks = config.layers_per_block
        raise ValueError(f"num_res_blocks is {blocks}, but {where} has {len(state)} tensors, must have more than that")
    unet, found = _new_unet(config, flags)
    weights.check(where, state, found, weights.told_by_weights(state, flags))
    _take(unet.unet if isinstance(unet, SequenceUNet) else unet, state, found, flags, dtype, device)
    return unet.eval()


def _state(path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
    """Return the name that errors begin with, and the tensors."""
    given = path_or_state_dict
    if not isinstance(given, Mapping):
        return str(given), read_weights(given)
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state dict has {name!r} of type {type(tensor).__name__}, must have tensors alone")
    return "state dict", given


def _take(
    module: torch.nn.Module,
    state: Mapping[str, Tensor],
    found: Mapping[str, weights.Source],
    flags: Flags,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Give a module on "meta" its tensors."""
    if dtype is None:
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, must be a floating-point type")
    new_order = flags.use_new_attention_order
    with torch.no_grad():
        tensors = weights.converted(state, found, new_order=new_order, dtype=dtype, device=device)
        own = module.state_dict()  # convolutions of sequences are [out, in, 1, size] in it
    module.load_state_dict({name: tensor.view(own[name].shape) for name, tensor in tensors.items()}, assign=True)
    module.eval()
