"""Read and write a run as a TOML file: the model, the data and the training.

    [data]       folder; of a folder with captions text_encoder, its name, and text_tokens, how many a caption has
    [model]      fields of `fastddpm.UNetConfig`; with a text_encoder, of diffusers' `UNet2DConditionModel`
    [diffusion]  the noise schedule (beta_schedule, num_train_timesteps, beta_start, beta_end, trained_betas,
                 rescale_betas_zero_snr) and the keyword arguments of `fastddpm.GaussianDiffusion`
    [trainer]    fields of `fastddpm.TrainerSettings`, and metric: "none" or "frechet", that of `ComponentDistance`

Missing keys have their defaults. "none" stands for None, since TOML has no such value. A schedule without a range of
betas, such as the cosine one, accepts only the defaults of beta_start and beta_end. Given betas accept only their own
number as num_train_timesteps.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import numbers
import os
import sys
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
import torch
from torch import nn

from fastddpm.common.files import read_text, write_text
from fastddpm.common.images import check_memory
from fastddpm.common.version import __version__
from fastddpm.interop.pretrained import is_condition_model
from fastddpm.interop.text_encoder import TextEncoder
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.training.metrics import ComponentDistance
from fastddpm.training.objective import GaussianDiffusion
from fastddpm.training.settings import TrainerSettings
from fastddpm.training.state import OBJECTIVE, condition_fields, settings_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from fastddpm.training.trainer import Trainer

_SCHEDULE = {
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
# The fields of diffusers' UNet2DConditionModel that UNet2DModel does not have.
CONDITION_FIELDS = (
    *("only_cross_attention", "cross_attention_dim", "transformer_layers_per_block", "encoder_hid_dim"),
    *("reverse_transformer_layers_per_block", "encoder_hid_dim_type", "num_attention_heads", "dual_cross_attention"),
    *("use_linear_projection", "addition_embed_type", "addition_time_embed_dim", "upcast_attention"),
    *("resnet_skip_time_act", "resnet_out_scale_factor", "time_embedding_act_fn", "timestep_post_act"),
    *("time_cond_proj_dim", "conv_in_kernel", "conv_out_kernel", "projection_class_embeddings_input_dim"),
    *("attention_type", "class_embeddings_concat", "mid_block_only_cross_attention", "cross_attention_norm"),
    "addition_embed_type_num_heads",
)
KEYS: dict[str, list[str]] = {
    "data": ["folder", "text_encoder", "text_tokens"],
    "model": [*(field.name for field in dataclasses.fields(UNetConfig)), *CONDITION_FIELDS],
    "diffusion": [*_SCHEDULE, *OBJECTIVE],
    "trainer": [*(field.name for field in dataclasses.fields(TrainerSettings)), "metric"],
}
METRICS = (None, "frechet")
_PATHS = (("data", "folder"), ("trainer", "results_folder"))
_URI = "file:"  # begins a path whose bytes are not UTF-8
Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class RunConfig:
    """The settings of `fastddpm train`.

    Attributes:
        folder: of pictures, or an `.npz`.
        model: the U-Net; with a text encoder the fields of diffusers' `UNet2DConditionModel`.
        diffusion: keys of [diffusion].
        trainer: settings.
        metric: "frechet" or None.
        text_encoder: of the captions, by its name; None for pictures without.
        text_tokens: to which captions are cut; None for those of the longest.
    """

    folder: str | None
    model: UNetConfig | dict[str, Any]
    diffusion: dict[str, Any]
    trainer: TrainerSettings
    metric: str | None = None
    text_encoder: str | None = None
    text_tokens: int | None = None

    @classmethod
    def from_tables(cls, tables: Mapping[str, Mapping[str, Any]], where: str = "config") -> RunConfig:
        """Build a config from sections and their keys.

        Raises:
            ValueError: a section or key is not known, or a value is wrong; the message names it.
        """
        check_keys(tables, where)
        sections = {section: dict(tables.get(section, {})) for section in KEYS}
        metric = sections["trainer"].pop("metric", None)
        if metric not in METRICS:
            raise ValueError(f"{where}: metric is {metric!r}, must be 'none' or 'frechet'")
        folder, text_encoder, tokens = (sections["data"].get(name) for name in KEYS["data"])
        for name, kind, value in (("text_encoder", str, text_encoder), ("text_tokens", int, tokens)):
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"{where}: {name} is {value!r}, must be {'a name' if kind is str else 'an integer'}")
        model: UNetConfig | dict[str, Any] = sections["model"]
        try:
            if text_encoder is None:
                model = UNetConfig().replace(**sections["model"])
            trainer = TrainerSettings(**sections["trainer"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None
        return cls(folder, model, sections["diffusion"], trainer, metric, text_encoder, tokens)

    def build(self) -> GaussianDiffusion:
        """Return the diffusion, with a U-Net initialised from `trainer.seed`.

        Raises:
            ValueError, TypeError: a setting is wrong, or two settings contradict each other.
        """
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in self._network().parameters())
        check_memory(20 * count, f"training a U-Net of {count / 1e6:.1f} million parameters")  # five values for each
        schedule = _schedule(self.diffusion)
        objective = {name: value for name, value in self.diffusion.items() if name not in _SCHEDULE}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trainer.seed)
            unet = self._network()
        return GaussianDiffusion(unet, schedule, **objective)

    def _network(self) -> nn.Module:
        return UNet(self.model) if isinstance(self.model, UNetConfig) else _condition_model(self.model)

    def encoder(self) -> TextEncoder | str | None:
        """Return the text encoder, or its name where the captions decide how many tokens they have.

        Raises:
            FileNotFoundError, ModuleNotFoundError, ValueError: see `TextEncoder`.
        """
        if self.text_encoder is None or self.text_tokens is None:
            return self.text_encoder
        return TextEncoder(self.text_encoder, tokens=self.text_tokens)

    def to_tables(self) -> Tables:
        """Return all sections with all their keys."""
        diffusion = {**_SCHEDULE, **OBJECTIVE, **self.diffusion}
        if (betas := diffusion["trained_betas"]) is not None:
            diffusion["num_train_timesteps"] = len(betas)
        return {
            "data": _data(self.folder, self.text_encoder, self.text_tokens),
            "model": dict(vars(self.model) if isinstance(self.model, UNetConfig) else self.model),
            "diffusion": diffusion,
            "trainer": {**vars(self.trainer), "metric": self.metric},
        }


def _data(folder: str | None, text_encoder: str | None, text_tokens: int | None) -> dict[str, Any]:
    texts = {} if text_encoder is None else {"text_encoder": text_encoder, "text_tokens": text_tokens}
    return {"folder": folder, **texts}


def _condition_model(fields: Mapping[str, Any]) -> nn.Module:
    try:
        import diffusers
    except ImportError:
        raise ModuleNotFoundError(
            "captions are trained with a UNet2DConditionModel, for which diffusers is needed: "
            "pip install 'fastddpm[diffusers,text]'"
        ) from None
    kind: Any = diffusers.UNet2DConditionModel
    if unknown := fields.keys() - inspect.signature(kind.__init__).parameters.keys():
        raise ValueError(f"[model] has {', '.join(sorted(unknown))}, which a UNet2DConditionModel does not have")
    try:
        return kind(**fields)
    except Exception as error:  # diffusers raises errors of many types
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"[model] cannot be made a UNet2DConditionModel: {reason}") from None


def _schedule(given: Mapping[str, Any]) -> NoiseSchedule:
    """Return the schedule named by keys of [diffusion]; raise ValueError if one is wrong or has no effect."""
    told = {name: given.get(name, default) for name, default in _SCHEDULE.items()}
    betas, rescale = told.pop("trained_betas"), told.pop("rescale_betas_zero_snr")
    if not isinstance(rescale, bool):
        raise ValueError(f"rescale_betas_zero_snr is {rescale!r}, must be true or false")
    if betas is None:
        schedule = NoiseSchedule.from_name(**told)
    else:
        try:
            schedule = NoiseSchedule.from_betas(betas)
        except ValueError as error:
            raise ValueError(f"trained_{error}") from None  # it says "betas"
        steps = given.get("num_train_timesteps", len(schedule.betas))
        if steps != len(schedule.betas):
            raise ValueError(f"num_train_timesteps is {steps}, must be {len(schedule.betas)}, as many as trained_betas")
    for name in ("beta_start", "beta_end"):
        if schedule.beta_start is None and told[name] != _SCHEDULE[name]:
            what = "trained_betas" if betas is not None else f"beta_schedule {told['beta_schedule']!r}"
            raise ValueError(
                f"{name} is {told[name]!r}, which {what} does not have: must be left out (the schedules from "
                "beta_start to beta_end are 'linear', 'scaled_linear' and 'sigmoid')"
            )
    return schedule.rescale_zero_terminal_snr() if rescale else schedule


def read_tables(path: str | os.PathLike[str]) -> Tables:
    """Read the sections of a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, or has an unknown section or key.
    """
    try:
        content = tomllib.loads(read_text(path).replace("\r\n", "\n"))
    except RecursionError:
        raise ValueError(f"{path} is not valid TOML: it is nested too deeply") from None
    except ValueError as error:  # also text that is not UTF-8
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    for section, keys in content.items():
        if not isinstance(keys, dict):
            raise ValueError(f"{path}: {section} stands outside of a section, must be in one of {_sections()}")
    check_keys(content, str(path))
    tables = {section: {key: _none(value) for key, value in keys.items()} for section, keys in content.items()}
    for section, key in _PATHS:
        if isinstance(text := tables.get(section, {}).get(key), str) and text.startswith(_URI):
            tables[section][key] = os.fsdecode(urllib.parse.unquote_to_bytes(text[len(_URI) :]))
    return tables


def parse_assignment(text: str) -> tuple[str, str, Any]:
    """Split `section.key=value` into its three parts; the value is TOML, and a bare word is a string.

    Raises:
        ValueError: it has another form, or there is no such key.
    """
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise ValueError(f"{text!r} must be SECTION.KEY=VALUE, such as trainer.train_lr=2e-4")
    check_keys({section: {key: None}}, "--set")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value.strip()
    return section, key, _none(parsed)


def check_keys(tables: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raise ValueError if a section or a key is not known."""
    for section, keys in tables.items():
        if section not in KEYS:
            raise ValueError(f"{where}: there is no section [{section}], only {_sections()}")
        for key in keys:
            if key not in KEYS[section]:
                near = difflib.get_close_matches(key, KEYS[section], 1)
                hint = f"is {near[0]} meant?" if near else f"keys are {', '.join(KEYS[section])}"
                raise ValueError(f"{where}: [{section}] has no key {key}; {hint}")


