"""Generate counter-based noise by Philox-4x32-10 and Box-Muller, the same numbers on every backend.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key is the sample's seed,
the counter identifies the number:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (element div 4, sample index, step, stream)

where `element` counts in the logical, contiguous order of one sample. So the noise of sample k of seed s is the
same whatever the batch it is in, the chunking, the memory format, the device or the backend: the 32-bit words are
equal bit for bit, the normals within 4 units in the last place of float32 of the formula (half a unit where torch
makes them). On one backend and device they are equal bit for bit too.

The words r0..r3 of counter i give elements 4i..4i+3. With u(r) = float32(r) 2^-32 + 2^-33 in (0, 1] and
a(r) = float32(r) 2^-32, both float32,

    z[4i]   = sqrt(-2 log u(r0)) cos(2 pi a(r1))        z[4i+1] = sqrt(-2 log u(r0)) sin(2 pi a(r1))
    z[4i+2] = sqrt(-2 log u(r2)) cos(2 pi a(r3))        z[4i+3] = sqrt(-2 log u(r2)) sin(2 pi a(r3))

Memory traffic of the triton kernel of `normal`: 4 bytes written per element, nothing read. The other kernels
make their noise in registers and move nothing for it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_keys, check_step, values_are_at_hand
from fastddpm_kernels.native.binding import THREADS, bind

# The last word of the counter, so that noise for different purposes never repeats.
STREAM_INITIAL, STREAM_STEP, STREAM_Q_SAMPLE, STREAM_KNOWN = 0, 1, 2, 3
STREAM_TRAINING, STREAM_OFFSET, STREAM_PERTURBATION, STREAM_LIKELIHOOD, STREAM_AUGMENTATION = 4, 5, 6, 7, 8
STREAM_ORDER = 9

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def sample_keys(
    seeds: Sequence[int] | Tensor, indices: Sequence[int] | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Return the noise keys of N samples: int64 [N, 2], rows (seed, sample index).

    Args:
        seeds: N seeds, 0 <= seed < 2^64 (stored wrapped into int64), or an int64 tensor [N].
        indices: N sample indices, 0 <= index < 2^32, or an int64 tensor [N].
        device: of the keys; by default that of the given tensors, else the CPU.

    Raises:
        TypeError: a tensor is not int64, or a number is not an integer.
        ValueError: different lengths, or a number out of its range.
    """
    if device is None:
        device = next((given.device for given in (seeds, indices) if isinstance(given, Tensor)), None)
    seed_column = _key_column("seeds", seeds, 64)
    index_column = _key_column("indices", indices, 32)
    if len(seed_column) != len(index_column):
        raise ValueError(f"indices has {len(index_column)} entries, must have {len(seed_column)}, as many as seeds")
    return torch.stack([seed_column.to(device), index_column.to(device)], dim=1)


def _key_column(name: str, values: Sequence[int] | Tensor, bits: int) -> Tensor:
    if isinstance(values, Tensor):
        if values.dtype != torch.int64 or values.ndim != 1:
            raise TypeError(f"{name} is {values.dtype} {list(values.shape)}, must be an int64 tensor [N] or integers")
        if bits == 32 and values_are_at_hand(values) and bool(((values < 0) | (values > _WORD)).any()):
            raise ValueError(f"{name} is {values.tolist()}, must be in [0, 2^32)")
        return values
    numbers = [operator.index(value) for value in values]
    for number in numbers:
        if not 0 <= number < 1 << bits:
            raise ValueError(f"{name} holds {number}, must be in [0, 2^{bits})")
    return torch.tensor([n - (1 << 64) if n >= 1 << 63 else n for n in numbers], dtype=torch.int64)


