"""Write the outputs of a run: preview samples and the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fastddpm.common.images import grid, strip
from fastddpm.interop.pretrained import is_condition_model, save_pretrained
from fastddpm.interop.text_encoder import TextEncoder, told
from fastddpm.networks.unet.model import UNet
from fastddpm.sampling.sampler import Sampler
from fastddpm.training import checkpoint
from fastddpm.training.captions import CaptionedFolder
from fastddpm.training.data import Source
from fastddpm.training.ema import ExponentialAverage
from fastddpm.training.fitting import takes_labels
from fastddpm.training.objective import GaussianDiffusion
from fastddpm.training.order import Pick
from fastddpm.training.settings import TrainerSettings

if TYPE_CHECKING:
    from PIL import Image


def sample_labels(diffusion: GaussianDiffusion, labels: Sequence[int], count: int) -> list[int] | None:
    """Return `count` sorted labels, each label that occurs equally often; None for a network without classes.

    `labels`: those that occur in the data; empty if unknown, which stands for all labels of the network.
    """
    if not takes_labels(diffusion.unet):
        return None
    embeds = getattr(getattr(diffusion.unet, "config", None), "num_class_embeds", None)
    known = labels or range(embeds or 1)
    drawn = [label for label in known if label != diffusion.null_class] or list(known)
    return [drawn[i * len(drawn) // count] for i in range(count)]


def sampler_settings(settings: TrainerSettings, timesteps: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run's preview sampler, as far as they fit the method in `overrides`."""
    chosen: dict[str, Any] = {}
    if overrides.get("method", "dpmsolver++") == "dpmsolver++":
        steps = min(settings.num_inference_steps, timesteps)
        chosen = {"method": "dpmsolver++", "num_inference_steps": steps}
    if settings.guidance_scale is not None:
        chosen["guidance_scale"] = settings.guidance_scale
    return chosen


def make_sampler(diffusion: GaussianDiffusion, unet: nn.Module, **overrides: Any) -> Sampler:
    """Return a `Sampler` of `unet` (such as an average) with the settings of the diffusion."""
    settings: dict[str, Any] = {
        "prediction_type": diffusion.prediction_type,
        "variance_type": diffusion.variance_type,
        "clip_sample": diffusion.clip_sample,
        "self_condition": diffusion.self_condition,
        "null_class": diffusion.null_class,
        "timestep_spacing": "trailing" if diffusion.schedule.zero_terminal_snr else "leading",
    }
    return Sampler(unet, diffusion.schedule, **{**settings, **overrides})


def export(
    folder: Path,
    diffusion: GaussianDiffusion,
    unet: nn.Module,
    label_names: Mapping[int, str],
    text_encoder: TextEncoder | None = None,
) -> None:
    """Write a model: a diffusers pipeline folder for a `fastddpm.UNet` or diffusers' `UNet2DConditionModel`.

    Of other networks write the weights alone.

    Raises:
        OSError: it cannot be written; the old content is unchanged.
    """

    def write(path: Path) -> None:
        if isinstance(unet, UNet) or is_condition_model(unet):
            save_pretrained(
                path,
                unet,
                diffusion.schedule,
                prediction_type=diffusion.prediction_type,
                variance_type=diffusion.variance_type,
                clip_sample=diffusion.clip_sample,
                self_condition=diffusion.self_condition,
                null_class=diffusion.null_class if takes_labels(unet) else None,
                label_names=label_names,
                text_encoder=text_encoder,
            )
        else:
            state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in unet.state_dict().items()}
            save_file(state, path / "model.safetensors")

    try:
        checkpoint.atomic_folder(folder, write)
    except SafetensorError as error:  # it reports a full disk so, among others
        raise OSError(f"{folder} cannot be written: {error}") from error


def remove_leftovers(folder: Path) -> None:
    """Remove partial models that a killed process left in the folder of a run."""
    checkpoint.remove_leftovers(folder, r"model(?:-best|-ema-[0-9.e-]+)?")


def export_averages(
    folder: Path,
    diffusion: GaussianDiffusion,
    averages: Sequence[ExponentialAverage],
    label_names: Mapping[int, str],
    text_encoder: TextEncoder | None = None,
) -> None:
    """Write the first average to `folder`/model, and others to `folder`/model-ema-D with their decay D.

    Raises:
        OSError: one cannot be written; the old content is unchanged.
    """
    for place, average in enumerate(averages):
        name = "model" if place == 0 else f"model-ema-{average.decay}"
        export(folder / name, diffusion, average.module, label_names, text_encoder)


def draw_grid(
    sampler: Sampler, diffusion: GaussianDiffusion, count: int, shape: tuple[int, ...], labels: Sequence[int]
) -> Image.Image:
    """Draw a picture of `count` samples of seed 0, with all occurring `labels` in equal numbers."""
    chosen = sample_labels(diffusion, labels, count)
    images = sampler.sample(count, shape=shape, seed=0, class_labels=chosen).cpu()
    return grid(images, chosen, columns=max(1, round(count**0.5)))


def sample_texts(source: Source, count: int) -> tuple[Tensor, list[str] | None]:
    """Return the embeddings [count, L, D] and, if they are known, the captions of images that are evenly spaced."""
    numbers = [place * len(source) // count for place in range(count)]
    texts = source.read([Pick(number, 0) for number in numbers])[1]
    assert texts is not None
    return texts, [source.captions_of(each)[0] for each in numbers] if isinstance(source, CaptionedFolder) else None


def draw_texts(sampler: Sampler, texts: Tensor, captions: Sequence[str] | None, shape: tuple[int, ...]) -> Image.Image:
    """Draw a picture of a sample of each text, from seed 0, with their captions if these are known."""
    images = sampler.sample(len(texts), shape=shape, seed=0, **told(texts)).cpu()
    if captions is None:
        return grid(images, columns=max(1, round(len(texts) ** 0.5)))
    return strip([[image] for image in images], row_captions=captions)


def metric_values(result: float | Mapping[str, float]) -> dict[str, float]:
    """Return the values of a metric by name.

    Raises:
        ValueError: it returned no number.
    """
    named = result if isinstance(result, Mapping) else {"metric": result}
    values = {str(name): float(value) for name, value in named.items()}
    if not values:
        raise ValueError("metric returned no value, must return a number or several by name")
    return values
