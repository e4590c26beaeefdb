"""Load models from folders, files and the hub, as other libraries save them; save them as diffusers' pipeline folder.

    model_index.json
    unet/config.json, unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json

`diffusers.DDPMPipeline.from_pretrained` loads what is saved here, and the reverse.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.common.files import read_json, read_tensors, read_weights, write_json
from fastddpm.interop import guided_diffusion, hub
from fastddpm.interop.guided_diffusion.flags import model_flags
from fastddpm.interop.lucidrains.checkpoint import is_trainer_checkpoint, network_of_checkpoint
from fastddpm.interop.scheduler_config import SELF_CONDITION, load_scheduler
from fastddpm.interop.text_encoder import TextEncoder, told
from fastddpm.networks.unet.files import index_files, shards, weights_files
from fastddpm.networks.unet.model import UNet
from fastddpm.process.methods import find_method, own_settings
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.sampler import Sampler

BUNDLED = Path(__file__).parents[1] / "assets" / "digits"

_INDEX, _CONFIG, _SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
_LABELS = "_labels"  # in model_index.json: names of the labels that occur in the training data; diffusers ignores it
# In model_index.json of a text-conditional model: which encoder it was trained with; diffusers ignores it.
_TEXT = "_text_encoder"
_DECODERS = ("VQModel", "AutoencoderKL")
_CONDITIONAL = "UNet2DConditionModel"
_RUN_CONFIG, _RUN_WEIGHTS = "config.toml", "diffusion.safetensors"  # files of a training run and of its checkpoints


@dataclass(frozen=True)
class Pretrained:
    """A model and the settings to sample it with.

    Attributes:
        unet: the network: a `fastddpm.UNet`, a `Unet` of denoising_diffusion_pytorch with a `config`, or diffusers'
            `UNet2DConditionModel`.
        schedule: the forward process that it was trained on.
        settings: keyword arguments of `Sampler` (prediction_type, clip_sample, ...).
        decoder: diffusers' autoencoder that turns samples into images, where samples are latents; else None.
        label_names: the labels that occur in the training data, with their names; empty if the model has none.
        text_encoder: of a text-conditional model that a `Trainer` wrote: "name", "tokens" and "fingerprint" of the
            `TextEncoder` that it was trained with; empty for others, and where only embeddings were known.
    """

    unet: Any
    schedule: NoiseSchedule
    settings: dict[str, Any] = field(default_factory=dict)
    decoder: nn.Module | None = None
    label_names: dict[int, str] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)

    @property
    def takes_text(self) -> bool:
        """Return whether the model draws what a prompt says."""
        return is_condition_model(self.unet)

    def labels(self) -> list[int]:
        """Return the labels to draw in turn: the trained ones, or all but the null class; [] without classes."""
        config = getattr(self.unet, "config", None)
        count = getattr(config, "num_class_embeds", None)
        known = sorted(self.label_names) or range(count or 0)
        return [label for label in known if label < (count or 0) and label != getattr(config, "null_class", None)]

    def encoder(self, name: str | None = None) -> TextEncoder:
        """Load the text encoder that a text-conditional model was trained with; `name`: where it is, if elsewhere.

        Raises:
            ValueError: the model says none and `name` is None, or the encoder is another one.
        """
        known = self.text_encoder
        if name is None and "name" not in known:
            raise ValueError("text_encoder is None, must be given: the model does not say what it was trained with")
        encoder = TextEncoder(known["name"] if name is None else name, tokens=known.get("tokens"))
        if known.get("fingerprint") not in (None, encoder.fingerprint):
            raise ValueError(
                f"text_encoder is {encoder.name}, whose weights or words are not those of {known['name']}, with which "
                "the model was trained"
            )
        return encoder

    def prompted(
        self,
        prompts: Sequence[str],
        negative_prompt: str = "",
        *,
        text_encoder: TextEncoder | str | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of `Sampler.sample` that tell a text-conditional model what to draw.

            model.sampler().sample(2, guidance_scale=3.0, **model.prompted(["a red car", "a blue car"]))

        Args:
            prompts: of every sample.
            negative_prompt: what the unconditional half of guidance is told.
            text_encoder: of the prompts, or where it is; None for the one that the model names.

        Raises:
            ValueError: the model takes no prompts; see also `encoder`.
        """
        if not self.takes_text:
            raise ValueError(f"prompts is given, but the model is a {type(self.unet).__name__}, which takes none")
        encoder = text_encoder if isinstance(text_encoder, TextEncoder) else self.encoder(text_encoder)
        return told(encoder(list(prompts)), encoder([negative_prompt]))

    def sampler(self, **overrides: Any) -> Sampler:
        """Make a `Sampler` with the model's settings and those in `overrides`, which win."""
        method = overrides.get("method", self.settings.get("method", "ddpm"))
        own = own_settings(method, self.settings)
        if not find_method(method).stores_x0:  # the model's scheduler may clip x0; this method has none to clip
            own = {name: value for name, value in own.items() if name not in ("clip_sample", "thresholding")}
        if overrides.get("timesteps") is not None:
            own.pop("num_inference_steps", None)
        return Sampler(self.unet, self.schedule, **{**own, **overrides})

    @torch.no_grad()
    def decode(self, samples: Tensor, batch_size: int = 8) -> Tensor:
        """Return a sampler's samples as images [N, C, H, W] in [-1, 1]; latents are decoded `batch_size` at once."""
        if self.decoder is None:
            return samples
        decoder: Any = self.decoder.to(samples.device)
        scaled = (samples / decoder.config.scaling_factor).to(decoder.dtype)
        return torch.cat([decoder.decode(part).sample.float().clamp(-1, 1) for part in scaled.split(batch_size)])


