"""Provide the options, samplers and noise that `lucidrains` samples with."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from fastddpm_kernels import philox
from torch import Tensor, nn

from fastddpm.common import checks
from fastddpm.interop.lucidrains.models import (
    GuidedPredictor,
    Mixture,
    Predictor,
    cast_embeddings,
    fuse_norms,
    verify_fused,
)
from fastddpm.interop.lucidrains.tables import prediction_type
from fastddpm.interop.shared import StepNoise, check_noise
from fastddpm.networks.frozen import why_not
from fastddpm.networks.weights import Follower
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable
from fastddpm.sampling.sampler import Sampler


@dataclass(frozen=True)
class Options:
    """The options of `lucidrains.accelerate`."""

    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None
    backend: str = "auto"
    cuda_graph: str | bool = "auto"
    batch_size: int | str | None = None
    progress: bool = True
    noise: str = "philox"
    freeze: bool | None = None
    fuse_norms: bool | None = None
    channels_last: bool = False
    allow_general: bool = True

    @classmethod
    def parse(cls, given: Mapping[str, Any], *, allow_general: bool) -> Options:
        """Return the options in `given`; raise TypeError for an unknown one, ValueError for one out of range."""
        names = [field.name for field in fields(cls) if field.name != "allow_general"]
        for name in given:
            if name not in names:
                raise TypeError(f"{name} is no option, must be one of {', '.join(names)}")
        options = cls(**given, allow_general=allow_general)
        check_noise(options.noise)
        checks.batch_size(options.batch_size)
        return options

    def check_for(self, diffusion: Any) -> None:
        """Raise ValueError if an option does not suit such a diffusion."""
        if self.channels_last and hasattr(diffusion, "seq_length"):
            raise ValueError("channels_last is True but the diffusion is one-dimensional; must be False")


class Variant(NamedTuple):
    """The properties of a call that determine its sampler.

    Attributes:
        clip: whether x0 is clipped.
        labelled: whether labels are given.
        guided, rescaled: whether guidance is computed, and whether its standard deviation is restored.
        conditioned: whether a self-conditioned network receives the previous x0.
    """

    clip: bool = True
    labelled: bool = False
    guided: bool = False
    rescaled: bool = False
    conditioned: bool = True


@dataclass(frozen=True)
class Traits:
    """How a class of the library uses its network.

    Attributes:
        network: the attribute that is the network.
        by_name: see `Predictor`.
        predicts: the prediction type of the wrapped network, by this package's name.
        variance_type: "learned_range" if the second half of its output gives the variance.
        weighted: whether it predicts noise, x0 and the weights of both.
        table: makes the sampler's table if the diffusion has no betas.
    """

    network: str = "model"
    by_name: bool = False
    predicts: Callable[[Any], str] = prediction_type
    variance_type: str = "fixed_small"
    weighted: bool = False
    table: Callable[[Any], StepTable] | None = None

    def device(self, diffusion: Any) -> torch.device:
        """Return the device on which a diffusion draws its noise."""
        betas = getattr(diffusion, "betas", None)
        return next(self.of(diffusion).parameters()).device if betas is None else betas.device

    def of(self, diffusion: Any) -> Any:
        """Return the network."""
        return getattr(diffusion, self.network)


class Samplers:
    """The samplers of a diffusion, made on demand and made again when the network is replaced.

    Args:
        diffusion: the original object.
        options: how it is sampled.
        traits: of its class.
    """

    def __init__(self, diffusion: Any, options: Options, traits: Traits) -> None:
        self._diffusion, self._options, self._traits = diffusion, options, traits
        self._held: dict[Variant, _Held] = {}
        self._lock = threading.RLock()

    @contextmanager
    def lent(
        self, variant: Variant, scales: tuple[float, float] | None, named: Mapping[str, Any] | None = None
    ) -> Iterator[Sampler]:
        """Lend the sampler of a variant; a guided one serves one thread at a time, since it holds one pair of scales.

        Gradients and inference mode are off inside, because later calls may use the cached tensors outside inference
        mode. With keyword arguments for the network, the sampler is made for this call only.
        """
        with torch.inference_mode(False), torch.no_grad():
            if named:
                yield _Held(self._diffusion, self._options, variant, self._traits, named).sampler
                return
            with self._lock:
                held = self._held.get(variant)
                if held is None or not held.fits(self._diffusion, self._options):
                    held = self._held[variant] = _Held(self._diffusion, self._options, variant, self._traits)
                held.refresh()
                if scales is not None and variant.guided:
                    network: Any = held.sampler.model
                    network.set_scales(*scales)
                    yield held.sampler
                    return
            yield held.sampler

    def check(self, variant: Variant) -> None:
        """Make the sampler of a variant, so that its errors are raised now."""
        with self.lent(variant, None):
            pass


class _Held:
    """A sampler and what it was made from."""

    def __init__(
        self, diffusion: Any, options: Options, variant: Variant, traits: Traits,
        named: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._traits, self._named = traits, dict(named or {})
        self._device = torch.device(options.device or traits.device(diffusion))
        self._made_of = _identity(diffusion, options, traits)
        self._follower: Follower | None = None
        self._mixture: Mixture | None = None
        if options.freeze is not False and not self._named:
            reason = why_not(traits.of(diffusion), self._device)
            if options.backend == "reference":
                reason = "backend is 'reference', which runs a network as it is"
            if reason is None:
                self.sampler = self._frozen(diffusion, options, variant)
                if self.sampler.network.frozen is not None:
                    return
                reason = "its forward computes something else than was frozen"  # the log says how far they differ
            if options.freeze:
                raise ValueError(
                    f"freeze is True but the diffusion's {traits.network} cannot be frozen: {reason}; must be None"
                )
        self.sampler = self._plain(diffusion, options, variant)

    def _frozen(self, diffusion: Any, options: Options, variant: Variant) -> Sampler:
        model = self._traits.of(diffusion)
        if variant.labelled:
            model = GuidedPredictor(
                model, guided=variant.guided, rescaled=variant.rescaled, device=self._device, freeze=True
            )
        return self._sampler(model, diffusion, options, variant)

    def _plain(self, diffusion: Any, options: Options, variant: Variant) -> Sampler:
        """Return a sampler of the library's modules, some of them replaced."""

        def called(model: nn.Module, **guidance: bool) -> nn.Module:
            if not variant.labelled:
                return Predictor(model, by_name=self._traits.by_name, named=self._named)
            return GuidedPredictor(model, device=self._device, **{"guided": False, "rescaled": False, **guidance})

        model = self._traits.of(diffusion)
        if options.fuse_norms or (options.fuse_norms is None and self._device.type == "cuda"):
            fused, count = fuse_norms(model, options.backend)
            if count:
                verify_fused(called(model), called(fused), *_example(diffusion, variant, self._traits))
                model = fused
            elif options.fuse_norms:
                raise ValueError(
                    f"fuse_norms is True but the diffusion's model, a {type(model).__name__}, has no norms of "
                    "denoising_diffusion_pytorch; must be None or False"
                )
        if options.dtype is not None:
            model = cast_embeddings(model)
        predictor = network = called(model, guided=variant.guided, rescaled=variant.rescaled)
        if options.channels_last:
            network = copy.deepcopy(network).to(memory_format=torch.channels_last)
        sampler = self._sampler(network, diffusion, options, variant)
        if isinstance(sampler.model, nn.Module) and sampler.model is not (self._mixture or predictor):
            copied: Any = sampler.model
            self._follower = Follower(predictor, copied.model if isinstance(copied, Mixture) else copied)
        return sampler

    def _sampler(self, network: nn.Module, diffusion: Any, options: Options, variant: Variant) -> Sampler:
        traits = self._traits
        if traits.weighted:
            network = self._mixture = Mixture(network, diffusion, self._device, freeze=options.freeze is not False)
        settings: dict[str, Any] = {
            "clip_sample": variant.clip,
            "dtype": options.dtype,
            "device": self._device,
            "backend": options.backend,
            "cuda_graph": False if self._named else options.cuda_graph,
            "self_condition": variant.conditioned and bool(getattr(diffusion, "self_condition", False)),
        }
        if traits.table is not None:
            return Sampler(network, traits.table(diffusion), **settings)
        return Sampler(
            network,
            NoiseSchedule.from_betas(diffusion.betas),
            "ddpm",
            prediction_type=traits.predicts(diffusion),
            variance_type=traits.variance_type,
            convention="denoising_diffusion_pytorch",
            **settings,
        )

    def fits(self, diffusion: Any, options: Options) -> bool:
        """Return whether the diffusion is still what the sampler was made from."""
        frozen = self.sampler.network.frozen is not None
        if frozen and why_not(self._traits.of(diffusion), self._device) is not None:
            return False
        return self._made_of == _identity(diffusion, options, self._traits)

    def refresh(self) -> None:
        """Copy changed weights into the sampler's network if it is a copy; other networks share the weights."""
        if self._follower is not None:
            self._follower.refresh()
        if isinstance(self.sampler.model, Mixture):
            self.sampler.model.refresh()


