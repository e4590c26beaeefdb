"""What the commands share: options of the sampler, devices, outputs, and errors in one line."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from fastddpm.interop.pretrained import Pretrained
    from fastddpm.sampling.sampler import Sampler
    from fastddpm.sampling.trajectory import Trajectory

DTYPES = ("auto", "float32", "tf32", "float16", "bfloat16")
GRAPHS = ("auto", "while", "unrolled", "step", "off")
METHODS = ("ddpm", "ddim", "dpmsolver++")
BACKENDS = ("auto", "triton", "native", "eager", "reference")
SPACINGS = ("leading", "trailing", "linspace", "denoising_diffusion_pytorch", "guided_diffusion")
GIF_FRAMES = 48
# What the library calls a setting where its option is not that with dashes.
_RENAMED = {
    "num_inference_steps": "--steps",
    "timestep_spacing": "--spacing",
    "jump_n_sample": "--resamples",
    "class_labels": "--class-label",
    "flags": "--flags",
    "objective": "--flags: objective",
    "sinusoidal_pos_emb_theta": "--flags: sinusoidal_pos_emb_theta",
    "mask": "--fill",
    "low": "INPUT",
    "images": "INPUT",
}


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def one_line(error: BaseException, options: argparse.Namespace) -> str:
    """The message of an error in terms of the command line."""
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # The library speaks of its arguments; here they are options.
    match = re.match(r"(\w+)(?= (?:is(?! no flag)|are|has|needs|reaches) )", message)
    if match and match[1] in vars(options):
        message = "--" + match[1].replace("_", "-") + message[match.end() :]
    elif match and match[1] in _RENAMED:
        message = _RENAMED[match[1]] + message[match.end() :]
    return message


def integer(least: int) -> Callable[[str], int]:
    """A type for an option: an integer of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {least}")
        return value

    return parse


def integers(text: str) -> list[int]:
    """A type for an option: integers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be integers separated by commas, such as 3,1,4") from None


def seconds(text: str) -> float:
    """A type for an option: a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive number of seconds")
    return value


def share(text: str) -> float:
    """A type for an option: a number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number in (0, 1]")
    return value


def shares(text: str) -> list[float]:
    """A type for an option: numbers in (0, 1] separated by commas."""
    return [share(part) for part in text.split(",")]


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else integer(1)(text)


def _steps(text: str) -> int | str:
    return text if re.fullmatch(r"ddim\d+|\d+(,\d+)+", text) else integer(1)(text)


def add_sampler_options(parser: argparse.ArgumentParser, *, steps: int | None, method: str | None, seed: int) -> None:
    """Adds the options that every command which runs a model has; `steps`, `method` and `seed` are its defaults."""
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--steps",
        type=_steps,
        metavar="S",
        help="sampling steps; for --spacing guided_diffusion also such as ddim25 or 10,10,5 "
        f"(default: {'all trained ones' if steps is None else steps})",
    )
    parser.set_defaults(default_steps=steps)
    group.add_argument("--timesteps", type=integers, metavar="T,T,...", help="the very timesteps to visit, falling")
    group.add_argument(
        "--spacing",
        choices=SPACINGS,
        help="of the steps over the trained ones (default: the model's, usually leading)",
    )
    default = method or "the model's, usually ddpm"
    group.add_argument("--method", choices=METHODS, default=method, help=f"sampler (default: {default})")
    group.add_argument("--eta", type=float, help="share of DDPM's noise in ddim (default: 0)")
    group.add_argument("--guidance-scale", type=float, metavar="W", help="classifier-free guidance (default: none)")
    group.add_argument(
        "--thresholding", action="store_true", help="clip the predicted image at a quantile of its own instead of at 1"
    )
    group.add_argument(
        "--seed",
        type=integer(0),
        default=seed,
        help=f"sample k of a seed is always the same image (default: {seed})",
    )
    group.add_argument(
        "--batch-size",
        type=_batch_size,
        default="auto",
        metavar="B",
        help="samples at once, or auto: as many as fit and are fastest, measured (default: auto)",
    )
    group.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the first of these that there is)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the network (default: auto, float16 on cuda, or bfloat16 where float16 would overflow; else float32)",
    )
    group.add_argument(
        "--cuda-graph",
        choices=GRAPHS,
        default="auto",
        help="how the loop is captured on cuda: as one launch, several steps or one step (default: auto, measured)",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="of the fused ops (default: auto)",
    )


def add_output_options(
    parser: argparse.ArgumentParser, default: str, png: str, gif: str = "the denoising", *, trajectory: bool = True
) -> None:
    """Adds --output and --trajectory; `png` and `gif` say what such a file shows."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(default),
        metavar="PATH",
        help=f"by its suffix: .png {png}, .npz arrays (arr_0 uint8 NHWC, arr_1 labels), .gif {gif}, no suffix a "
        f"folder of PNGs (default: {default})",
    )
    if trajectory:
        group.add_argument(
            "--trajectory",
            type=Path,
            metavar="PATH.png",
            help="also draw how x_t and the predicted x0 of the first samples changed",
        )
    else:
        parser.set_defaults(trajectory=None)