def load_pretrained(
    model: str | os.PathLike[str] = BUNDLED,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    ema: bool = True,
    variant: str | None = None,
    **unsaid: Any,
) -> Pretrained:
    """Load a model; without an argument the bundled model of handwritten digits.

    Nothing in its files is executed: configurations are JSON; weights are safetensors, or pickles of tensors only.

    Args:
        model: one of

            - a pipeline folder of diffusers with `unet/` and `scheduler/`, or an old one with all files in one place.
              A pipeline of latents (LDMPipeline) needs diffusers for its `vqvae/`, one that reads text (Stable
              Diffusion) for its U-Net too, whose samples take `conditions`. A `checkpoint-N` of diffusers'
              training example takes the scheduler of the folder above.
            - `owner/name` or `owner/name@revision`, such a folder on the Hugging Face hub, unless a local folder has
              that name. It is kept in the hub's local cache, which also works without a connection.
            - the results folder of a run of `Trainer`, which loads its `model/`, or its `checkpoints/step-N`, which
              loads the weights of that step.
            - a file `model-N.pt` of a denoising_diffusion_pytorch `Trainer`; that library builds its `Unet`.
            - a file of guided-diffusion or improved-diffusion: a bare state dict, whose flags describe the network.
        dtype: of the network, float32 as in diffusers; None for the stored one.
        device: where to put the network.
        ema: take the moving average where there are both weights: `unet_ema/` beside `unet/`, as diffusers'
            training example writes them, or "ema" beside "model" in a trainer's file. (In the finished pipeline of
            that example `unet/` is already the average.)
        variant: of the weights, as for diffusers: "ema" reads `diffusion_pytorch_model.ema.safetensors`.
        **unsaid: settings that a file lacks. For a Trainer's file: image_size, which must be given, objective and
            sinusoidal_pos_emb_theta, see `network_of_checkpoint`. For the other files: the published flags, as text or
            as values, see `interop.guided_diffusion.load_unet`, and `library`.

    Raises:
        FileNotFoundError: the model does not exist, or one of its files is missing.
        ModuleNotFoundError: the model needs a library that is not installed; the message names it.
        ValueError: a file is corrupt or has a setting that is not supported; the message names file and field.
        TypeError: an argument belongs to another kind of model.
    """
    path = Path(model)
    if (run := run_of(path)) is not None:
        return _load_run(path, run, dtype, device, ema, variant, unsaid)
    if path.is_file():
        if variant is not None:
            raise ValueError(f"variant is {variant!r} but {path} is a file, must be None: folders have variants")
        return _load_file(path, dtype, device, ema, unsaid)
    if unsaid:
        raise TypeError(f"{', '.join(unsaid)} is given but {model} is no file, must be left out")
    if not path.is_dir():
        if not isinstance(model, str) or hub.parse(model) is None:
            raise FileNotFoundError(
                f"{model} is not a folder, must be one with unet/ and scheduler/, a checkpoint file, or owner/name of "
                "the hub"
            )
        path = _fetch(model, ema, variant)
    parts = _Parts.of(path, ema)
    schedule, settings = load_scheduler(parts.scheduler)
    if parts.conditional:
        unet: Any = _of_diffusers(_CONDITIONAL, parts.unet, dtype, device, variant=variant)
    else:
        unet = UNet.from_pretrained(parts.unet, dtype=dtype, device=device, variant=variant)
    decoder = None if parts.decoder is None else _of_diffusers(parts.decoder[1], parts.decoder[0], dtype, device)
    return Pretrained(unet, schedule, settings, decoder, _label_names(path / _INDEX), parts.text)