class Drawing:
    """One call: its noise and its other keyword arguments.

    Args:
        given: noise, seed and progress, see `AcceleratedDiffusion`.
        options: the defaults of what is not given.
        device: of the original, on which torch's noise is drawn.
        sampler: the sampler to use.
        shape: [N, ...] of the samples.
    """

    def __init__(
        self, given: Mapping[str, Any], options: Options, device: torch.device, sampler: Sampler, shape: tuple[int, ...]
    ) -> None:
        for name in given:
            if name not in ("noise", "seed", "progress"):
                raise TypeError(f"{name} is no argument; beside the original's there are noise, seed and progress")
        source, seed = given.get("noise"), given.get("seed")
        self.by_torch = check_noise(options.noise if source is None else source) == "torch"
        progress = given.get("progress")
        self._progress = options.progress if progress is None else bool(progress)
        self._batch_size, self._sampler, self._shape = options.batch_size, sampler, shape
        self._device = device
        count = shape[0]
        if self.by_torch and seed is not None:
            raise ValueError(f"seed is {seed} but noise is 'torch', which torch.manual_seed seeds")
        if self.by_torch and isinstance(self._batch_size, int) and self._batch_size < count:
            raise ValueError(
                f"batch_size is {self._batch_size} for {count} samples but noise is 'torch', which is drawn for all of "
                "them at once; must be None or 'auto', or noise 'philox'"
            )
        if seed is None and not self.by_torch:
            seed = int(torch.randint(2**62, ()))
        self._seed = 0 if seed is None else seed

    def initial(self, index: int = 0, *, stream: int = philox.STREAM_INITIAL) -> Tensor:
        """Return noise of the samples' shape on the sampler's device: of batch `index`, or the next of torch's."""
        if self.by_torch:
            return self._draw().to(self._sampler.device)
        count = self._shape[0]
        keys = philox.sample_keys(
            [self._seed] * count, range(index * count, (index + 1) * count), device=self._sampler.device
        )
        return philox.normal(keys, self._shape[1:], step=0, stream=stream, backend=self._sampler.backend)

    def walk(
        self,
        table: StepTable,
        draws: Sequence[bool],
        x: Tensor | None,
        *,
        labels: Tensor | None = None,
        start: int = 0,
        all_states: bool = False,
        whole: bool = False,
    ) -> Tensor:
        """Return the samples at the end of the table, float32 [N, ...]; or x and all later states, [N, S + 1, ...].

        Args:
            table: of the sampler.
            draws: for each row, whether the original draws noise, used or not.
            x: the state before the row `start`; None to draw it.
            labels: int64 [N], or None.
            start: the first row.
            all_states: return all states instead of the samples.
            whole: whether all samples must be drawn at once.

        Raises:
            ValueError: `whole` is True, and the option `batch_size` is less than the number of samples.
        """
        size = self._batch_size
        if whole and isinstance(size, int) and size < self._shape[0]:
            raise ValueError(
                f"batch_size is {size} for {self._shape[0]} samples but model_forward_kwargs are given, which are for "
                "all of them; must be None or 'auto'"
            )
        arguments: dict[str, Any] = {
            "shape": self._shape[1:],
            "x_T": x,
            "table": table,
            "start": start,
            "class_labels": labels,
            "batch_size": None if whole else size,
            "progress": self._progress,
        }
        noise = None
        if self.by_torch:
            noise = arguments["noise"] = StepNoise(draws, self._draw, start)
        else:
            arguments["seed"] = self._seed
        if all_states and x is not None:
            states = self._sampler.sample(len(x), return_trajectory=1, **arguments).x
            result = torch.cat([x[:, None], states.transpose(0, 1)], dim=1)
        else:
            result = self._sampler.sample(self._shape[0], **arguments)
        if noise is not None:
            noise.finish()
        return result

    def _draw(self) -> Tensor:
        return torch.randn(self._shape, device=self._device)


def _identity(diffusion: Any, options: Options, traits: Traits) -> tuple[Any, ...]:
    """Return what must not change while a sampler is in use: the device, the parameters and their dtypes."""
    network = traits.of(diffusion)
    every = itertools.chain(network.parameters(), network.buffers())
    tensors = tuple((id(tensor), tensor.dtype, tensor.device) for tensor in every)
    return (torch.device(options.device or traits.device(diffusion)), id(network), *tensors)


def _example(diffusion: Any, variant: Variant, traits: Traits) -> tuple[Any, ...]:
    """Return the shape of a sample, and the arguments of the network after x and t."""
    if hasattr(diffusion, "seq_length"):
        shape = (diffusion.channels, diffusion.seq_length)
        return (shape if diffusion.channel_first else shape[::-1],)
    size = diffusion.image_size
    shape = (diffusion.channels, *((size, size) if isinstance(size, int) else size))
    if variant.labelled:
        return shape, torch.zeros(1, dtype=torch.int64, device=traits.device(diffusion))
    return (shape,)
