"""Tasks that start from images: change, fill in, interpolate, encode, enlarge.

All of them call `Sampler.sample` with another start, another table or more input; the loop and the kernels are the
same. Images are float [N, ...] in the range that the model was trained on: [-1, 1] for pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from fastddpm_kernels import philox
from fastddpm_kernels.q_sample import q_sample
from torch import Tensor
from torch.nn import functional

from fastddpm.common import checks
from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import ddim_inversion_table
from fastddpm.sampling.sampler import Sampler


@torch.no_grad()
def image_to_image(
    sampler: Sampler,
    images: Tensor,
    strength: float = 0.5,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> Any:
    """Noise images part of the way and denoise them again (SDEdit, Meng et al. 2022).

    A small strength keeps coarse structure; a larger one keeps less of it. The last round(strength * S) of S sampling
    steps are run, at least one.

    Args:
        sampler: any.
        images: float [N, ...].
        strength: in (0, 1]. At 1 nothing of the images is left: the result is that of sampling from scratch.
        seed, seeds: as for `Sampler.sample`.
        **options: further arguments of `Sampler.sample`, such as class_labels, batch_size or progress.

    Returns:
        What `Sampler.sample` returns: float32 [N, ...].

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong shape or type.
    """
    images = _check_images(sampler, images, "images")
    start = _start(sampler, strength)
    if start == 0:
        return sampler.sample(len(images), shape=images.shape[1:], seed=seed, seeds=seeds, **options)
    noise = _normal(sampler, images, seed, seeds)
    x = _noised(images, sampler.table.skip(start).start, noise)
    return sampler.sample(len(images), x_T=x, **_rest(sampler, start), seed=seed, seeds=seeds, **options)


@torch.no_grad()
def inpaint(
    sampler: Sampler,
    images: Tensor,
    mask: Tensor,
    *,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    **options: Any,
) -> Any:
    """Fill in the part of images that a mask leaves open, with resampling (RePaint, Lugmayr et al. 2022, algorithm 1).

    At every step the image noised to that step's level replaces the known part. To make the filled-in part agree with
    it, the loop goes back up by `jump_length` steps and down again, at every `jump_length`-th step, `jump_n_sample`
    times in all. This costs about `jump_n_sample` times the evaluations.

    Args:
        sampler: of method "ddpm", or of any if `jump_n_sample` is 1.
        images: float [N, ...]; their values where the mask is 0 are not used.
        mask: broadcastable to the images, from 0 to 1: 1 keeps, 0 fills in.
        jump_length: steps of a jump, fewer than there are.
        jump_n_sample: how often each stretch is sampled, at least 1; 1 means no resampling.
        **options: further arguments of `Sampler.sample`.

    Returns:
        What `Sampler.sample` returns: float32 [N, ...], equal to the images where the mask is 1 (noised to the level
        that the sampler ends at, where that is not the clean one).

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong shape or type, or `jump_n_sample` is above
            1 for a method other than "ddpm", or with too few steps for a jump.
    """
    images = _to_float(sampler, images, "images")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is of {type(mask).__name__}, must be a tensor")
    mask = mask.to(sampler.device, torch.float32)
    try:
        known = mask.broadcast_to(images.shape) > 0
    except RuntimeError:
        raise ValueError(
            f"mask has shape {list(mask.shape)} and images {list(images.shape)}; the mask must broadcast to the images"
        ) from None
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("mask has values outside [0, 1], must be 1 where images are kept and 0 where not")
    images = _check_images(sampler, torch.where(known, images, 0.0), "images")
    checks.positive(jump_length, "jump_length")
    if checks.positive(jump_n_sample, "jump_n_sample") > 1:
        if "table" in options:
            raise ValueError(f"table is given and jump_n_sample is {jump_n_sample}, which makes a table of its own")
        if sampler.method != "ddpm":
            raise ValueError(
                f"jump_n_sample is {jump_n_sample} but method is {sampler.method!r}; only 'ddpm' resamples, "
                "other methods need jump_n_sample 1"
            )
        if jump_length >= len(sampler.timesteps):
            raise ValueError(
                f"jump_length is {jump_length} but there are {len(sampler.timesteps)} steps; with jump_n_sample "
                f"{jump_n_sample} it must be less"
            )
        options["table"] = repaint_table(
            _schedule(sampler, "resampling"),
            sampler.timesteps,
            jump_length=jump_length,
            jump_n_sample=jump_n_sample,
            prediction_type=sampler.prediction_type,
            variance_type=sampler.variance_type,
        )
    return sampler.sample(len(images), shape=images.shape[1:], known=images, known_mask=mask, **options)


@torch.no_grad()
def encode(sampler: Sampler, images: Tensor, *, strength: float = 1.0, **options: Any) -> Any:
    """Return the noise that a deterministic sampler turns into these images (Song et al. 2021, section 4.3).

    Decode with `sampler.sample(n, x_T=latents)`. The two are inverse up to the error of the steps, which falls with
    their number. This fails if x0 is clipped on the way: give the sampler clip_sample=False.

    Args:
        sampler: of a method without noise: "ddim" with eta 0, or "dpmsolver++".
        images: float [N, ...].
        strength: how far up, as for `image_to_image`; 1 is all the way to noise.
        **options: further arguments of `Sampler.sample`.

    Returns:
        What `Sampler.sample` returns: float32 [N, ...], about standard normal for strength 1.

    Raises:
        ValueError, TypeError: as for `image_to_image`, or the sampler adds noise.
    """
    images = _check_images(sampler, images, "images")
    start = _start(sampler, strength)
    _check_deterministic(sampler, "encoding")
    begins = _begins(sampler)
    # Without noise, x and x0 do not determine epsilon: a model of x0 must start at the level of timestep 0.
    clean = float(sampler.table.levels[-1, 1]) == 0 and sampler.prediction_type != "sample"
    table = ddim_inversion_table(
        _schedule(sampler, "encoding"),
        [timestep for row, timestep in enumerate(sampler.timesteps.tolist()) if row >= start and row in begins],
        prediction_type=sampler.prediction_type,
        set_alpha_to_one=clean,
    )
    return sampler.sample(len(images), x_T=images, table=table, **options)


@torch.no_grad()
def interpolate(
    sampler: Sampler,
    a: Tensor,
    b: Tensor,
    steps: int = 8,
    *,
    via: Literal["encode", "noise"] = "encode",
    strength: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Return a path of images from `a` to `b`.

    via "encode": both are encoded to noise, which is interpolated on the sphere and decoded (Song et al. 2021,
    fig. 6). The ends are the reconstructions of `a` and `b`: close to them with clip_sample=False. via "noise": both
    get the same noise, are mixed linearly, and are denoised with equal noise for every image of the path (Ho et al.
    2020, fig. 8). The noise is the same because a mean of two noises has a lower level than denoising starts from.

    Args:
        sampler: for "encode" of a method without noise ("ddim" with eta 0, or "dpmsolver++"); for "noise" any.
        a, b: float [N, ...], the pairs.
        steps: images of a path, both ends among them, at least 2.
        via: "encode" or "noise".
        strength: how much noise, as for `image_to_image`; by default 1 for "encode" and 0.5 for "noise", where less
            stays closer to `a` and `b`.
        seed: pair k is drawn with seed + k; without effect on "encode".
        **options: further arguments of `Sampler.sample`, such as batch_size; class_labels: one, or one per pair.

    Returns:
        float32 [N, steps, ...].

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong shape or type, or the sampler adds noise
            and `via` is "encode".
    """
    a, b = _check_images(sampler, a, "a"), _check_images(sampler, b, "b")
    if a.shape != b.shape:
        raise ValueError(f"a has shape {list(a.shape)} and b {list(b.shape)}, must be the same")
    if checks.positive(steps, "steps") < 2:
        raise ValueError(f"steps is {steps}, must be at least 2: both ends")
    if via not in ("encode", "noise"):
        raise ValueError(f"via is {via!r}, must be 'encode' or 'noise'")
    if "return_trajectory" in options:
        raise TypeError("interpolate takes no return_trajectory: two loops run, and their result is a path")
    strength = strength if strength is not None else 1.0 if via == "encode" else 0.5
    start = _start(sampler, strength)
    weights = torch.linspace(0, 1, steps, dtype=torch.float64)
    pairs = len(a)
    labels = options.pop("class_labels", None)
    if labels is not None and (labels := torch.as_tensor(labels)).ndim == 0:
        labels = labels.expand(pairs)
    seeds = [seed, *((seed + pair) % 2**64 for pair in range(1, pairs))]

    if via == "encode":
        _check_deterministic(sampler, "interpolation via 'encode'")
        both = None if labels is None else torch.cat([labels, labels])
        ends = encode(sampler, torch.cat([a, b]), strength=strength, class_labels=both, **options)
        path = slerp(ends[:pairs], ends[pairs:], weights)
    else:
        mixed = torch.stack([torch.lerp(a, b, float(weight)) for weight in weights], dim=1)
        noise = _normal(sampler, a, 0, seeds)[:, None].expand_as(mixed)
        path = _noised(mixed.flatten(0, 1), sampler.table.skip(start).start, noise.flatten(0, 1))
        path = path.unflatten(0, (pairs, steps))
    images = sampler.sample(
        pairs * steps,
        x_T=path.flatten(0, 1),
        **_rest(sampler, start),
        seeds=[value for value in seeds for _ in range(steps)],
        class_labels=None if labels is None else labels.repeat_interleave(steps),
        **options,
    )
    return images.unflatten(0, (pairs, steps))


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Interpolate on the sphere, along the arc between two vectors, which keeps the norm of noise (Shoemake 1985).

    Args:
        a, b: float [N, ...]; each of the N is one vector.
        weights: [K], 0 for `a`, 1 for `b`.

    Returns:
        [N, K, ...] in the dtype of `a`; linear where the vectors are parallel or one is zero.
    """
    x, y = a.flatten(1), b.flatten(1)
    norms = (x.norm(dim=1) * y.norm(dim=1)).double().cpu()  # MPS has no float64
    cosine = (x * y).sum(1).double().cpu() / norms.clamp_min(1e-300)
    angle = cosine.clamp(-1, 1).acos()[:, None]
    w = weights.double().cpu().view(1, -1)
    curved = (angle.sin() > 1e-3) & (norms[:, None] > 0)
    sine = torch.where(curved, angle.sin(), 1.0)
    from_a = torch.where(curved, ((1 - w) * angle).sin() / sine, 1 - w)[:, :, None].to(a)
    from_b = torch.where(curved, (w * angle).sin() / sine, w)[:, :, None].to(a)
    return (from_a * x[:, None] + from_b * y[:, None]).unflatten(2, a.shape[1:])


@torch.no_grad()
def super_resolution(
    sampler: Sampler,
    low: Tensor,
    size: tuple[int, int] | None = None,
    *,
    noise_level: float = 0.0,
    interpolation: str = "bicubic",
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> Any:
    """Enlarge images with a model that was trained to read the small ones (SR3, Saharia et al. 2021).

    `low` is enlarged (not clipped) and given to the network as further channels beside x_t. The bundled
    model in `assets/digits_upscale`, of `examples/train_upscale.py`, was trained that way.

    Args:
        sampler: of a model with as many more input channels than output channels as `low` has channels.
        low: float [N, C, h, w] in [-1, 1].
        size: (H, W) of the result; None for the model's sample_size.
        noise_level: standard deviation of Gaussian noise added to `low` first (Ho et al. 2021, "Cascaded diffusion
            models"), no more than in training: it hides flaws of `low` from the network.
        interpolation: how `low` is enlarged, as the model was trained: "bicubic", or "bilinear" for guided-diffusion's.
        seed, seeds: as for `Sampler.sample`.
        **options: further arguments of `Sampler.sample`.

    Returns:
        What `Sampler.sample` returns: float32 [N, channels of the network's output, H, W].

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong shape or type, or the model does not take
            `low`'s channels beside its own.
    """
    low = _check_images(sampler, low, "low")
    if low.ndim != 4:
        raise ValueError(f"low has shape {list(low.shape)}, must be [N, C, h, w]")
    if isinstance(noise_level, bool) or not isinstance(noise_level, int | float) or not 0 <= noise_level < float("inf"):
        raise ValueError(f"noise_level is {noise_level!r}, must be a finite number of at least 0")
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation is {interpolation!r}, must be 'bicubic' or 'bilinear'")
    reads, draws = (getattr(sampler.config, name, None) for name in ("in_channels", "out_channels"))
    if draws is not None and sampler.settings.learned_variance:
        draws //= 2
    channels = low.shape[1] if draws is None else draws
    if reads is not None and reads != channels + low.shape[1]:
        raise ValueError(
            f"low has {low.shape[1]} channels but the model reads {reads} and draws {draws}; "
            "it must read those of low beside its own"
        )
    sample_size = getattr(sampler.config, "sample_size", None)
    if size is None:
        if sample_size is None:
            raise ValueError("size is None, must be given: the model has no config with sample_size")
        size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    if noise_level > 0:
        noise = _normal(sampler, low, seed, seeds, stream=philox.STREAM_Q_SAMPLE)
        low = _noised(low, (1.0, noise_level), noise)
    condition = functional.interpolate(low, size=size, mode=interpolation, align_corners=False)
    return sampler.sample(len(low), shape=(channels, *size), condition=condition, seed=seed, seeds=seeds, **options)


def _start(sampler: Sampler, strength: float) -> int:
    """Return the row of the table at which the last round(strength * S) of S steps begin."""
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ValueError(f"strength is {strength!r}, must be in (0, 1]")
    begins = _begins(sampler)
    return begins[len(begins) - max(1, round(strength * len(begins)))]


def _begins(sampler: Sampler) -> Sequence[int]:
    """Return the rows of the table at which a step begins."""
    return sampler.table.begins or range(len(sampler.table))


def _rest(sampler: Sampler, start: int) -> dict[str, Any]:
    """Return the arguments of `Sampler.sample` for the rows from `start` on."""
    rest = sampler.table.skip(start)
    # "plms" begins with one evaluation more, so that its rows are no longer those of the whole loop.
    return {"start": start} if len(rest) == len(sampler.table) - start else {"table": rest}


def _normal(
    sampler: Sampler,
    images: Tensor,
    seed: int,
    seeds: Sequence[int] | None,
    *,
    stream: int = philox.STREAM_INITIAL,
) -> Tensor:
    """Return noise of the images' shape; by default that from which the sampler starts from scratch."""
    count = len(images)
    if seeds is not None and len(seeds) != count:
        raise ValueError(f"seeds has {len(seeds)} entries, must have one per image, {count}")
    given, indices = ([seed] * count, range(count)) if seeds is None else (list(seeds), [0] * count)
    keys = philox.sample_keys(given, indices, device=sampler.device)
    return philox.normal(keys, images.shape[1:], step=0, stream=stream, backend=sampler.backend)


def _noised(images: Tensor, level: tuple[float, float], noise: Tensor) -> Tensor:
    """Return signal * images + sigma * noise for a level (signal, sigma)."""
    table = torch.tensor([level], dtype=torch.float32, device=images.device)
    rows = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return q_sample(images, table, rows, noise=noise)[0]


def _check_deterministic(sampler: Sampler, task: str) -> None:
    if bool((sampler.table.rows[:, 6] != 0).any()) or sampler.table.log_variance is not None:
        raise ValueError(
            f"method is {sampler.method!r} with noise at its steps, but {task} needs one without: 'ddim' with eta 0 "
            "or 'dpmsolver++'"
        )
    if bool((sampler.timesteps != sampler.timesteps.round()).any()):
        raise ValueError(
            f"method is {sampler.method!r} with timesteps between integers, but {task} needs integers, as of 'ddim' or "
            "'dpmsolver++'"
        )


def _schedule(sampler: Sampler, task: str) -> NoiseSchedule:
    if sampler.schedule is None:
        raise ValueError(f"sampler was made of a StepTable, but {task} needs one made of a NoiseSchedule")
    return sampler.schedule


def _check_images(sampler: Sampler, images: Tensor, name: str) -> Tensor:
    """Return the images in float32 where the sampler runs."""
    images = _to_float(sampler, images, name)
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"{name} has shape {list(images.shape)}, must be [N, ...] with at least one sample")
    if not bool(images.isfinite().all()):
        raise ValueError(f"{name} is not finite everywhere")
    bound = 1.0 if sampler.settings.threshold is not None else sampler.settings.clip_range
    if bound is not None and (reach := float(images.abs().max())) > bound * 1.001:
        raise ValueError(
            f"{name} reaches {reach:g} but clip_sample_range is {bound:g}: images must be in [{-bound:g}, {bound:g}]"
        )
    return images


def _to_float(sampler: Sampler, images: Tensor, name: str) -> Tensor:
    if not isinstance(images, Tensor) or not images.dtype.is_floating_point:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name} is of {kind}, must be a floating-point tensor")
    return images.to(sampler.device, torch.float32).contiguous()