def _label_names(path: Path) -> dict[int, str]:
    """Return the names by label in a model_index.json; empty if it has none.

    Raises:
        ValueError: the entry is not a map from label to name; the message names the file.
    """
    names = read_json(path).get(_LABELS, {}) if path.is_file() else {}
    if not isinstance(names, dict) or not all(
        label.isdecimal() and label.isascii() and len(label) < 10 and isinstance(name, str)
        for label, name in names.items()
    ):
        raise ValueError(f"{path}: {_LABELS} is {str(names)[:60]}, must be names by label, such as {{'0': 'cat'}}")
    return {int(label): name for label, name in names.items()}


def is_text_model(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is that of a text-conditional model, or its run, that `save_pretrained` wrote."""
    run = run_of(path)
    index = (Path(path) if run is None else run / "model") / _INDEX
    return index.is_file() and read_json(index).get(_TEXT) is not None


def run_of(path: str | os.PathLike[str]) -> Path | None:
    """Return the results folder of a `Trainer` run, from that folder or its `checkpoints/step-N`; None for others."""
    path = Path(path)
    if (path / _RUN_CONFIG).is_file() and not (path / _INDEX).is_file():
        return path
    run = path.parent.parent  # path may be RUN/checkpoints/step-N
    return run if (path / _RUN_WEIGHTS).is_file() and (run / _RUN_CONFIG).is_file() else None


def _load_run(
    path: Path, run: Path, dtype: torch.dtype | None, device: torch.device | str, ema: bool, variant: str | None,
    unsaid: dict[str, Any],
) -> Pretrained:  # fmt: skip
    """Load the model of a run, with the weights of a checkpoint if `path` is one."""
    folder = run / "model"
    if not (folder / _INDEX).is_file():
        raise FileNotFoundError(f"{run} is a training run without a model yet; it writes one with its first checkpoint")
    model = load_pretrained(folder, dtype=dtype, device=device, ema=ema, variant=variant, **unsaid)
    if path == run:
        return model
    average, prefix = path / "ema-0.safetensors", "unet."
    file = average if ema and average.is_file() else path / _RUN_WEIGHTS
    weights = read_weights(file).items()
    state = {name.removeprefix(prefix): v for name, v in weights if file == average or name.startswith(prefix)}
    if not model.takes_text:
        model.unet.load_weights(state, str(file))
        return model
    try:
        model.unet.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} is not of this network: {' '.join(str(error).split())[:400]}") from None
    return model


@dataclass(frozen=True)
class _Parts:
    """The paths of the parts of a pipeline folder.

    Attributes:
        unet: the folder of the U-Net.
        scheduler: the scheduler's file.
        decoder: (folder, class) of the autoencoder that decodes latents, or None.
        conditional: whether the U-Net reads text.
        text: `Pretrained.text_encoder`.
    """

    unet: Path
    scheduler: Path
    decoder: tuple[Path, str] | None = None
    conditional: bool = False
    text: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, ema: bool) -> _Parts:
        """Find the parts of `folder`.

        Raises:
            FileNotFoundError: `folder` is not a pipeline folder.
            ValueError: the pipeline is not supported.
        """
        index = read_json(folder / _INDEX) if (folder / _INDEX).is_file() else {}
        unet, text = _component(index, "unet"), index.get(_TEXT, {})
        if not isinstance(text, dict):
            raise ValueError(f"{folder / _INDEX}: {_TEXT} is {str(text)[:60]}, must be a table")
        if unet not in (None, "UNet2DModel", _CONDITIONAL):
            raise ValueError(
                f"{folder / _INDEX}: {index.get('_class_name')} has a unet of class {unet}, must be UNet2DModel or "
                f"{_CONDITIONAL}; any other network runs in Sampler(model, schedule)"
            )
        decoder = None
        for name in ("vqvae", "vae"):
            if (kind := _component(index, name)) is not None:
                if kind not in _DECODERS:
                    raise ValueError(f"{folder / _INDEX}: {name} is of class {kind}, must be {' or '.join(_DECODERS)}")
                decoder = (folder / name, kind)
        # Models published before pipelines had subfolders, such as google/ddpm-cat-256, keep all files in one folder.
        if not (folder / "scheduler").is_dir() and (folder / _SCHEDULER).is_file():
            return cls(folder, folder / _SCHEDULER, decoder, unet == _CONDITIONAL, text)
        averaged = folder / "unet_ema"
        part = averaged if ema and averaged.is_dir() else folder / "unet"
        scheduler = folder / "scheduler" / _SCHEDULER
        above = folder.parent / "scheduler" / _SCHEDULER
        if not scheduler.is_file() and above.is_file() and part.is_dir():
            scheduler = above
        if not scheduler.is_file() and (folder / _CONFIG).is_file():
            raise FileNotFoundError(
                f"{folder} holds one part of a pipeline, must be the folder that holds unet/ and scheduler/; "
                "UNet.from_pretrained loads a U-Net alone"
            )
        return cls(part, scheduler, decoder, unet == _CONDITIONAL, text)


def _component(index: Mapping[str, Any], name: str) -> str | None:
    """Return the class that a model_index.json gives for a part, or None."""
    value = index.get(name)
    return value[1] if isinstance(value, list) and len(value) == 2 else None


def _fetch(name: str, ema: bool, variant: str | None) -> Path:
    """Fetch a model's files from the hub: first those that say where the weights are, then the weights."""
    folders = ["", "unet/", *["unet_ema/"] * ema]
    configs = [_INDEX, _SCHEDULER, f"scheduler/{_SCHEDULER}", *(f"{part}{_CONFIG}" for part in folders)]
    folder = hub.snapshot(name, configs)
    parts = _Parts.of(folder, ema)
    _fetch_weights(name, parts.unet.relative_to(folder).as_posix(), variant)
    if parts.decoder is not None:
        part = parts.decoder[0].name
        hub.snapshot(name, [f"{part}/{_CONFIG}"])
        _fetch_weights(name, part, None)
    return folder


def _fetch_weights(name: str, part: str, variant: str | None) -> None:
    """Fetch a part's weights, whole or in shards; prefer safetensors to old files."""
    for file, index in zip(weights_files(variant), index_files(variant), strict=True):
        found = hub.snapshot(name, [(Path(part) / each).as_posix() for each in (index, file)]) / part
        if (found / file).is_file():
            return
        if (found / index).is_file():
            hub.snapshot(name, [(Path(part) / shard).as_posix() for shard in shards(found / index)])
            return


def is_condition_model(unet: Any) -> bool:
    """Return whether a network is diffusers' `UNet2DConditionModel`."""
    return any(
        kind.__module__.startswith("diffusers.") and kind.__name__ == _CONDITIONAL for kind in type(unet).__mro__
    )


def _of_diffusers(
    kind: str, folder: Path, dtype: torch.dtype | None, device: torch.device | str, **options: Any
) -> nn.Module:
    """Load one of diffusers' own models: an autoencoder, or a U-Net that reads text."""
    try:
        import diffusers
    except ImportError:
        raise ModuleNotFoundError(
            f"{folder} is a {kind}, for which diffusers is needed: pip install 'fastddpm[diffusers]'"
        ) from None
    if not folder.is_dir():
        what = "decodes the latents" if kind in _DECODERS else "is the network"
        raise FileNotFoundError(f"{folder} is missing, which {what} of this pipeline")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # later versions call it dtype
            model: Any = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=dtype or "auto", **options)
    except Exception as error:  # diffusers raises errors of many types
        raise ValueError(f"{folder} cannot be loaded as a {kind}: {str(error).partition(chr(10))[0]}") from None
    return model.to(device).eval()