def make_sampler(options: argparse.Namespace, model: Pretrained, **overrides: Any) -> Sampler:
    """The `Sampler` that the options ask for."""
    device = options.device or best_device()
    steps = options.steps or options.default_steps
    if options.timesteps is not None:
        steps = options.steps  # both given: the sampler says so
        if options.spacing is not None:
            raise ValueError("--timesteps is given and so is --spacing; explicit timesteps have no spacing")
    chosen = {
        "num_inference_steps": steps,
        "timesteps": options.timesteps,
        "timestep_spacing": options.spacing,
        "method": options.method,
        "eta": options.eta,
        "guidance_scale": options.guidance_scale,
        "thresholding": options.thresholding or None,
        **overrides,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    graph = False if options.cuda_graph == "off" else options.cuda_graph
    fixed = {"device": device, "dtype": options.dtype or "auto", "backend": options.backend, "cuda_graph": graph}
    return model.sampler(**{**fixed, **chosen})


def check_outputs(options: argparse.Namespace) -> str:
    """The kind of output asked for, once it is known that all that is asked for can be written."""
    trajectory = options.trajectory
    if trajectory is not None:
        if trajectory.suffix.lower() != ".png":
            raise ValueError(f"--trajectory is {trajectory}, its suffix must be .png")
        check_output("--trajectory", trajectory)
        if trajectory.resolve() == options.output.resolve():
            raise ValueError(f"--trajectory is {trajectory}, as is --output; they must be different files")
    if options.output.name.lower() in (".png", ".npz", ".gif"):
        raise ValueError(f"--output is {options.output}, must have a name before its suffix")
    kind = options.output.suffix.lower()
    if kind not in (".png", ".npz", ".gif", ""):
        raise ValueError(f"--output is {options.output}, its suffix must be .png, .npz or .gif, or none for a folder")
    check_output("--output", options.output)
    return kind


def check_output(option: str, path: Path) -> None:
    if path.suffix and path.is_dir():
        raise ValueError(f"{option} is {path}, which is a folder; it must be a file to be written")
    if not path.suffix and path.exists() and not path.is_dir():
        raise ValueError(f"{option} is {path}, which is a file; without a suffix it must be a folder to be written")
    nearest = path if not path.suffix else path.parent
    while not nearest.exists():
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{option} is {path}, which cannot be written: {error.strerror}") from None


def classes_of(config: Any) -> list[int]:
    """The classes of a model, without the one that means none."""
    if config.num_class_embeds is None:
        return []
    return [label for label in range(config.num_class_embeds) if label != config.null_class]


def check_labels(
    labels: list[int] | None, config: Any, *, name: str = "--class-labels has", each: str = "every label "
) -> None:
    """Raises ValueError unless all labels are classes of the model; `name` and `each` word it."""
    if not labels:
        return
    classes = classes_of(config)
    if not classes:
        raise ValueError(f"{name} {labels[0]}, but the model has no classes")
    if wrong := [label for label in labels if label not in classes]:
        raise ValueError(f"{name} {wrong[0]}, {each}must be from {classes[0]} to {classes[-1]}")


def best_device() -> str:
    """The device that is used unless another is named."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_name(device: Any) -> str:
    """A device with the name of its hardware."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
    return str(device)


def recording(options: argparse.Namespace, kind: str, steps: int) -> dict[str, Any]:
    """The argument of `Sampler.sample` that keeps what an animation or a strip of `steps` steps shows, if one is."""
    if kind != ".gif" and options.trajectory is None:
        return {}
    return {"return_trajectory": max(1, steps // GIF_FRAMES)}


def images_of(result: Tensor | Trajectory) -> tuple[Tensor, Trajectory | None]:
    """The images that a call of `Sampler.sample` ended in, on the CPU, and its trajectory if it returned one."""
    from fastddpm.sampling.trajectory import Trajectory

    return (result.x[-1].cpu(), result) if isinstance(result, Trajectory) else (result.cpu(), None)


def frames_of(
    trajectory: Trajectory | None, labels: list[int] | None = None, *, columns: int | None = None
) -> list[Image.Image]:
    """The pictures of an animation, a grid each."""
    from fastddpm.common.images import grid

    return [] if trajectory is None else [grid(x, labels, columns=columns) for x in trajectory.x.cpu()]


def write_outputs(
    options: argparse.Namespace,
    kind: str,
    images: Tensor,
    labels: list[int] | None,
    *,
    picture: Callable[[], Image.Image],
    frames: Callable[[], list[Image.Image]],
    trajectory: Trajectory | None = None,
) -> None:
    """Writes what --output asks for, made by `picture` or `frames` if it is a .png or .gif, and --trajectory."""
    from fastddpm.common import images as writing

    if kind == ".png":
        writing.save_picture(options.output, picture())
    elif kind == ".gif":
        writing.save_gif(options.output, frames())
    elif kind == ".npz":
        writing.save_npz(options.output, images, labels)
    else:
        writing.save_folder(options.output, images, labels)
    print(f"wrote {options.output}")
    if options.trajectory is not None and trajectory is not None:
        strip = writing.trajectory_strip(trajectory.x, trajectory.x0, trajectory.timesteps)
        writing.save_picture(options.trajectory, strip)
        print(f"wrote {options.trajectory}")


def report_device(sampler: Sampler) -> None:
    """Says what ran where."""
    network = str(sampler.dtype).removeprefix("torch.")
    backend = sampler.network.frozen.backend if sampler.network.frozen else sampler.backend
    line = f"device {device_name(sampler.device)}, network {network}, backend {backend}"
    report = sampler.graph_report()
    if sampler.device.type == "cuda":
        line += f", loop {report['mode']}" + (f" ({report['why_not']})" if report["why_not"] else "")
    print(line)
