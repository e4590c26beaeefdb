"""The sampler of a `SuperResModel`, which takes the small images when it samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastddpm.sampling.editing import super_resolution
from fastddpm.sampling.sampler import Sampler


class Upsampler(Sampler):
    """A `Sampler` for a network that reads x and the small images, enlarged."""

    def sample(self, num_samples: int, *, low_res: Tensor | None = None, **arguments: Any) -> Any:  # type: ignore[override]
        """Draw large images from small ones.

        Args:
            num_samples: N.
            low_res: float [N, C, h, w] in [-1, 1], or [1, C, h, w] for all; enlarged as `SuperResModel` does
                (bilinear).
            **arguments: of `Sampler.sample`. `condition` may replace `low_res`; `shape` must not come with `low_res`.

        Returns:
            What `Sampler.sample` returns: float32 [N, C, H, W] in [-1, 1].

        Raises:
            ValueError, TypeError: `low_res` is missing, or has another number of images or of channels.
        """
        if low_res is None:
            if arguments.get("condition") is None:
                raise ValueError("low_res is None, must be given: the small images [N, C, h, w] that are enlarged")
            return super().sample(num_samples, **arguments)
        for name in ("condition", "shape"):
            if arguments.get(name) is not None:
                raise ValueError(f"{name} is given along with low_res, must be one of them")
        if isinstance(low_res, Tensor) and low_res.ndim == 4 and len(low_res) == 1:
            low_res = low_res.expand(num_samples, -1, -1, -1)
        if isinstance(low_res, Tensor) and low_res.ndim == 4 and len(low_res) != num_samples:
            raise ValueError(f"low_res has {len(low_res)} images, must have num_samples, {num_samples}, or 1")
        arguments.pop("shape", None)
        arguments.pop("condition", None)
        return super_resolution(self, low_res, interpolation="bilinear", **arguments)