def _load_file(
    path: Path, dtype: torch.dtype | None, device: torch.device | str, ema: bool, unsaid: dict[str, Any]
) -> Pretrained:
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path} is a configuration, must be the folder that holds it, or a file of weights")
    data = read_tensors(path)
    if is_trainer_checkpoint(data):
        known = ("image_size", "objective", "sinusoidal_pos_emb_theta")
        if wrong := [name for name in unsaid if name not in known]:
            raise TypeError(f"{', '.join(wrong)} is given but {path} is a Trainer's, which takes {', '.join(known)}")
        network, schedule, settings = network_of_checkpoint(data, str(path), ema=ema, **unsaid)
        return Pretrained(network.to(device=device, dtype=dtype), schedule, settings)
    if not isinstance(data, Mapping) or "time_embed.0.weight" not in data:
        held = ", ".join(map(str, list(data)[:4])) if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(
            f"{path} has {held}, must have 'ema' and 'model', as a Trainer of denoising_diffusion_pytorch saves, or "
            "'time_embed.0.weight', as guided-diffusion; the weights of a pipeline are loaded by naming its folder"
        )
    if not unsaid:
        raise ValueError(f"flags are missing, must be given: {path} does not say what network it is of")
    unsaid = dict(unsaid)
    library = unsaid.pop("library", "guided_diffusion")
    unet = guided_diffusion.load_unet(path, library=library, dtype=dtype, device=device, **unsaid)
    schedule, settings = guided_diffusion.sampler_settings(model_flags(library, unsaid))
    return Pretrained(unet, schedule, settings)