def philox_4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Return Philox-4x32-10 of int64 counters [..., 4] under int64 keys (two 32-bit words) [..., 2]: int64 [..., 4].

    All words, given and returned, are in [0, 2^32). Readable and slow: the specification of the generator.

    Raises:
        TypeError: not int64.
        ValueError: the last dimension is not 4 (counter), 2 (key).
    """
    for name, tensor, last in (("counter", counter, 4), ("key", key, 2)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} is {tensor.dtype}, must be int64")
        if tensor.ndim < 1 or tensor.shape[-1] != last:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, must be [..., {last}]")
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_ROUNDS):
        # The product wraps modulo 2^64, so as a bit pattern it is the unsigned one.
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c2 = (product1 >> 32 & _WORD) ^ c1 ^ k0, (product0 >> 32 & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def random_words(keys: Tensor, step: int | Tensor, stream: int, num_words: int, backend: str = "auto") -> Tensor:
    """Return the first `num_words` 32-bit words of each sample's noise: int64 [N, num_words], equal on every backend.

    Args:
        keys: int64 [N, 2], from `sample_keys`.
        step: third word of the counter, 0 <= step < 2^32, or an int64 tensor [1] on the keys' device.
        stream: fourth word of the counter, 0 <= stream < 2^32, one of the `STREAM_` constants.
        num_words: the number of words per sample.
        backend: "auto", "triton", "eager" or "reference".

    Raises:
        TypeError, ValueError: an argument is wrong.
        BackendError: the named backend cannot run here.
    """
    check_keys(keys)
    step = _step_tensor(step, keys)
    _check_stream(stream)
    if num_words < 0:
        raise ValueError(f"num_words is {num_words}, must not be negative")
    backend = resolve("philox", backend, keys.device.type)
    if backend == "triton":
        return torch.ops.fastddpm.random_words(keys, step, stream, num_words)
    if backend == "reference":
        return _reference_words(keys, step, stream, num_words)
    radius, angle = _paired_words(keys, step, stream, -(-num_words // 4))
    return _interleave(radius, angle)[:, :num_words]


def normal(keys: Tensor, shape: Sequence[int], *, step: int | Tensor, stream: int, backend: str = "auto") -> Tensor:
    """Return standard normal noise for N samples: float32 [N, *shape], contiguous.

    Args:
        keys: int64 [N, 2], from `sample_keys`.
        shape: the shape of one sample.
        step: third word of the counter, 0 <= step < 2^32, or an int64 tensor [1] on the keys' device.
        stream: fourth word of the counter, 0 <= stream < 2^32, one of the `STREAM_` constants.
        backend: "auto", "triton", "native", "eager" or "reference".

    Raises:
        TypeError, ValueError: an argument is wrong.
        BackendError: the named backend cannot run here.
    """
    check_keys(keys)
    step = _step_tensor(step, keys)
    _check_stream(stream)
    shape = tuple(shape)
    backend = resolve("philox", backend, keys.device.type)
    if backend == "triton":
        flat = torch.ops.fastddpm.normal(keys, step, stream, math.prod(shape))
        return flat.view(keys.shape[0], *shape)
    if backend == "native":
        out = torch.empty(keys.shape[0], *shape, dtype=torch.float32)
        bind("fastddpm_normal", out, keys.contiguous(), step, stream, len(keys), math.prod(shape), THREADS)()
        return out
    if backend == "reference":
        words = _reference_words(keys, step, stream, 4 * -(-math.prod(shape) // 4)).unflatten(1, (-1, 2))
        z = torch.stack(_box_muller(*words.unbind(-1), dtype=torch.float64), dim=-1)
        return z.flatten(1)[:, : math.prod(shape)].reshape(keys.shape[0], *shape).float().contiguous()
    return torch_normal(keys, shape, step, stream, torch.float32)


def torch_normal(keys: Tensor, shape: Sequence[int], step: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Return `normal` in plain torch, unchecked, in `dtype`; `eager` and `reference` of every op use it.

    It is computed in float64 (if the device has it) and then rounded, so in float64 it is the value of the formula
    itself. int64 `step` has shape [1].
    """
    numel = math.prod(shape)
    radius, angle = _paired_words(keys, step, stream, -(-numel // 4))
    work = torch.float32 if keys.device.type == "mps" else torch.float64
    cos, sin = _box_muller(radius, angle, dtype=work)
    z = _interleave(cos.to(dtype), sin.to(dtype))
    return z[:, :numel].reshape(keys.shape[0], *shape).contiguous()


def _box_muller(radius_words: Tensor, angle_words: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the two normals of each pair of words, in `dtype`, from u and a, which are float32 by definition."""
    u = radius_words.float() * 2.0**-32 + 2.0**-33
    radius = (-2 * u.to(dtype).log()).sqrt()
    angle = angle_words.float().to(dtype) * (2 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()


def _reference_words(keys: Tensor, step: Tensor, stream: int, num_words: int) -> Tensor:
    group = torch.arange(-(-num_words // 4), device=keys.device)
    words = torch.broadcast_tensors(group, keys[:, 1:] & _WORD, step & _WORD, torch.full_like(step, stream))
    counter = torch.stack(words, dim=-1)
    key = torch.stack([keys[:, :1] & _WORD, keys[:, :1] >> 32 & _WORD], dim=-1)
    return philox_4x32(counter, key).flatten(1)[:, :num_words]


def _paired_words(keys: Tensor, step: Tensor, stream: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return the words (r0, r2) and (r1, r3), each int64 [2, N, groups].

    The two halves of Philox's state do the same arithmetic, so they are rows of one tensor: half as many, larger
    operations, which is what counts on the CPU in a sampling loop. All constants are made on the device, so that a
    CUDA graph can capture this.
    """
    row = torch.arange(2, device=keys.device).view(2, 1, 1)
    rounds = torch.arange(_ROUNDS, device=keys.device).view(_ROUNDS, 1, 1, 1)
    multiplier = row * (_MULTIPLIERS[1] - _MULTIPLIERS[0]) + _MULTIPLIERS[0]
    weyl = row * (_WEYL[1] - _WEYL[0]) + _WEYL[0]
    round_keys = (keys[:, :1] >> 32 * row) + rounds * weyl & _WORD  # [rounds, 2, N, 1]
    group = torch.arange(groups, device=keys.device)
    even = torch.where(row == 0, group, step & _WORD)  # counter words 0 and 2
    odd = torch.where(row == 0, keys[:, 1:] & _WORD, stream)  # counter words 1 and 3
    for round_key in round_keys.unbind(0):
        product = (even * multiplier).flip(0)
        even = (product >> 32) ^ odd ^ round_key
        even, odd = even & _WORD, product  # odd's upper half is garbage, which the next mask drops
    return even, odd & _WORD


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Return pairs, [2, N, groups] twice, as [N, 4 * groups], in the order of the elements."""
    return torch.stack([first[0], second[0], first[1], second[1]], dim=-1).flatten(1)


def _step_tensor(step: int | Tensor, keys: Tensor) -> Tensor:
    if isinstance(step, Tensor):
        check_step(step, keys.device)
        return step
    if not 0 <= step <= _WORD:
        raise ValueError(f"step is {step}, must be in [0, 2^32)")
    return torch.full((1,), step, dtype=torch.int64, device=keys.device)


def _check_stream(stream: int) -> None:
    if not 0 <= stream <= _WORD:
        raise ValueError(f"stream is {stream}, must be in [0, 2^32)")


_SCHEMA = "(Tensor keys, Tensor step, int stream, int numel) -> Tensor"


@torch.library.custom_op("fastddpm::normal", mutates_args=(), schema=_SCHEMA)
def _normal_op(keys: Tensor, step: Tensor, stream: int, numel: int) -> Tensor:
    from fastddpm_kernels.philox.triton import fill

    return fill(keys, step, stream, numel, torch.float32)


@_normal_op.register_fake
def _(keys: Tensor, step: Tensor, stream: int, numel: int) -> Tensor:
    return keys.new_empty(keys.shape[0], numel, dtype=torch.float32)


@torch.library.custom_op("fastddpm::random_words", mutates_args=(), schema=_SCHEMA)
def _random_words_op(keys: Tensor, step: Tensor, stream: int, numel: int) -> Tensor:
    from fastddpm_kernels.philox.triton import fill

    return fill(keys, step, stream, numel, torch.int64)


@_random_words_op.register_fake
def _(keys: Tensor, step: Tensor, stream: int, numel: int) -> Tensor:
    return keys.new_empty(keys.shape[0], numel)
