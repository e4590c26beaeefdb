"""The command `fastddpm`: `sample` draws images from a model, `info` tells what would run here and why.

Bad input ends in one line on standard error and exit code 2, before anything is computed or written.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

DTYPES = ("float32", "float16", "bfloat16")
# What the library calls a setting, and what the command line calls it.
OPTIONS = {
    "num_inference_steps": "--steps",
    "num_samples": "--num-samples",
    "class_labels": "--class-labels",
    "batch_size": "--batch-size",
    "guidance_scale": "--guidance-scale",
    "method": "--method",
    "device": "--device",
    "backend": "--backend",
    "seed": "--seed",
    "eta": "--eta",
}
GIF_FRAMES = 48


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _integer(least: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {least}")
        return value

    return parse


def _labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be integers separated by commas, such as 3,1,4") from None


def _parser() -> argparse.ArgumentParser:
    from fastddpm import __version__

    parser = _Parser(prog="fastddpm", description="Fast sampling from denoising diffusion models.")
    parser.add_argument("--version", action="version", version=f"fastddpm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    sample = commands.add_parser(
        "sample",
        help="draw samples from a model and write them to a file",
        description="Draw samples from a model and write them to a file. Without MODEL_DIR it is the bundled model of "
        "handwritten digits: 100 samples, ten of each class.",
    )
    sample.add_argument("model", nargs="?", metavar="MODEL_DIR", help="a pipeline folder, as diffusers writes it")
    sample.add_argument(
        "-n",
        "--num-samples",
        type=_integer(1),
        metavar="N",
        help="how many (default: one per class label given; else 100 for the bundled model, 16 for others)",
    )
    sample.add_argument(
        "--class-labels",
        type=_labels,
        metavar="L,L,...",
        help="classes to draw, repeated in turn until there are N (default: all classes in equal numbers)",
    )
    sample.add_argument("--steps", type=_integer(1), metavar="S", help="sampling steps (default: all trained ones)")
    sample.add_argument("--method", choices=("ddpm", "ddim"), help="sampler (default: the model's, usually ddpm)")
    sample.add_argument("--eta", type=float, help="share of DDPM's noise in ddim (default: 0)")
    sample.add_argument("--guidance-scale", type=float, metavar="W", help="classifier-free guidance (default: none)")
    sample.add_argument(
        "--seed", type=_integer(0), default=0, help="sample k of a seed is always the same image (default: 0)"
    )
    sample.add_argument("--batch-size", type=_integer(1), metavar="B", help="samples per pass (default: all at once)")
    sample.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the first of these that there is)")
    sample.add_argument("--dtype", choices=DTYPES, help="of the network (default: float16 on cuda, else float32)")
    sample.add_argument(
        "--backend",
        choices=("auto", "triton", "eager", "reference"),
        default="auto",
        help="of the fused ops (default: auto)",
    )
    sample.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("samples.png"),
        metavar="PATH",
        help="by its suffix: .png a grid, .npz arrays (arr_0 uint8 NHWC, arr_1 labels), .gif the "
        "denoising, no suffix a folder of PNGs (default: samples.png)",
    )
    sample.set_defaults(run=_sample)

    info = commands.add_parser("info", help="versions, devices, and which backend each op would use here")
    info.set_defaults(run=_info)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    import torch
    from fastddpm_kernels._backend import BackendError

    try:
        options.run(options)
    except (ValueError, TypeError, OSError, BackendError, torch.OutOfMemoryError) as error:
        print(f"fastddpm {options.command}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _one_line(error: BaseException) -> str:
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # The library speaks of its arguments; here they are options.
    match = re.match(r"(\w+)(?= (?:is|has|needs) )", message)
    if match and match[1] in OPTIONS:
        message = OPTIONS[match[1]] + message[match.end() :]
    return message


def _sample(options: argparse.Namespace) -> None:
    import torch

    from fastddpm import images as writing
    from fastddpm.pretrained import BUNDLED, load_pretrained

    kind = _check_output(options.output)
    device = options.device or _best_device()
    dtype = getattr(torch, options.dtype or ("float16" if device.startswith("cuda") else "float32"))
    model = load_pretrained(options.model or BUNDLED)
    chosen = {"num_inference_steps": options.steps, "method": options.method, "eta": options.eta}
    sampler = model.sampler(
        device=device,
        dtype=dtype,
        backend=options.backend,
        guidance_scale=options.guidance_scale,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    labels = _choose_labels(options, model.unet.config)
    count = options.num_samples or (len(labels) if labels else 16)
    recorder = _Recorder(len(sampler.timesteps)) if kind == ".gif" else None
    start = time.perf_counter()
    samples = sampler.sample(
        count,
        seed=options.seed,
        class_labels=labels,
        batch_size=options.batch_size,
        callback=recorder,
        progress=True,
    )
    if samples.is_cuda:
        torch.cuda.synchronize(samples.device)
    seconds = time.perf_counter() - start

    if recorder is not None:
        frames = [writing.grid(frame, labels) for frame in recorder.frames()]
        writing.save_gif(options.output, frames)
    else:
        save = {".png": writing.save_grid, ".npz": writing.save_npz, "": writing.save_folder}[kind]
        save(options.output, samples, labels)
    _report(sampler, count, options.batch_size or count, seconds, options.output)


def _report(sampler: Any, count: int, batch: int, seconds: float, output: Path) -> None:
    steps = len(sampler.timesteps)
    per_step = 1000 * seconds / (steps * -(-count // batch))
    print(
        f"{count} images, {steps} steps, in {seconds:.1f} s: {count / seconds:.2f} images/s, {per_step:.2f} ms/step "
        f"at batch {min(batch, count)}\n"
        f"device {_device_name(sampler.device)}, network {str(sampler.dtype).removeprefix('torch.')}, "
        f"backend {sampler.backend}\n"
        f"wrote {output}"
    )


class _Recorder:
    """Keeps evenly spaced states of the loop for an animation, of all chunks of the batch."""

    def __init__(self, steps: int) -> None:
        self.wanted = {round(i * (steps - 1) / max(1, GIF_FRAMES - 1)) for i in range(GIF_FRAMES)} | {steps - 1}
        self.parts: dict[int, list[Any]] = {}

    def __call__(self, index: int, timestep: int, x: Any) -> None:
        if index in self.wanted:
            self.parts.setdefault(index, []).append(x.to("cpu", copy=True))

    def frames(self) -> list[Any]:
        import torch

        return [torch.cat(self.parts[index]) for index in sorted(self.parts)]


def _choose_labels(options: argparse.Namespace, config: Any) -> list[int] | None:
    """The label of every sample: those asked for in turn, else every class in equal numbers, sorted."""
    given, count = options.class_labels, options.num_samples
    if config.num_class_embeds is None:
        if given is not None:
            raise ValueError("class_labels is given, but the model has no classes")
        return None
    classes = [label for label in range(config.num_class_embeds) if label != config.null_class]
    if given is None:
        count = count or (100 if options.model is None else 16)
        return [classes[i * len(classes) // count] for i in range(count)]
    wrong = [label for label in given if label not in classes]
    if wrong:
        raise ValueError(f"class_labels has {wrong[0]}, every label must be from {classes[0]} to {classes[-1]}")
    count = count or len(given)
    return [given[i % len(given)] for i in range(count)]


def _check_output(path: Path) -> str:
    """The kind of output that `path` asks for, once it is known that it can be written."""
    kind = path.suffix.lower()
    if kind not in (".png", ".npz", ".gif", ""):
        raise ValueError(f"--output is {path}, its suffix must be .png, .npz or .gif, or none for a folder")
    if kind and path.is_dir():
        raise ValueError(f"--output is {path}, which is a folder; it must be a file to be written")
    if not kind and path.exists() and not path.is_dir():
        raise ValueError(f"--output is {path}, which is a file; without a suffix it must be a folder to be written")
    nearest = path if not kind else path.parent
    while not nearest.exists():
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"--output is {path}, which cannot be written: {error.strerror}") from None
    return kind


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
    return str(device)


def _info(options: argparse.Namespace) -> None:
    import importlib.metadata
    import platform

    import torch
    from fastddpm_kernels._backend import BACKENDS, OPS, resolve, why_not
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    versions = Table("package", "version", title="Versions", title_justify="left")
    versions.add_row("python", platform.python_version())
    for package in ("fastddpm", "torch", "triton", "numpy", "safetensors", "diffusers"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        versions.add_row(package, version)
    console.print(versions)

    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    found.append(torch.device("cpu"))
    devices = Table("device", "what it is", title="Devices", title_justify="left")
    for device in found:
        devices.add_row(str(device), _device_name(device))
    console.print(devices)

    for device_type in dict.fromkeys(device.type for device in found):
        table = Table("op", "uses", "not", title=f"Backends on {device_type}", title_justify="left")
        for op in OPS:
            chosen = resolve(op, "auto", device_type)
            others = [
                f"{name}: {why_not(name, device_type) or 'slower, on request'}" for name in BACKENDS if name != chosen
            ]
            table.add_row(op, chosen, "\n".join(others))
        console.print(table)
    interpreter = os.environ.get("TRITON_INTERPRET", "unset")
    console.print(f"CUDA graphs: not used by this version. TRITON_INTERPRET: {interpreter}")