def save_pretrained(
    folder: str | os.PathLike[str],
    unet: UNet | nn.Module,
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_sample: bool = True,
    clip_sample_range: float = 1.0,
    timestep_spacing: str | None = None,
    self_condition: bool = False,
    null_class: int | None = None,
    label_names: Mapping[int, str] | None = None,
    text_encoder: TextEncoder | Mapping[str, Any] | None = None,
) -> None:
    """Write a pipeline folder that `load_pretrained` and diffusers' `DDPMPipeline.from_pretrained` read.

    For a `UNet2DConditionModel` it is one of diffusers' `IFPipeline` (DeepFloyd's, of pixels) without a text encoder:
    that takes `prompt_embeds`, and guides models with a learned variance.

    Args:
        folder: created if it does not exist; files of the same names are replaced.
        unet, schedule: the model, a `fastddpm.UNet` or diffusers' `UNet2DConditionModel`; weights are stored in the
            network's dtype.
        prediction_type, variance_type, clip_sample, clip_sample_range, self_condition: settings of `Sampler`.
        timestep_spacing: a setting of `Sampler`. None is "trailing" for a schedule with zero terminal SNR, because
            other spacings leave out its last timestep; else "leading".
        null_class: the label that means "no class"; None for that of the U-Net's config.
        label_names: the labels that occur in the training data, with their names.
        text_encoder: the encoder of a text-conditional model, or `Pretrained.text_encoder`; None if it is not known.

    Raises:
        TypeError: the network is of another class.
        ValueError: a setting is not known.
        OSError: a file cannot be written.
    """
    if timestep_spacing is None:
        timestep_spacing = "trailing" if schedule.zero_terminal_snr else "leading"
    settings: dict[str, Any] = {
        "prediction_type": prediction_type,
        "variance_type": variance_type,
        "clip_sample": clip_sample,
        "clip_sample_range": clip_sample_range,
        "timestep_spacing": timestep_spacing,
    }
    texts = is_condition_model(unet)
    if not texts and not isinstance(unet, UNet):
        raise TypeError(f"unet is a {type(unet).__name__}, must be a fastddpm.UNet or diffusers' {_CONDITIONAL}")
    stand_in: Any = unet
    if texts:  # without its weights, which need not be prepared for a check
        stand_in = lambda x, t: x  # noqa: E731
        stand_in.config = SimpleNamespace(out_channels=unet.config.out_channels)  # type: ignore[union-attr]
    Sampler(stand_in, schedule, self_condition=self_condition, **settings)  # checks the settings
    folder = Path(folder)
    unet.save_pretrained(folder / "unet")  # type: ignore[operator]
    if isinstance(unet, UNet) and null_class is not None and null_class != unet.config.null_class:
        write_json(folder / "unet" / _CONFIG, unet.config.replace(null_class=null_class).to_dict())
    config: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.30.0",
        "num_train_timesteps": schedule.num_train_timesteps,
        **settings,
        "steps_offset": 0,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
        "trained_betas": None,
    }
    if self_condition:
        config[SELF_CONDITION] = True
    if schedule.beta_schedule == "trained_betas":
        config["trained_betas"] = schedule.betas.tolist()
    else:
        config["beta_schedule"] = schedule.beta_schedule
    if schedule.beta_start is not None:
        config |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    write_json(folder / "scheduler" / _SCHEDULER, config)
    if texts:
        if isinstance(text_encoder, TextEncoder):
            text_encoder = {
                "name": text_encoder.name,
                "tokens": text_encoder.tokens,
                "fingerprint": text_encoder.fingerprint,
            }
        without = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "watermarker")
        index: dict[str, Any] = {
            "_class_name": "IFPipeline",
            "_diffusers_version": "0.30.0",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", _CONDITIONAL],
            "requires_safety_checker": False,
            **{name: [None, None] for name in without},
            _TEXT: dict(text_encoder or {}),
        }
        write_json(folder / _INDEX, index)
        return
    write_json(
        folder / _INDEX,
        {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": "0.30.0",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
            **({_LABELS: {str(label): name for label, name in sorted(label_names.items())}} if label_names else {}),
        },
    )
