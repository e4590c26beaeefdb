"""The generator against published numbers, the normals against their formula, and what makes noise reproducible."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fastddpm_kernels.philox import (
    STREAM_INITIAL,
    STREAM_KNOWN,
    STREAM_Q_SAMPLE,
    STREAM_STEP,
    _box_muller,
    normal,
    philox_4x32,
    random_words,
    sample_keys,
)
from fastddpm_kernels.testing import check_compiles, check_refuses, poisoned_memory
from torch import Tensor

WORD = 0xFFFFFFFF

# kat_vectors of Random123 (github.com/DEShawResearch/random123), lines "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# (seed, sample index, step, stream): the ends of every range, and numbers with all sorts of bits.
COUNTERS = [
    (0, 0, 0, STREAM_INITIAL),
    (1, 0, 999, STREAM_STEP),
    (12345678901, 50_000, 3, STREAM_Q_SAMPLE),
    (2**31, 2**31, 2**31, STREAM_KNOWN),
    (2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
    (2**63 - 1, 7, 1, STREAM_STEP),
    (2**63, 8, 1, STREAM_STEP),
    (2**64 - 1, 9, 77, STREAM_STEP),
    (0xDEADBEEFCAFEF00D, 0x89ABCDEF, 0x80000001, STREAM_KNOWN),
]


def parse(text: str) -> Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute the generator once more, in Python's unbounded integers."""
    for _ in range(10):
        low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (high >> 32) ^ counter[1] ^ key[0],
            high & WORD,
            (low >> 32) ^ counter[3] ^ key[1],
            low & WORD,
        ]
        key = [key[0] + 0x9E3779B9 & WORD, key[1] + 0xBB67AE85 & WORD]
    return counter


