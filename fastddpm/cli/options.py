"""Code that commands share: options of the sampler, devices, classes, and errors in one line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from fastddpm.common.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from fastddpm.interop.pretrained import Pretrained
    from fastddpm.sampling.sampler import Sampler

DTYPES = ("auto", "float32", "tf32", "float16", "bfloat16")
GRAPHS = ("auto", "while", "unrolled", "step", "off")
METHOD_HELP = "ddpm, ddim, dpmsolver++, unipc, euler, heun and others"
BACKENDS = ("auto", "triton", "native", "eager", "reference")
SPACINGS = ("leading", "trailing", "linspace", "denoising_diffusion_pytorch", "guided_diffusion")
DEVICE_HELP = "cuda, cuda:1, mps, cpu (default: the first of these that this machine has)"
# Options with a name that is not the library's argument with dashes.
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
    "text_encoder": "--captions",
}


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def one_line(error: BaseException, options: argparse.Namespace) -> str:
    """Return an error's message in one line, in the words of the command line."""
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    for value in vars(options).values():  # names that were given may have line breaks
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str | os.PathLike) and str(name):
                message = message.replace(str(name), printable(str(name)))
    message = printable(message.splitlines()[0])
    # The library's message names an argument, but the user typed an option.
    match = re.match(r"(\w+)(?= (?:is(?! no flag)|are|has|needs|reaches) )", message)
    if match and match[1] in vars(options):
        message = "--" + match[1].replace("_", "-") + message[match.end() :]
    elif match and match[1] in _RENAMED:
        message = _RENAMED[match[1]] + message[match.end() :]
    return message


# -- types of options -------------------------------------------------------------------------------------------------


