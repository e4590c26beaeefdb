"""Write the outputs of commands: pictures, animations, arrays and folders, each whole or not at all."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from fastddpm.sampling.trajectory import Trajectory

GIF_FRAMES = 48
INCOMPLETE = "INCOMPLETE"  # a folder has this file until all its pictures are written
_PICTURE = re.compile(r"\d{5,}(-class\d+)?\.png")


class Unfinished(Exception):
    """A command finished only a part of its work. The message says what is missing; the exit code is 1."""


class NotFinite(Unfinished):
    """Some results are not finite; the others are written."""


def add_output_options(
    parser: argparse.ArgumentParser, default: str, png: str, gif: str = "the denoising", *, trajectory: bool = True
) -> None:
    """Add --output and --trajectory; `png` and `gif` describe the content of such a file."""
    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", type=path_or_url, default=Path(default), metavar="PATH",
        help=f"its suffix says what is written: .png {png}, .npz arrays (arr_0 uint8 NHWC, arr_1 labels), .gif {gif}, "
             f"no suffix a folder of PNGs (default: {default})")  # fmt: skip
    if trajectory:
        add("--trajectory", type=Path, metavar="PATH.png",
            help="also draw how x_t and the predicted x0 of the first samples changed")  # fmt: skip
    else:
        parser.set_defaults(trajectory=None)


def path_or_url(text: str) -> Path | str:
    """Return a URL unchanged, anything else as a path."""
    return text if "://" in text else Path(text)


def check_outputs(options: argparse.Namespace) -> str:
    """Check that all files that the options name can be written, and return the suffix of --output."""
    trajectory, output = options.trajectory, options.output
    if isinstance(output, str):
        raise ValueError(f"--output is {output}, must be a path; only shards go to URLs, see --shard-size")
    if trajectory is not None:
        check_output("--trajectory", trajectory, ".png")
        if trajectory.resolve() == output.resolve():
            raise ValueError(f"--trajectory is {trajectory}, as is --output; they must be different files")
    if output.name.lower() in (".png", ".npz", ".gif"):
        raise ValueError(f"--output is {output}, must have a name before its suffix")
    kind = output.suffix.lower()
    if kind not in (".png", ".npz", ".gif", ""):
        raise ValueError(f"--output is {output}, its suffix must be .png, .npz or .gif, or none for a folder")
    check_output("--output", output)
    if kind == "" and output.is_dir() and not (output / INCOMPLETE).exists():
        held = sum(not entry.name.startswith(".") for entry in output.iterdir())
        if held:
            raise ValueError(f"--output is {output}, a folder that has {held} files; it must be empty or a new one")
    return kind


def check_output(option: str, path: Path, suffix: str | None = None) -> None:
    """Raise ValueError unless `path` has that suffix and can be written; a path without one names a folder."""
    if suffix is not None and path.suffix.lower() != suffix:
        raise ValueError(f"{option} is {path}, its suffix must be {suffix}")
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


def recording(options: argparse.Namespace, kind: str, steps: int) -> dict[str, Any]:
    """Return the argument of `Sampler.sample` that keeps the states for an animation or a strip of `steps` steps."""
    if kind != ".gif" and options.trajectory is None:
        return {}
    return {"return_trajectory": max(1, steps // GIF_FRAMES)}


def images_of(result: Tensor | Trajectory) -> tuple[Tensor, Trajectory | None]:
    """Return the final images of a call of `Sampler.sample`, on the CPU, and its trajectory if it has one."""
    from fastddpm.sampling.trajectory import Trajectory

    return (result.x[-1].cpu(), result) if isinstance(result, Trajectory) else (result.cpu(), None)


def frames_of(
    trajectory: Trajectory | None, labels: list[int] | None = None, *, columns: int | None = None
) -> list[Image.Image]:
    """Return the frames of an animation, one grid per recorded state; grey stands for values that are not finite."""
    from fastddpm.common.images import grid

    if trajectory is None:
        return []
    return [grid(x, labels, columns=columns) for x in trajectory.x.cpu().nan_to_num(nan=0.0)]


def finite_rows(images: Tensor) -> Tensor:
    """Return a mask of the images with only finite values, bool [N]."""
    return images.isfinite().flatten(1).all(dim=1)


def cells(images: Tensor) -> list[Tensor | None]:
    """Return images [N, ...] as cells of a table of pictures, None for those that are not finite."""
    return [image if ok else None for image, ok in zip(images, finite_rows(images).tolist(), strict=True)]


def write_outputs(
    options: argparse.Namespace, kind: str, images: Tensor, labels: list[int] | None, *,
    picture: Callable[[], Image.Image], frames: Callable[[], list[Image.Image]], trajectory: Trajectory | None = None,
) -> None:  # fmt: skip
    """Write --output and --trajectory; `picture` makes a .png and `frames` a .gif.

    Raises:
        NotFinite: some images are not finite; arrays and folders leave those out, the others are written.
    """
    from fastddpm.common import images as writing

    finite = finite_rows(images)
    bad = (~finite).nonzero().flatten().tolist()
    if len(bad) < len(images):
        if kind == ".png":
            writing.save_picture(options.output, picture())
        elif kind == ".gif":
            writing.save_gif(options.output, frames())
        elif kind == ".npz":
            kept = labels if labels is None else [label for label, ok in zip(labels, finite, strict=True) if ok]
            writing.save_npz(options.output, images[finite], kept)
        else:
            _write_folder(options.output, images, labels, finite.tolist())
        print(f"wrote {options.output}")
        if options.trajectory is not None and trajectory is not None:
            x0 = None if trajectory.x0 is None else trajectory.x0.nan_to_num(nan=0.0)
            strip = writing.trajectory_strip(trajectory.x.nan_to_num(nan=0.0), x0, trajectory.timesteps)
            writing.save_picture(options.trajectory, strip)
            print(f"wrote {options.trajectory}")
    if bad:
        few = ", ".join(map(str, bad[:20])) + (", ..." if len(bad) > 20 else "")
        rest = "nothing is written" if len(bad) == len(images) else "the others are written"
        raise NotFinite(f"{len(bad)} of {len(images)} images are not finite, {few}; {rest}")


def _write_folder(folder: Path, images: Tensor, labels: list[int] | None, finite: list[bool]) -> None:
    """Write a PNG per finite image; a marker file in the folder says so until the last one is written."""
    from fastddpm.common.files import write_text
    from fastddpm.common.images import save_picture, to_pil

    marker = folder / INCOMPLETE
    if marker.exists():  # a run that was killed wrote these pictures
        for entry in folder.iterdir():
            if _PICTURE.fullmatch(entry.name):
                entry.unlink()
    write_text(marker, f"{sum(finite)} pictures are being written, or were when the process ended.\n")
    digits = max(5, len(str(len(images) - 1)))
    for index in range(len(images)):
        if finite[index]:
            suffix = "" if labels is None else f"-class{labels[index]}"
            save_picture(folder / f"{index:0{digits}d}{suffix}.png", to_pil(images[index : index + 1])[0])
    marker.unlink()


def tolerant_streams() -> None:
    """Let standard output and error escape characters that their encoding lacks, such as in an ASCII terminal."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