def formula(radius_words: np.ndarray, angle_words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two normals of each pair of words, in float64 from u and a in float32, as they are defined."""
    u = (radius_words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
    a = (angle_words.astype(np.float32) * np.float32(2.0**-32)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u))
    return radius * np.cos(2 * np.pi * a), radius * np.sin(2 * np.pi * a)


def assert_within_ulps(actual: Tensor, expected: np.ndarray, ulps: float) -> None:
    """Assert that |actual - expected| <= ulps * (float32's unit in the last place of expected), + 2e-15.

    The 2e-15 is what float64 itself loses where cos or sin cross 0, which it never meets exactly.
    """
    values = actual.double().cpu().numpy()
    bound = ulps * np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64) + 2e-15
    excess = np.abs(values - expected) / bound
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess.max() <= 1, f"{excess.max() * ulps:.3g} ulp at {worst}: {values[worst]}, expected {expected[worst]}"


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    assert torch.equal(philox_4x32(parse(counter), parse(key)), parse(answer))


def test_counter_is_element_sample_step_stream() -> None:
    for seed, index, step, stream in COUNTERS:
        words = random_words(sample_keys([seed], [index]), step, stream, 9, backend="reference")[0].tolist()
        for group in range(3):
            expected = python_philox([group, index, step, stream], [seed & WORD, seed >> 32])
            assert words[4 * group : 4 * group + 4] == expected[: len(words) - 4 * group]


@pytest.mark.parametrize("place", range(len(COUNTERS)))
def test_words_are_equal_on_every_backend(backend: str, device: torch.device, place: int) -> None:
    *_, step, stream = COUNTERS[place]
    keys = sample_keys([c[0] for c in COUNTERS], [c[1] for c in COUNTERS], device)
    # Nothing, less than a group of four, and not a multiple of it; then several programs of one sample.
    for num_words, rows in ((0, keys), (1, keys), (7, keys), (600, keys[place : place + 1])):
        with poisoned_memory():
            words = random_words(rows, step, stream, num_words, backend=backend)
        assert words.dtype == torch.int64
        assert torch.equal(words, random_words(rows, step, stream, num_words, backend="reference"))
    on_device = torch.tensor([step], device=device)
    assert torch.equal(words, random_words(rows, on_device, stream, num_words, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"], indirect=True)
def test_normals_follow_the_formula(backend: str, device: torch.device) -> None:
    keys = sample_keys([3, 2**64 - 5], [0, 1], device)
    with poisoned_memory():
        z = normal(keys, (3, 41, 41), step=17, stream=STREAM_STEP, backend=backend)
    assert z.shape == (2, 3, 41, 41)
    assert z.dtype == torch.float32
    assert z.is_contiguous()
    words = random_words(keys, 17, STREAM_STEP, 5044, backend="reference").reshape(2, -1, 4).cpu().numpy()
    pairs = [*formula(words[..., 0], words[..., 1]), *formula(words[..., 2], words[..., 3])]
    expected = np.stack(pairs, -1).reshape(2, -1)[:, :5043]
    # torch computes in float64 and rounds; the kernel adds up the roundings of log, sqrt, cos and their product.
    assert_within_ulps(z.flatten(1), expected, 4 if backend == "triton" else 0.5001)


def edge_words() -> np.ndarray:
    """Return words at and around every eighth of a turn and every power of two, the ends, and many others."""
    eighths = [
        k * 2**29 + d for k in range(9) for d in (-257, -129, -128, -127, -65, -64, -1, 0, 1, 63, 64, 65, 128, 129)
    ]
    powers = [2**k + d for k in range(33) for d in (-2, -1, 0, 1, 2)]
    near_one = [2**32 - d for d in range(1, 2000)]
    edges = np.array([w for w in eighths + powers + near_one if 0 <= w <= WORD], dtype=np.int64)
    rest = np.random.default_rng(0).integers(0, 2**32, 2**15 - len(edges))
    return np.concatenate([edges, rest])


def test_device_math_at_the_edges(on_triton: torch.device) -> None:
    """The kernel's Box-Muller, given chosen words: near u = 1, u = 0 and the zeros of sin and cos."""
    from fastddpm_kernels.philox.triton import box_muller_kernel

    words = edge_words()
    angles = np.random.default_rng(1).permutation(words)
    for radius_words, angle_words in ((words, angles), (angles, words), (words, words)):
        r = torch.tensor(radius_words, device=on_triton)
        a = torch.tensor(angle_words, device=on_triton)
        cos, sin = torch.full((2, len(words)), math.nan, device=on_triton)
        box_muller_kernel[(-(-len(words) // 4096),)](cos, sin, r, a, len(words), BLOCK=4096)
        for actual, expected in zip((cos, sin), formula(radius_words, angle_words), strict=True):
            assert_within_ulps(actual, expected, 4)


def test_torch_math_without_float64() -> None:
    """Where a device has no float64 the angle is rounded, 2 pi 2^-25 in absolute terms, times a radius below 6.8."""
    words = torch.tensor(edge_words())
    for actual, expected in zip(
        _box_muller(words, words.flip(0), dtype=torch.float32),
        formula(words.numpy(), words.flip(0).numpy()),
        strict=True,
    ):
        assert actual.dtype == torch.float32
        assert np.abs(actual.double().numpy() - expected).max() < 4e-6


def test_noise_does_not_depend_on_batch_or_size(backend: str, device: torch.device) -> None:
    keys = sample_keys([5, 5, 6], [0, 1, 0], device)

    def make(keys: Tensor, *shape: int) -> Tensor:
        return normal(keys, shape, step=4, stream=STREAM_STEP, backend=backend)

    whole = make(keys, 3, 17, 11)
    assert torch.equal(whole, torch.cat([make(keys[:1], 3, 17, 11), make(keys[1:], 3, 17, 11)]))
    assert torch.equal(whole.flatten(1), make(keys, 561))
    assert torch.equal(whole.flatten(1)[:, :50], make(keys, 50))
    every_other = torch.stack([keys, keys], 1).flatten(0, 1)[::2]
    assert torch.equal(whole, make(every_other, 3, 17, 11))


def test_empty(backend: str, device: torch.device) -> None:
    keys = sample_keys([1, 2], [0, 1], device)
    for given, shape in ((keys[:0], (3, 4)), (keys, (0, 4))):
        assert normal(given, shape, step=0, stream=STREAM_STEP, backend=backend).shape == (len(given), *shape)
    assert normal(keys, (), step=0, stream=STREAM_STEP, backend=backend).shape == (2,)


def test_distribution() -> None:
    """4 x 2^18 normals. Moments and correlations within 5 standard errors: together less than one false alarm in 10^4.

    The seeds are fixed, so that this passes always or never.
    """
    n = 2**18
    keys = sample_keys([0, 0, 1, 2**63], [0, 1, 0, 0])
    z = normal(keys, (n,), step=0, stream=STREAM_STEP).double()
    error = 1 / math.sqrt(z.numel())
    assert abs(float(z.mean())) < 5 * error
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2) * error
    assert abs(float(z.pow(3).mean())) < 5 * math.sqrt(15) * error
    assert abs(float(z.pow(4).mean()) - 3) < 5 * math.sqrt(96) * error
    for threshold in (3.0, 4.0, 4.5):
        expected = z.numel() * math.erfc(threshold / math.sqrt(2))
        assert abs(int((z.abs() > threshold).sum()) - expected) < 5 * math.sqrt(expected)

    # Kolmogorov-Smirnov: sqrt(n) * distance exceeds 2.2 with probability 2 exp(-2 * 2.2^2) = 1.3e-4.
    ordered = z.flatten().sort().values
    cdf = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    grid = torch.arange(z.numel() + 1, dtype=torch.float64) / z.numel()
    distance = torch.maximum((cdf - grid[:-1]).abs().max(), (cdf - grid[1:]).abs().max())
    assert float(distance) * math.sqrt(z.numel()) < 2.2

    # Independent of other samples, steps, streams and neighbours, in value and in magnitude.
    one = z[0]
    others = [*z[1:], one.roll(1), one.roll(2), one.roll(4)]
    for step, stream in ((1, STREAM_STEP), (0, STREAM_INITIAL), (0, STREAM_KNOWN)):
        others.append(normal(keys[:1], (n,), step=step, stream=stream).double()[0])
    for other in others:
        assert abs(float((one * other).mean())) < 5 / math.sqrt(n)
        assert abs(float(((one**2 - 1) * (other**2 - 1)).mean())) < 5 * 2 / math.sqrt(n)


def test_compiles(backend: str, device: torch.device) -> None:
    def make(keys: Tensor, step: Tensor) -> Tensor:
        return normal(keys, (3, 5), step=step, stream=STREAM_STEP, backend=backend)

    check_compiles(make, sample_keys([1, 2**63], [0, 5], device), torch.tensor([3], device=device))


def test_custom_ops(on_triton: torch.device) -> None:
    keys, step = sample_keys([1, 2], [0, 5], on_triton), torch.tensor([3], device=on_triton)
    for op in (torch.ops.fastddpm.normal, torch.ops.fastddpm.random_words):
        torch.library.opcheck(op.default, (keys, step, STREAM_STEP, 21))


def test_sample_keys() -> None:
    keys = sample_keys([0, 2**63, 2**64 - 1], [0, 1, 2**32 - 1])
    assert keys.tolist() == [[0, 0], [-(2**63), 1], [-1, 2**32 - 1]]
    assert torch.equal(sample_keys(keys[:, 0], keys[:, 1]), keys)
    assert sample_keys(np.arange(2), range(2)).tolist() == [[0, 0], [1, 1]]
    assert sample_keys([], []).shape == (0, 2)


KEYS, LONG = sample_keys([0], [0]), torch.int64
GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    sample_keys: {"seeds": [0], "indices": [0]},
    normal: {"keys": KEYS, "shape": (3,), "step": 0, "stream": 0},
    random_words: {"keys": KEYS, "step": 0, "stream": 0, "num_words": 4},
    philox_4x32: {"counter": torch.zeros(4, dtype=LONG), "key": torch.zeros(2, dtype=LONG)},
}


@pytest.mark.parametrize(
    ("function", "error", "message", "changed"),
    [
        (sample_keys, ValueError, "seeds .*-1", {"seeds": [-1]}),
        (sample_keys, ValueError, "seeds .*18446744073709551616", {"seeds": [2**64]}),
        (sample_keys, ValueError, "indices .*4294967296", {"indices": [2**32]}),
        (sample_keys, ValueError, r"indices .*\[-1\]", {"indices": torch.tensor([-1])}),
        (sample_keys, ValueError, "indices .*2", {"indices": [0, 1]}),
        (sample_keys, TypeError, "", {"seeds": [0.5]}),
        (sample_keys, TypeError, "seeds .*int32", {"seeds": torch.zeros(1, dtype=torch.int32)}),
        (normal, TypeError, "keys .*float32", {"keys": KEYS.float()}),
        (normal, ValueError, "keys .*shape", {"keys": KEYS[0]}),
        (normal, ValueError, "step .*-1", {"step": -1}),
        (normal, TypeError, "step .*float32", {"step": torch.zeros(1)}),
        (normal, ValueError, "step .*shape", {"step": torch.zeros(2, dtype=LONG)}),
        (normal, ValueError, "stream .*4294967296", {"stream": 2**32}),
        (normal, ValueError, "backend .*fast", {"backend": "fast"}),
        (random_words, ValueError, "num_words .*-1", {"num_words": -1}),
        (philox_4x32, ValueError, "counter .*shape", {"counter": torch.zeros(3, dtype=LONG)}),
        (philox_4x32, ValueError, "key .*shape", {"key": torch.zeros(4, dtype=LONG)}),
        (philox_4x32, TypeError, "counter .*float32", {"counter": torch.zeros(4)}),
    ],
)
def test_bad_input(function: Callable[..., Any], error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(function, error, message, **GOOD[function] | changed)