def parsed(read: Callable[[str], Any], what: str, valid: Callable[[Any], bool] = lambda value: True) -> Any:
    """Return a type for an option that is `read` from text; if it is not `valid`, the error says `what` it must be."""

    def parse(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            pass
        else:
            if valid(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")

    return parse


def integer(least: int) -> Callable[[str], int]:
    """Return a type for an option: an integer of at least `least`."""
    return parsed(int, f"an integer of at least {least}", lambda value: value >= least)


a_seed = parsed(int, "an integer from 0 to 2**64 - 1", lambda value: 0 <= value < 2**64)
integers = parsed(lambda text: [int(part) for part in text.split(",")], "integers separated by commas, such as 3,1,4")
seconds = parsed(float, "a positive number of seconds", lambda value: 0 < value < float("inf"))
share = parsed(float, "a number in (0, 1]", lambda value: 0 < value <= 1)


def shares(text: str) -> list[float]:
    """Parse numbers in (0, 1] separated by commas."""
    return [share(part) for part in text.split(",")]


def method_name(text: str) -> str:
    """Check the name of a sampling method."""
    from fastddpm.process.methods import METHODS  # here, because it imports torch

    if text not in METHODS:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(METHODS)}")
    return text


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else integer(1)(text)


def _steps(text: str) -> int | str:
    return text if re.fullmatch(r"ddim\d+|\d+(,\d+)+", text) else integer(1)(text)


# -- options of several commands --------------------------------------------------------------------------------------


def add_sampler_options(parser: argparse.ArgumentParser, *, steps: int | None, method: str | None, seed: int) -> None:
    """Add the sampler's options; `steps`, `method` and `seed` are their defaults in this command."""
    add = parser.add_argument_group("sampler").add_argument
    default = "all trained ones" if steps is None else steps
    add("--steps", type=_steps, metavar="S",
        help="sampling steps; --spacing guided_diffusion also takes counts such as ddim25 or 10,10,5 "
             f"(default: {default})")  # fmt: skip
    parser.set_defaults(default_steps=steps)
    add("--timesteps", type=integers, metavar="T,T,...", help="the exact timesteps to visit, falling")
    add("--spacing", choices=SPACINGS,
        help="how the steps are spaced over the trained ones (default: the method's or the model's)")  # fmt: skip
    add("--method", type=method_name, default=method, metavar="NAME",
        help=f"{METHOD_HELP} (default: {method or 'of the model, usually ddpm'})")  # fmt: skip
    add("--eta", type=float, help="share of DDPM's noise in ddim (default: 0) and euler_a (default: 1)")
    add("--guidance-scale", type=float, metavar="W", help="scale of classifier-free guidance (default: none)")
    add("--thresholding", action="store_true",
        help="clip each predicted image at a quantile of its own pixels instead of at 1")  # fmt: skip
    add("--seed", type=a_seed, default=seed, help=f"sample k of a seed is always the same image (default: {seed})")
    add("--batch-size", type=_batch_size, default="auto", metavar="B",
        help="samples at once; auto measures which of the sizes that fit is fastest (default: auto)")  # fmt: skip
    add("--device", help=DEVICE_HELP)
    add("--dtype", choices=DTYPES,
        help="of the network (default: auto, float16 on cuda, or bfloat16 where float16 overflows; else float32)",
        )  # fmt: skip
    add("--weight-dtype", choices=("float16",),
        help="how a network in float32 on the CPU stores its weights (default: float32)")  # fmt: skip
    add("--cuda-graph", choices=GRAPHS, default="auto",
        help="how the loop is captured on cuda: as one launch, several steps or one step (default: auto, measured)",
        )  # fmt: skip
    add("--backend", choices=BACKENDS, default="auto", help="of the fused ops (default: auto)")


def make_sampler(options: argparse.Namespace, model: Pretrained, **overrides: Any) -> Sampler:
    """Make the `Sampler` that the options ask for."""
    steps = options.steps or options.default_steps
    if options.timesteps is not None:
        steps = options.steps  # the sampler raises if both are given
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
        "weight_dtype": options.weight_dtype,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    graph = False if options.cuda_graph == "off" else options.cuda_graph
    device, dtype = options.device or best_device(), options.dtype or "auto"
    fixed = {"device": device, "dtype": dtype, "backend": options.backend, "cuda_graph": graph}
    return model.sampler(**{**fixed, **chosen, **overrides})


# -- classes ----------------------------------------------------------------------------------------------------------


def classes_of(config: Any) -> list[int]:
    """Return the classes of a model, without the null class."""
    if config.num_class_embeds is None:
        return []
    return [label for label in range(config.num_class_embeds) if label != config.null_class]


def labels_in_turn(model: Pretrained, count: int) -> list[int] | None:
    """Return `count` labels, the trained ones repeated in turn; None if the model has no classes."""
    classes = model.labels()
    return [classes[i % len(classes)] for i in range(count)] if classes else None


def check_labels(
    labels: list[int] | None, config: Any, *, name: str = "--class-labels has", each: str = "every label "
) -> None:
    """Raise ValueError unless all labels are classes of the model; `name` and `each` are words of the message."""
    if not labels:
        return
    classes = classes_of(config)
    if not classes:
        raise ValueError(f"{name} {labels[0]}, but the model has no classes")
    if wrong := [label for label in labels if label not in classes]:
        raise ValueError(f"{name} {wrong[0]}, {each}must be from {classes[0]} to {classes[-1]}")


# -- devices and reports ----------------------------------------------------------------------------------------------


def best_device() -> str:
    """Return the name of the default device."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def chosen_device(options: argparse.Namespace) -> Any:
    """Return --device, or the best device, as a `torch.device` that can be used."""
    from fastddpm.networks.network import usable_device

    return usable_device(options.device or best_device())


def device_name(device: Any) -> str:
    """Return a device with the name of its hardware."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
    return str(device)


def report_device(sampler: Sampler) -> None:
    """Print the device, the network's precision, the backend and the loop that ran."""
    network = str(sampler.dtype).removeprefix("torch.")
    backend = sampler.network.frozen.backend if sampler.network.frozen else sampler.backend
    line = f"device {device_name(sampler.device)}, network {network}, backend {backend}"
    report = sampler.graph_report()
    if sampler.device.type == "cuda":
        line += f", loop {report['mode']}" + (f" ({report['why_not']})" if report["why_not"] else "")
    print(line)


def wide_console() -> Console:
    """Return a console for tables, as wide as the terminal, or 140 columns in a file or pipe."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich calls this where it has caught the error, and would exit with code 1

    return Piped(width=None if sys.stdout is not None and sys.stdout.isatty() else 140)


def plain(console: Console, text: str) -> None:
    """Print text unchanged; rich would colour numbers and read brackets as markup."""
    console.print(text, markup=False, highlight=False)
