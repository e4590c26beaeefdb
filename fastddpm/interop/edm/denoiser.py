"""A preconditioner of EDM or PhysicsNeMo with its library's samplers as methods."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm.common import checks
from fastddpm.interop.edm.accelerated import Accelerated, Options, Seeds
from fastddpm.interop.edm.network import EDMNetwork, channels_of, with_positions
from fastddpm.interop.edm.tables import LINEAR, Churn, Walk, ablation_walk, edm_walk, walk
from fastddpm.interop.shared import StepNoise
from fastddpm.networks.comparing import difference, evaluating, some_noise
from fastddpm.sampling.sampler import Sampler

RandnLike = Callable[[Tensor], Tensor]


class AcceleratedDenoiser(Accelerated):
    """A preconditioner with its library's samplers as methods; called as a function, it is the original.

    The methods take the library's arguments without the network. Random numbers are drawn in the library's order, by
    the functions and from the generators it draws from; the results are the library's to rounding. The state is float32
    where EDM's is float64.
    """

    methods = ("edm_sampler", "ablation_sampler", "stochastic_sampler", "deterministic_sampler", "generate")

    def __init__(self, net: Any, options: Options) -> None:
        super().__init__(net, options)
        self._sampler: Sampler | None = None
        self._made_of: tuple[object, ...] = ()
        self._walks: dict[tuple[Any, ...], Walk] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return what the original returns."""
        return self.net(*arguments, **named)

    # -- EDM ------------------------------------------------------------------------------------------------------

    def edm_sampler(
        self, latents: Tensor, class_labels: Tensor | None = None, randn_like: RandnLike = torch.randn_like,
        num_steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80, rho: float = 7, S_churn: float = 0,
        S_min: float = 0, S_max: float = math.inf, S_noise: float = 1,
    ) -> Tensor:  # fmt: skip
        """Draw images from latents, as EDM's `edm_sampler(net, ...)` (Karras et al. 2022, algorithm 2).

        Args:
            latents: N(0, 1), [N, C, H, W].
            class_labels: [N, label_dim], one-hot as a rule; None for zeros.
            randn_like: draws noise like a given tensor, once before every step even if S_churn is 0.
            others: see the paper.

        Returns:
            float64 [N, C, H, W].

        Raises:
            ValueError: an argument is out of range or of the wrong shape, or noise levels are out of order.
        """
        wide = torch.float64
        found = self._walk("edm", num_steps, sigma_min, sigma_max, rho, Churn(S_churn, S_min, S_max, S_noise), wide)
        return self._draw(found, latents, randn_like, dtype=wide, class_labels=class_labels)

    def ablation_sampler(
        self, latents: Tensor, class_labels: Tensor | None = None, randn_like: RandnLike = torch.randn_like,
        num_steps: int = 18, sigma_min: float | None = None, sigma_max: float | None = None, rho: float = 7,
        solver: str = "heun", discretization: str = "edm", schedule: str = "linear", scaling: str = "none",
        epsilon_s: float = 1e-3, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000, alpha: float = 1,
        S_churn: float = 0, S_min: float = 0, S_max: float = math.inf, S_noise: float = 1,
    ) -> Tensor:  # fmt: skip
        """Draw images from latents, as EDM's `ablation_sampler(net, ...)`; see `edm_sampler`."""
        named: dict[str, Any] = {"solver": solver, "discretization": discretization}
        named |= {"schedule": schedule, "scaling": scaling}
        named |= {"epsilon_s": epsilon_s, "C_1": C_1, "C_2": C_2, "M": M, "alpha": alpha, "vp_beta_d": 19.9}
        churn = Churn(S_churn, S_min, S_max, S_noise)
        found = self._walk("ablation", num_steps, sigma_min, sigma_max, rho, churn, torch.float64, **named)
        return self._draw(found, latents, randn_like, dtype=torch.float64, class_labels=class_labels)

    # -- PhysicsNeMo ----------------------------------------------------------------------------------------------

    def stochastic_sampler(
        self, latents: Tensor, img_lr: Tensor | None = None, class_labels: Tensor | None = None,
        randn_like: RandnLike = torch.randn_like, patching: Any = None, mean_hr: Tensor | None = None,
        lead_time_label: Tensor | None = None, num_steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 800,
        rho: float = 7, S_churn: float = 0, S_min: float = 0, S_max: float = math.inf, S_noise: float = 1,
    ) -> Tensor:  # fmt: skip
        """Draw ensemble members from latents, as PhysicsNeMo's `stochastic_sampler(net, ...)`.

        Args:
            latents: N(0, 1), [N, C, H, W].
            img_lr: [N, C', H, W], what the network is conditioned on.
            class_labels, randn_like: as for `edm_sampler`.
            patching: must be None: patches are not supported.
            mean_hr: [1 or N, C'', H, W] or [C'', H, W], read before img_lr.
            lead_time_label: integers [N], for networks with lead times.
            others: as for `edm_sampler`; churn has no upper bound here.

        Returns:
            [N, C, H, W] in the dtype of the latents.

        Raises:
            ValueError: as for `edm_sampler`, or `patching` is given.
        """
        _refuse_patches(patching)
        churn = Churn(S_churn, S_min, S_max, S_noise)
        found = self._walk("stochastic", num_steps, sigma_min, sigma_max, rho, churn, None)
        return self._draw(
            found, latents, randn_like, dtype=latents.dtype, class_labels=class_labels, img_lr=img_lr, mean_hr=mean_hr,
            lead_time_label=lead_time_label,
        )  # fmt: skip

    def deterministic_sampler(
        self, latents: Tensor, img_lr: Tensor | None = None, class_labels: Tensor | None = None,
        randn_like: RandnLike = torch.randn_like, patching: Any = None, mean_hr: Tensor | None = None,
        lead_time_label: Tensor | None = None, num_steps: int = 18, sigma_min: float | None = None,
        sigma_max: float | None = None, rho: float = 7, solver: str = "heun", discretization: str = "edm",
        schedule: str = "linear", scaling: str = "none", epsilon_s: float = 1e-3, C_1: float = 0.001,
        C_2: float = 0.008, M: int = 1000, alpha: float = 1, S_churn: float = 0, S_min: float = 0,
        S_max: float = math.inf, S_noise: float = 1, dtype: torch.dtype = torch.float64,
    ) -> Tensor:  # fmt: skip
        """Draw ensemble members from latents, as PhysicsNeMo's `deterministic_sampler(net, ...)`.

        See `stochastic_sampler`; `dtype` is that of the result and of the noise drawn.
        """
        _refuse_patches(patching)
        named: dict[str, Any] = {"solver": solver, "discretization": discretization}
        named |= {"schedule": schedule, "scaling": scaling}
        named |= {"epsilon_s": epsilon_s, "C_1": C_1, "C_2": C_2, "M": M, "alpha": alpha, "vp_beta_d": 19.1}
        churn = Churn(S_churn, S_min, S_max, S_noise)
        found = self._walk("ablation", num_steps, sigma_min, sigma_max, rho, churn, dtype, **named)
        return self._draw(
            found, latents, randn_like, dtype=dtype, class_labels=class_labels, img_lr=img_lr, mean_hr=mean_hr,
            lead_time_label=lead_time_label,
        )  # fmt: skip

    # -- per-seed samples -------------------------------------------------------------------------------------------

    def generate(
        self, seeds: Sequence[int], *, class_idx: int | None = None, img_lr: Tensor | None = None, batch: int = 64,
        sampler: str | None = None, size: tuple[int, int] | None = None, **arguments: Any,
    ) -> Tensor:  # fmt: skip
        """Draw one sample per seed, the same whatever other seeds are drawn with it (to the network's rounding).

        A generator per seed draws, in this order, the latents, the label if the network has classes, and the noise of
        the steps: as EDM's `generate.py`, and as PhysicsNeMo's `diffusion_step` for an ensemble.

        Args:
            seeds: one per sample, or ensemble member.
            class_idx: the class of all samples; None for a random one each.
            img_lr: [1, C, H, W], the condition of all members; with it the sampler is PhysicsNeMo's.
            batch: the most samples at once.
            sampler: "edm_sampler", "ablation_sampler", "stochastic_sampler" or "deterministic_sampler"; None for the
                first or, with `img_lr`, the third.
            size: (height, width); None for the network's, or that of `img_lr`.
            **arguments: further ones of the sampler.

        Returns:
            [N, C, H, W].

        Raises:
            ValueError: an argument is out of range, or of the wrong shape.
        """
        method = sampler or ("edm_sampler" if img_lr is None else "stochastic_sampler")
        if method not in self.methods[:4]:
            raise ValueError(f"sampler is {sampler!r}, must be one of {', '.join(self.methods[:4])}")
        if not len(seeds):
            raise ValueError("seeds is empty, must have one entry per sample")
        if img_lr is not None and (img_lr.ndim != 4 or len(img_lr) != 1):
            raise ValueError(f"img_lr has shape {tuple(img_lr.shape)}, must be [1, C, H, W]: it is for all seeds")
        net, batch = self.net, checks.positive(batch, "batch")
        classes = int(getattr(net, "label_dim", 0) or 0)
        if class_idx is not None and not 0 <= class_idx < classes:
            raise ValueError(f"class_idx is {class_idx}, must be from 0 to {classes - 1}, or None without classes")
        shape = (channels_of(net), *(size or self._size(img_lr)))
        parts = []
        for first in range(0, len(seeds), batch):
            some = seeds[first : first + batch]
            source = Seeds(self._device, some)
            latents = source.randn_like(torch.empty(len(some), *shape, device=self._device))
            more: dict[str, Any] = {}
            if classes:
                chosen = source.randint(classes)
                chosen = chosen if class_idx is None else torch.full_like(chosen, class_idx)
                more["class_labels"] = torch.eye(classes, device=self._device)[chosen]
            if img_lr is not None:
                more["img_lr"] = img_lr.expand(len(some), -1, -1, -1)
            parts.append(getattr(self, method)(latents, randn_like=source.randn_like, **more, **arguments))
        return torch.cat(parts)

    def _size(self, img_lr: Tensor | None) -> tuple[int, int]:
        if img_lr is not None:
            return img_lr.shape[2], img_lr.shape[3]
        size = self.net.img_resolution
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _walk(
        self, kind: str, num_steps: int, sigma_min: Any, sigma_max: Any, rho: float, churn: Churn,
        dtype: torch.dtype | None, **named: Any,
    ) -> Walk:  # fmt: skip
        """Return the table of a sampler, made once for the same settings."""
        net = self.net
        own = (getattr(net, "sigma_data", None), net.sigma_min, net.sigma_max)
        key = (kind, num_steps, sigma_min, sigma_max, rho, churn, dtype, own, *named.values())
        if key not in self._walks:
            if kind == "ablation":
                assert dtype is not None
                made = ablation_walk(net, num_steps, sigma_min, sigma_max, rho, churn, dtype=dtype, **named)
            else:
                bounded = kind == "edm"
                made = edm_walk(net, num_steps, sigma_min, sigma_max, rho, churn, dtype=dtype, bounded=bounded)
            self._walks = {key: made}
        return self._walks[key]

    @torch.no_grad()
    def _draw(
        self, found: Walk, latents: Tensor, randn_like: RandnLike, *, dtype: torch.dtype,
        class_labels: Tensor | None = None, img_lr: Tensor | None = None, mean_hr: Tensor | None = None,
        lead_time_label: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Take latents through a table, and return the samples in `dtype`."""
        channels = channels_of(self.net)
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, must be [N, {channels}, H, W]")
        sampler = self._prepared()
        like = torch.empty_like(latents, dtype=dtype)  # noise fills memory in the order of its strides
        first, second = found.first
        start = first * latents.double() + second * randn_like(like).double()
        noise = StepNoise(found.draws, lambda: randn_like(like).float())
        condition = self._condition(tuple(latents.shape), img_lr, mean_hr, lead_time_label)
        arguments: dict[str, Any] = {}
        if bool((found.table.rows[:, 6] != 0).any()):
            arguments["noise"] = noise
        images = sampler.sample(
            len(latents), shape=tuple(latents.shape[1:]), x_T=start.float(), table=found.table, condition=condition,
            class_labels=self._labels(class_labels, len(latents)), **arguments,
            batch_size=None if arguments else self.options.batch_size,
        )  # fmt: skip
        noise.finish()
        return images.to(latents.device, dtype)

    def _condition(
        self, shape: tuple[int, ...], img_lr: Tensor | None, mean_hr: Tensor | None, lead_time_label: Tensor | None
    ) -> Tensor | None:
        """Return the channels that the network reads beside the state: [mean_hr, img_lr, positions]."""
        wanted = EDMNetwork(self.net).condition_channels
        for name, value in (("img_lr", img_lr), ("mean_hr", mean_hr)):
            if value is not None and tuple(value.shape[-2:]) != shape[2:]:
                size = "x".join(map(str, value.shape[-2:]))
                raise ValueError(f"{name} is {size}, must be {shape[2]}x{shape[3]}, as latents")
        if img_lr is not None and (img_lr.ndim != 4 or len(img_lr) != shape[0]):
            given = tuple(img_lr.shape)
            raise ValueError(f"img_lr has shape {given}, must be [{shape[0]}, C, H, W], as many as latents")
        condition = img_lr
        if mean_hr is not None:
            if img_lr is None:
                raise ValueError("mean_hr is given but img_lr is None, must be given with it")
            condition = torch.cat([mean_hr.expand(shape[0], -1, -1, -1), img_lr], dim=1)
        channels = 0 if condition is None else condition.shape[1]
        if channels != wanted:
            both = "img_lr has" if mean_hr is None else "mean_hr and img_lr have"
            raise ValueError(f"{both} {channels} channels, must have {wanted}: the network reads them beside the state")
        return with_positions(self.net, condition, shape, lead_time_label)

    def _labels(self, given: Tensor | None, count: int) -> Tensor | None:
        width = int(getattr(self.net, "label_dim", 0) or 0)
        if not width:
            return None
        if given is None:
            return torch.zeros(count, width)
        labels = given.to(torch.float32).reshape(-1, width)
        if len(labels) not in (1, count):
            raise ValueError(f"class_labels have shape {tuple(given.shape)}, must be [{count}, {width}]")
        return labels.expand(count, -1)

    def _prepared(self) -> Sampler:
        """Return the sampler of the network as it is now."""
        with self._lock:
            now = self._identity()
            if self._sampler is None or now != self._made_of:
                self._walks = {}
                network = EDMNetwork(self.net)
                self._sampler = Sampler(
                    network, _denoised(self.net).table, clip_sample=False, dtype=self._dtype(), device=self._device,
                    backend=self.options.backend, cuda_graph=self.options.cuda_graph,
                    variance_type="learned_range" if network.doubled else "fixed_small",
                )  # fmt: skip
                self._tell(self._sampler.network)
                self._made_of = now
            return self._sampler

    def check(self) -> None:
        """Compare one denoised sample with the original's.

        Raises:
            ValueError: they differ by more than rounding.
        """
        sampler, net, one = self._prepared(), self.net, _denoised(self.net)
        wrapper: Any = sampler.model
        factor = wrapper.factor
        size = self._size(None) if wrapper.has_positions or factor is None else (2 * factor, 2 * factor)
        first = next(net.parameters())
        like = torch.empty(0, device=first.device)
        x, condition = some_noise((channels_of(net), *size), like), None
        if wrapper.condition_channels:
            condition = some_noise((wrapper.condition_channels, *size), like)
        width, by_lead_time = int(getattr(net, "label_dim", 0) or 0), getattr(net.model, "lt_embd", None)
        labels = torch.eye(width, device=first.device)[:1] if width else None
        lead_time = None if by_lead_time is None else torch.zeros(1, dtype=torch.int64, device=first.device)
        ours = self._draw(
            one, x, torch.zeros_like, dtype=torch.float64, class_labels=labels, img_lr=condition,
            lead_time_label=lead_time,
        )  # fmt: skip
        sigma = torch.tensor(one.sigmas, device=first.device)
        more = {} if lead_time is None else {"lead_time_label": lead_time}
        noisy = x * sigma
        with evaluating(net):
            if "img_lr" in inspect.signature(net.forward).parameters:
                theirs = net(noisy, condition, sigma, **more)
            elif condition is not None:
                theirs = net(noisy, sigma, condition=condition, class_labels=labels, **more)
            else:
                theirs = net(noisy, sigma, labels, **more)
        found = difference(theirs, ours, sampler.dtype)
        if found is not None:
            raise ValueError(
                f"net is a {type(net).__name__} whose result {found} of what its class is known to compute, "
                "must be the library's own"
            )


def _refuse_patches(patching: Any) -> None:
    if patching is not None:
        raise ValueError(f"patching is a {type(patching).__name__}, must be None: patches are not supported")


def _some_level(net: Any) -> Tensor:
    """Return one noise level [1] that a network supports."""
    high = min(float(net.sigma_max), 80.0)
    level = math.sqrt(max(float(net.sigma_min), high / 1e4) * high)
    return net.round_sigma(torch.tensor([level], dtype=torch.float64)).cpu()  # type: ignore[no-any-return]


def _denoised(net: Any) -> Walk:
    """Return the walk of one row that ends with the denoised state: Euler's step to no noise."""
    return walk(net, _some_level(net), LINEAR, Churn(), heun=False)