def to_toml(tables: Mapping[str, Mapping[str, Any]], comment: str = "") -> str:
    """Return sections as TOML, preceded by the lines of `comment`."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    content = {section: _value(dict(keys)) for section, keys in tables.items()}
    for section, key in _PATHS:
        if (path := tables.get(section, {}).get(key)) is not None:
            content[section][key] = _path(path)
    return lines + tomli_w.dumps(content)


def _path(path: str) -> str:
    """Return a path that TOML can hold: distinct from "none", and a `file:` URI if it is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return _URI + urllib.parse.quote_from_bytes(os.fsencode(path))
    return f"./{path}" if path == "none" or path.startswith(_URI) else path


def write_run_config(path: Path, trainer: Trainer) -> None:
    """Write the settings of a trainer that a file can hold: all of them for pictures and a `fastddpm.UNet`."""
    diffusion = trainer.diffusion
    encoder = trainer.text_encoder
    told = (None, None) if encoder is None else (encoder.name, encoder.tokens)
    tables: Tables = {"data": _data(trainer.data_folder, *told)}
    comments = [f"fastddpm {__version__}, torch {torch.__version__}"]
    if trainer.data_folder is None:
        comments.append("The data were a Dataset, which this file cannot name.")
    if isinstance(diffusion.unet, UNet):
        tables["model"] = dict(vars(diffusion.unet.config))
    elif encoder is not None and is_condition_model(diffusion.unet):
        tables["model"] = condition_fields(diffusion.unet)
    else:
        comments.append(f"The network was a {type(diffusion.unet).__name__}, which this file cannot describe.")
    schedule = diffusion.schedule
    named = schedule.beta_schedule != "trained_betas"
    tables["diffusion"] = {
        "beta_schedule": schedule.beta_schedule if named else "linear",
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_start": schedule.beta_start if schedule.beta_start is not None else _SCHEDULE["beta_start"],
        "beta_end": schedule.beta_end if schedule.beta_end is not None else _SCHEDULE["beta_end"],
        "trained_betas": None if named else schedule.betas.tolist(),
        "rescale_betas_zero_snr": False,
    }
    tables["diffusion"] |= settings_of(diffusion)
    tables["trainer"] = {**vars(trainer.settings), "mixed_precision": trainer.accelerator.mixed_precision}
    tables["trainer"]["metric"] = "frechet" if isinstance(trainer.metric, ComponentDistance) else None
    if trainer.metric is not None and tables["trainer"]["metric"] is None:
        comments.append("The metric was a function, which this file cannot name.")
    write_text(path, to_toml(tables, "\n".join(comments)))


def _value(value: Any) -> Any:
    """Return a value that TOML can hold: "none" for None, Python numbers for numpy's."""
    if value is None:
        return "none"
    if isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, dict):
        return {key: _value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    raise TypeError(f"{value!r} is a {type(value).__name__}, which TOML cannot hold")


def _none(value: Any) -> Any:
    return None if value == "none" else value


def _sections() -> str:
    return ", ".join(f"[{section}]" for section in KEYS)
