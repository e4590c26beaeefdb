"""`fastddpm train`: train a model on a folder of pictures."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli.options import a_seed, integer

if TYPE_CHECKING:
    from fastddpm.training.config import RunConfig, Tables

RESULTS = "results"
METRICS = ("none", "frechet")
# Options that set keys of [trainer].
_TRAINER = (
    *("results_folder", "train_num_steps", "train_batch_size", "train_lr", "mixed_precision", "metric"),
    *("augment_horizontal_flip", "device", "seed"),
)


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    train = commands.add_parser(
        "train",
        help="train a model on a folder of pictures",
        description="Train a model on pictures of any size and format, or on an .npz. Settings that are not given are "
        "chosen from the data: the size, grey or colour, the U-Net. Everything is written to one folder: the model, "
        "samples on the way, the loss, and checkpoints, from which --resume goes on. SIGTERM, SIGHUP and "
        "Ctrl-C write a checkpoint first.",
    )
    add = train.add_argument
    add("folder", nargs="?", metavar="FOLDER",
        help="pictures, also in subfolders: if all are in one, each subfolder is a class; or an .npz (arr_0 uint8 "
             "NHWC, arr_1 labels)")  # fmt: skip
    add("--config", type=Path, metavar="FILE.toml", help="settings, as --print-config shows them")
    add("--set", action="append", default=[], dest="assignments", metavar="SECTION.KEY=VALUE",
        help="one of these settings, such as trainer.train_lr=2e-4; may be repeated")  # fmt: skip
    add("--print-config", action="store_true", help="print all settings as they would be used, and do nothing else")
    add("--resume", action="store_true", help="go on from the last checkpoint in the results, if there is one")
    add("-o", "--results-folder", "--output", metavar="DIR", help=f"where everything goes (default: {RESULTS})")
    add("--captions", metavar="ENCODER", dest="text_encoder",
        help="train text to image: each picture has a caption in metadata.jsonl (file_name, text) or in a .txt beside "
             "it, which this text encoder reads: a folder, an installed package or owner/name of the hub")  # fmt: skip
    add = train.add_argument_group("model (default: chosen from the data)").add_argument
    add("--image-size", type=integer(1), metavar="PIXELS", help="a side; pictures are cut and resized")
    add("--channels", type=int, choices=(1, 3, 4), help="1 for grey, 3 for colour, 4 with opacity")
    add("--width", type=integer(2), metavar="C", help="channels of the U-Net at full size")
    add("--class-labels", action=argparse.BooleanOptionalAction,
        help="whether the model is told classes (default: where the data has them)")  # fmt: skip
    add = train.add_argument_group("training").add_argument
    add("--steps", "--train-num-steps", type=integer(1), dest="train_num_steps", metavar="N",
        help="in all (default: 100000)")  # fmt: skip
    add("--batch-size", "--train-batch-size", type=integer(1), dest="train_batch_size", metavar="B",
        help="images at once, over all processes (default: 16)")  # fmt: skip
    add("--learning-rate", "--train-lr", type=float, dest="train_lr", metavar="R", help="at its peak (default: 1e-4)")
    add("--mixed-precision", choices=("no", "bf16", "fp16"),
        help="(default: bf16 on a CUDA device that has it, else no)")  # fmt: skip
    add("--flip", "--augment-horizontal-flip", action="store_true", default=None, dest="augment_horizontal_flip",
        help="mirror half of the images, at random")  # fmt: skip
    add("--metric", choices=METRICS,
        help="measured with every grid of samples; the best model is kept: the Frechet distance to the data in their "
             "principal components (default: none, or that of the run that is resumed)")  # fmt: skip
    add("--device", help="cuda, mps, cpu (default: the first of these that this machine has)")
    add("--seed", type=a_seed, help="of weights, order, flips and noise")
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from fastddpm.training import ComponentDistance, DivergedError, Trainer
    from fastddpm.training.config import to_toml

    config = _config(options)
    if options.print_config:
        print(to_toml(config.to_tables()), end="")
        return
    if config.folder is None:
        raise ValueError("FOLDER is missing, and there is no folder in [data]")
    trainer = Trainer(
        config.build(), config.folder, config.trainer, text_encoder=config.encoder(), resume=options.resume
    )
    if config.metric is not None:
        trainer.metric = ComponentDistance(trainer.source)
    main = trainer.accelerator.is_main_process
    if main:
        _describe(trainer)
    again = f"fastddpm train --resume -o {trainer.folder}"
    try:
        result = trainer.train()
    except DivergedError as error:
        raise ValueError(str(error)) from None
    except (KeyboardInterrupt, SystemExit):
        if main:
            print(f"stopped after step {trainer.step}, saved; go on with: {again}", file=sys.stderr)
        raise
    if not main:
        return
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    print(f"{result.step} steps done{loss}; the model is in {result.model}")
    prompt = f" --prompt {shlex.quote(trainer.captions[0])}" if trainer.captions else ""
    print(f"draw samples with: fastddpm sample {result.model}{prompt}")


def _config(options: argparse.Namespace) -> RunConfig:
    """Return the settings: defaults from the data, overruled by the file, then by the options."""
    from fastddpm.training.config import RunConfig, parse_assignment, read_tables

    path = options.config
    if path is None and options.resume:
        before = Path(options.results_folder or RESULTS) / "config.toml"
        path = before if before.is_file() else None
    given: Tables = {} if path is None else read_tables(path)
    if path is not None and options.config is None:
        given.setdefault("trainer", {})["results_folder"] = str(path.parent)  # the folder may have been moved
    trainer = given.setdefault("trainer", {})
    trainer |= {name: value for name in _TRAINER if (value := getattr(options, name)) is not None}
    if options.metric == "none":
        trainer["metric"] = None
    for name in ("folder", "text_encoder"):
        if (value := getattr(options, name)) is not None:
            given.setdefault("data", {})[name] = value
    if options.seed is not None:
        given.setdefault("diffusion", {})["seed"] = options.seed
    assigned: set[str] = set()
    for text in options.assignments:
        section, key, value = parse_assignment(text)
        given.setdefault(section, {})[key] = value
        assigned |= {key} if section == "model" else set()
    if "mixed_precision" not in trainer and _bf16(trainer.get("device")):
        trainer["mixed_precision"] = "bf16"
    _fill_in(given, options, assigned)
    return RunConfig.from_tables(given, "the settings" if path is None else str(path))


def _bf16(device: str | None) -> bool:
    import torch

    if device not in (None, "cuda") or not torch.cuda.is_available():
        return False
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _fill_in(given: Tables, options: argparse.Namespace, assigned: set[str]) -> None:
    """Add the settings that follow from the data to those given; `assigned` has the keys of [model] from --set."""
    from dataclasses import replace

    from fastddpm.interop.text_encoder import encoder_width
    from fastddpm.networks.unet.config import UNetConfig
    from fastddpm.training.defaults import default_diffusion, default_model, default_text_model, look_at

    folder = given.get("data", {}).get("folder")
    if folder is None:
        if options.print_config:
            return
        raise ValueError("FOLDER is missing: name a folder of pictures or an .npz, or --config a file with one")
    if not isinstance(folder, str):
        raise ValueError(f"[data] folder is {folder!r}, must be a path in quotes")
    encoder = given["data"].get("text_encoder")
    look = look_at(folder) if encoder is None else replace(look_at(folder), classes=0)
    model = given.setdefault("model", {})
    if options.class_labels and not look.classes:
        raise ValueError(f"--class-labels is given, but {folder} has no classes: a subfolder for each is needed")
    told = UNetConfig().replace(**{key: model[key] for key in ("sample_size", "out_channels") if key in model})
    of_texts = default_diffusion(look, texts=True) if encoder is not None else {}
    learned = {**of_texts, **given.get("diffusion", {})}.get("variance_type") == "learned_range"
    channels = told.out_channels // (2 if learned else 1) if "out_channels" in model else None
    look = replace(
        look,
        size=("sample_size" in assigned and told.sample_size) or options.image_size or told.sample_size or look.size,
        channels=options.channels or channels or look.channels,
        classes=0 if options.class_labels is False else look.classes,
    )
    if encoder is None:
        defaults = default_model(look, width=options.width)
    else:
        defaults = default_text_model(look, encoder_width(encoder), width=options.width)
    structure = ("block_out_channels", "down_block_types", "up_block_types", "attention_head_dim", "norm_num_groups")
    if not options.width and any(key in model for key in structure):
        defaults = {key: value for key, value in defaults.items() if key not in structure}
    fixed = {key for key, asked in (("sample_size", options.image_size), ("in_channels", options.channels)) if asked}
    if options.width:
        fixed |= set(structure)
    if options.channels:
        fixed.add("out_channels")
    # Options overrule a file; --set is the most exact and overrules both.
    kept = {key: value for key, value in model.items() if key not in fixed or key in assigned}
    given["model"] = {**defaults, **kept}
    given["diffusion"] = {**default_diffusion(look, texts=encoder is not None), **given.get("diffusion", {})}
    if "out_channels" not in kept:
        given["model"]["out_channels"] = (2 if learned else 1) * look.channels


def _describe(trainer: Any) -> None:
    from fastddpm.cli.options import device_name
    from fastddpm.common.images import few

    source, settings = trainer.source, trainer.settings
    names = trainer.label_names
    classes = f", {len(names)} classes" if names else ""
    if (encoder := trainer.text_encoder) is not None:
        classes = f", {len(trainer.captions)} captions of up to {encoder.tokens} tokens in {encoder.name}"
    size = " x ".join(str(side) for side in trainer.shape)
    parameters = sum(p.numel() for p in trainer.diffusion.unet.parameters()) / 1e6
    print(f"{len(source)} images of {size}{classes}; a network of {parameters:.1f} million parameters")
    if names:
        shown = [f"{label} {name}" if name != str(label) else name for label, name in names.items()]
        print(f"labels: {few(shown, 20)}")
    processes = trainer.accelerator.num_processes
    print(
        f"{settings.train_num_steps} steps of {settings.images_per_step} images, from step {trainer.step}, on "
        f"{device_name(trainer.accelerator.device)}{f' in {processes} processes' if processes > 1 else ''}, mixed "
        f"precision {trainer.accelerator.mixed_precision}; results in {trainer.folder}"
    )
