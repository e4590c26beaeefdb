"""Combine a network, a noise schedule and a training objective in `GaussianDiffusion`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fastddpm_kernels.q_sample import q_sample
from torch import Tensor, nn

from fastddpm.common import checks
from fastddpm.networks.network import CallingConvention, is_text
from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.training.objective.checking import (
    check_arguments,
    check_batch,
    check_channels,
    check_settings,
    check_timesteps,
)
from fastddpm.training.objective.likelihood import BitsPerDim, bits_per_dim
from fastddpm.training.objective.losses import POINTWISE, pointwise, variational_bound
from fastddpm.training.objective.noise import Draws
from fastddpm.training.objective.tables import Tables
from fastddpm.training.objective.timestep_sampling import TimestepSampler


class Prediction(NamedTuple):
    """The model's p(x_{t-1} | x_t): mean, variance and log-variance, and the predicted x0, all like x_t."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_x0: Tensor


class GaussianDiffusion(nn.Module):
    """Compute the training loss of a DDPM's network, and the likelihoods it gives (Ho et al. 2020).

    `loss = diffusion(x0, labels, step=step)` is the loss of a batch. Its random numbers (timesteps, noise, dropped
    labels) are a function of (seed, sample, step), whatever the process or the micro-batch; the network's own dropout
    is not. The state dict holds the network, `unet.*`, and the history of "importance" timesteps.

    The loss is computed in float32 (float64 for float64 data), whatever autocast says.

    Attributes:
        unet: the network that was given.
        schedule, prediction_type, variance_type, self_condition, null_class: the settings that a `Sampler` also takes.
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: NoiseSchedule,
        *,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        loss: str = "mse",
        huber_delta: float = 0.1,
        vlb_weight: float = 0.001,
        weighting: str = "uniform",
        min_snr_gamma: float = 5.0,
        p2_gamma: float = 1.0,
        p2_k: float = 1.0,
        offset_noise: float = 0.0,
        input_perturbation: float = 0.0,
        immiscible: bool = False,
        label_dropout: float = 0.0,
        null_class: int | None = None,
        timestep_sampling: str = "uniform",
        self_condition: bool | None = None,
        clip_sample: bool = True,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        """
        Args:
            unet: any network of (x_t, t), or of (x_t, t, labels), that `Sampler` accepts; or one that also takes
                `encoder_hidden_states`, such as diffusers' `UNet2DConditionModel`.
            schedule: the forward process.
            prediction_type: what the network predicts: "epsilon", "sample" (x_0) or "v_prediction".
            variance_type: "fixed_small", "fixed_small_log" (the same), "fixed_large" or "learned_range"; with the last,
                the network has twice as many channels as the data (Nichol & Dhariwal 2021, eq. 15).
            loss: "mse", "l1", "huber": of what is predicted. "kl": the term of the variational bound in bits per
                dimension; "rescaled_kl": times the number of timesteps T, which estimates the whole bound. For
                "learned_range" also "hybrid", mse + vlb_weight * T * the term (Nichol & Dhariwal 2021, eq. 16), where
                the term trains the variance alone, and OpenAI's "rescaled_mse", the same with T / 1000. With a fixed
                variance "rescaled_mse" is "mse".
            huber_delta: where "huber" turns from square to straight, above 0.
            vlb_weight: of "hybrid". denoising_diffusion_pytorch's `vb_loss_weight` is T times this.
            weighting: of the pointwise losses by timestep: "uniform", "min_snr", "p2" or "snr", each the same loss
                whatever is predicted; see `loss_weights`.
            min_snr_gamma, p2_gamma, p2_k: constants of the weightings.
            offset_noise: strength of noise that is the same for all pixels of a channel, such as 0.1.
            input_perturbation: strength of further noise on the input that is not in the target (Ning et al. 2023),
                such as 0.1.
            immiscible: pair images and noise of a (local) batch by least distance (Li et al. 2024). Needs scipy, and
                the step cannot be compiled.
            label_dropout: the share of labels that are replaced by `null_class`, or of embeddings of texts that are
                replaced by zeros, for classifier-free guidance.
            null_class: the label that means "no class"; None for that of the network's config.
            timestep_sampling: "uniform"; "stratified", spread evenly over the global batch; "importance", by the size
                of past losses (Nichol & Dhariwal 2021).
            self_condition: give the network its own prediction of x0 in half of the batches, else zeros (Chen et al.
                2023): as its parameter `x_self_cond` if it has one, else before the channels of x_t. None enables this
                if the network has that parameter and its attribute `self_condition`, if any, is true.
            clip_sample: clip the predicted x0 to [-1, 1] in `p_mean_variance` and `bits_per_dim`, not in losses.
            seed: of all randomness, from 0 to 2^64 - 1.
            backend: of the fused operations: "auto", "triton", "eager" or "reference". A `fastddpm.UNet` is set to it,
                unless it is "auto".

        Raises:
            TypeError, ValueError: an argument is unknown or out of range, or two arguments contradict each other.
            ModuleNotFoundError: `immiscible` without scipy.
        """
        super().__init__()
        check_arguments(
            unet,
            schedule,
            loss=loss,
            immiscible=immiscible,
            null_class=null_class,
            self_condition=self_condition,
            clip_sample=clip_sample,
            seed=seed,
            backend=backend,
        )
        self.unet, self.schedule, self.seed, self.backend = unet, schedule, seed, backend
        self.prediction_type, self.variance_type, self.clip_sample = prediction_type, variance_type, clip_sample
        self.loss, self.weighting, self.immiscible = loss, weighting, immiscible
        self.huber_delta = checks.in_range(huber_delta, "huber_delta", above=0)
        self.vlb_weight = checks.in_range(vlb_weight, "vlb_weight")
        self.offset_noise = checks.in_range(offset_noise, "offset_noise")
        self.input_perturbation = checks.in_range(input_perturbation, "input_perturbation")
        self.label_dropout = checks.in_range(label_dropout, "label_dropout", most=1)
        config = getattr(unet, "config", None)
        self.null_class = getattr(config, "null_class", None) if null_class is None else null_class
        self._call = CallingConvention(unet)
        if self_condition is None:
            self_condition = self._call.takes_self_condition and bool(getattr(unet, "self_condition", True))
        self.self_condition = self_condition
        self.min_snr_gamma, self.p2_gamma, self.p2_k = min_snr_gamma, p2_gamma, p2_k
        self._tables = Tables(
            schedule,
            prediction_type,
            variance_type,
            weighting=weighting,
            min_snr_gamma=min_snr_gamma,
            p2_gamma=p2_gamma,
            p2_k=p2_k,
        )
        self.timestep_sampler = TimestepSampler(timestep_sampling, schedule.num_train_timesteps)
        check_settings(
            self,
            concatenated=self.self_condition and not self._call.takes_self_condition,
            takes_text=self._call.takes_text,
        )
        if isinstance(unet, UNet) and backend != "auto":
            unet.backend = backend

    # -- the forward process --------------------------------------------------------------------------------------

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t of `x0` [N, ...] at t int64 [N] with `noise` [N, ...]: a sample of q(x_t | x_0)."""
        return q_sample(
            x0, self._tables.q_sample, t, noise=noise, prediction_type=self.prediction_type, backend=self.backend
        )[0]

    def q_mean_variance(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean (like `x0`), variance and log-variance [N, 1, ...] of q(x_t | x_0), at t int64 [N]."""
        check_timesteps(t, x0, self.schedule.num_train_timesteps)
        c = self._tables.at(t, x0)
        return c.signal * x0, c.sigma.square(), 2 * c.sigma.log()

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean (like `x0`), variance, log-variance [N, 1, ...] of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7).

        At t = 0 the variance is 0, and the log-variance is that of t = 1, as in guided-diffusion.
        """
        check_timesteps(t, x0, self.schedule.num_train_timesteps)
        c = self._tables.at(t, x0)
        return c.posterior_mean(x0, x_t), c.posterior_variance, c.log_posterior

    # -- the model ------------------------------------------------------------------------------------------------

    def sample_timesteps(
        self, batch_size: int, *, step: int | Tensor = 0, first_sample: int = 0, global_batch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the timesteps int64 [N] of a training step and the factors of their losses, float32 [N].

        Args: see `forward`.
        """
        return self._timesteps(self._draws(batch_size, first_sample, step), global_batch)

    def p_mean_variance(
        self, x_t: Tensor, t: Tensor, *, labels: Tensor | None = None, self_condition: Tensor | None = None
    ) -> Prediction:
        """Return the model's distribution of x_{t-1}.

        Args:
            x_t: [N, C, ...].
            t: int64 [N].
            labels: int64 [N], if the network takes them.
            self_condition: the x0 predicted before, like `x_t`; None for zeros.

        Raises:
            TypeError, ValueError: `t` has another dtype or shape, or the network's output does not fit.
        """
        check_timesteps(t, x_t, self.schedule.num_train_timesteps)
        out, v = self._run(x_t, t, labels, self_condition)
        c = self._tables.at(t, out)
        pred_x0 = c.pred_x0(x_t, out)
        if self.clip_sample:
            pred_x0 = pred_x0.clamp(-1, 1)
        log_variance = c.model_log_variance(v).expand_as(out)
        return Prediction(c.posterior_mean(pred_x0, x_t), log_variance.exp(), log_variance, pred_x0)

    def bits_per_dim(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        batch_size: int = 16,
        timesteps: Tensor | None = None,
        first_sample: int = 0,
    ) -> BitsPerDim:
        """Return the bound on the negative log-likelihood of 8-bit images; see `likelihood.bits_per_dim`."""
        return bits_per_dim(
            self, x, labels=labels, batch_size=batch_size, timesteps=timesteps, first_sample=first_sample
        )

    # -- training -------------------------------------------------------------------------------------------------

    def forward(
        self,
        x0: Tensor,
        labels: Tensor | None = None,
        *,
        step: int | Tensor = 0,
        first_sample: int = 0,
        global_batch: int | None = None,
    ) -> Tensor:
        """Return the mean loss of a batch, a scalar.

        Args:
            x0: [N, C, ...], values in [-1, 1]; for the losses with terms of the bound, 8-bit ones.
            labels: int64 [N], or the embeddings of texts float [N, L, D], if the network takes them.
            step: the training iteration, an int or an int64 tensor [] or [1] on the device. Both draw the same numbers,
                but with `self_condition` only an int (or a tensor on the CPU) skips the first of the two predictions
                in the half of the batches that do not need it.
            first_sample: the number of x0[0] in the step's global batch: rank * N where N samples go to each process.
            global_batch: the size of the global batch, N if None. Only "stratified" timesteps depend on it.

        Raises:
            TypeError, ValueError: an argument of a wrong type or shape, or the network's output does not fit.
        """
        check_batch(x0, labels)
        draws = self._draws(len(x0), first_sample, step)
        t, importance = self._timesteps(draws, global_batch)
        if labels is not None and self.label_dropout:
            dropped = draws.dropped(self.label_dropout)
            if is_text(labels):
                labels = labels.masked_fill(dropped.view(-1, 1, 1), 0)
            elif self.null_class is not None:
                labels = torch.where(dropped, self.null_class, labels)
        losses = self._losses(x0, t, labels, None, None, draws)
        if self.training and torch.is_grad_enabled():
            self.timestep_sampler.update(t, losses.detach())
        return (losses * importance).mean()

    def losses(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        step: int | Tensor = 0,
        first_sample: int = 0,
        self_condition: bool | None = None,
    ) -> Tensor:
        """Return the weighted loss of each sample at given timesteps: [N].

        Args:
            x0, step, first_sample: as in `forward`.
            t: int64 [N].
            labels: int64 [N], given to the network as they are.
            noise: [N, ...], used unchanged, without offset, pairing or perturbation; None for that of the step.
            self_condition: whether the network first receives its own prediction, if it takes one; None tosses the
                step's coin.

        Raises:
            TypeError, ValueError: see `forward`.
        """
        check_batch(x0, labels)
        return self._losses(x0, t, labels, noise, self_condition, self._draws(len(x0), first_sample, step))

    def _losses(
        self, x0: Tensor, t: Tensor, labels: Tensor | None, noise: Tensor | None, conditioned: bool | None, draws: Draws
    ) -> Tensor:
        x_t, target = self._noised(x0, t, noise, draws)
        given = None
        if self.self_condition:
            given = self._own_prediction(x_t, t, labels, draws.heads() if conditioned is None else conditioned)
        out, v = self._run(x_t, t, labels, given)
        work = out.dtype
        x0, x_t, target = x0.to(work), x_t.to(work), target.to(work)
        if self.loss in ("kl", "rescaled_kl"):
            bound = self._bound(x0, x_t, t, out, v)
            return bound if self.loss == "kl" else bound * self.schedule.num_train_timesteps
        kind = self.loss if self.loss in POINTWISE else "mse"
        losses = pointwise(kind, out, target, self.huber_delta)
        if self.weighting != "uniform":
            losses = losses * self._tables.weights.index_select(0, t).to(work)
        if v is not None:  # "hybrid" or "rescaled_mse"
            weight = self.vlb_weight if self.loss == "hybrid" else 0.001
            bound = self._bound(x0, x_t, t, out.detach(), v)
            losses = losses + weight * self.schedule.num_train_timesteps * bound
        return losses

    def _bound(self, x0: Tensor, x_t: Tensor, t: Tensor, out: Tensor, v: Tensor | None) -> Tensor:
        c = self._tables.at(t, out)
        mean, true_mean = c.posterior_mean(c.pred_x0(x_t, out), x_t), c.posterior_mean(x0, x_t)
        return variational_bound(x0, t, true_mean, c.log_posterior, mean, c.model_log_variance(v))

    def _noised(self, x0: Tensor, t: Tensor, noise: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return (x_t, target); without `noise`, use the step's noise and what the settings add to it."""
        given = noise is not None
        if not given and (self.offset_noise or self.immiscible):
            noise = draws.noise(x0, offset=self.offset_noise, immiscible=self.immiscible)
        x_t, target = q_sample(
            x0,
            self._tables.q_sample,
            t,
            noise=noise,
            keys=draws.keys if noise is None else None,
            step=draws.step,
            prediction_type=self.prediction_type,
            backend=self.backend,
        )
        if self.input_perturbation and not given:
            more = draws.perturbation(x0)
            x_t = (x_t + self.input_perturbation * self._tables.at(t, more).sigma * more).to(x_t.dtype)
        return x_t, target

    def _own_prediction(self, x_t: Tensor, t: Tensor, labels: Tensor | None, heads: bool | Tensor) -> Tensor:
        """Return the network's self-conditioning: its own x0 on heads, else zeros."""
        if heads is False:
            return torch.zeros_like(x_t)
        with torch.no_grad():
            out, _ = self._run(x_t, t, labels, None)
            pred_x0 = self._tables.at(t, out).pred_x0(x_t, out).to(x_t.dtype)
        return pred_x0 if heads is True else torch.where(heads, pred_x0, torch.zeros_like(pred_x0))

    # -- parts ----------------------------------------------------------------------------------------------------

    def _run(self, x_t: Tensor, t: Tensor, labels: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the network's prediction and, if the variance is learned, the other half of its channels.

        `given`: its self-conditioning; None for zeros, if it takes one.
        """
        net_in = x_t
        if not self.self_condition:
            given = None
        elif given is None:
            given = torch.zeros_like(x_t)
        if given is not None and not self._call.takes_self_condition:
            net_in, given = torch.cat([given, x_t], dim=1), None
        dtype = next((p.dtype for p in self.unet.parameters()), x_t.dtype)  # autocast, if any, goes on from there
        net_in, given = net_in.to(dtype), None if given is None else given.to(dtype)
        if labels is not None and is_text(labels):
            labels = labels.to(dtype)
        out = self._call(self.unet, net_in, t, labels, given)
        check_channels(self.variance_type, out.shape[1], x_t.shape[1])
        out = out.to(torch.promote_types(x_t.dtype, torch.float32))
        if self.variance_type != "learned_range":
            return out, None
        prediction, v = out.chunk(2, dim=1)
        return prediction, v

    def _draws(self, count: int, first_sample: int, step: int | Tensor) -> Draws:
        return Draws(self.seed, count, first_sample, step, self._tables.rows.device)

    def _timesteps(self, draws: Draws, global_batch: int | None) -> tuple[Tensor, Tensor]:
        indices = draws.keys[:, 1]
        count = len(indices) if global_batch is None else checks.positive(global_batch, "global_batch")
        return self.timestep_sampler(draws.timestep, draws.rotation, indices, count)
