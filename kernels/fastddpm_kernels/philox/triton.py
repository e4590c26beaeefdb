"""Make noise in registers, for all kernels that need it, and provide a kernel that only writes it.

Box-Muller without the library's sin, cos and log: those of CUDA reduce any angle, which costs a stack frame, or are
the fast approximations, which are wrong near u = 1 and near the zeros of sin and cos. Here the angle is known to be
a fraction of a turn, so that reducing it to [-1/8, 1/8] turn is exact in float32; what is left are polynomials,
fitted (Remez, coefficients rounded to float32 one after the other) to the relative errors stated.

Multiply-adds are explicit, and launches forbid the compiler to fuse others. So every specialisation of every kernel
(batch of one, channels-last, another GPU) makes the same noise and the same results, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels.device.strided import (
    AOT,
    MOST_BLOCK,
    block_and_warps,
    elements,
    launch_options,
    num_programs,
    on_device_of,
)
from fastddpm_kernels.device.variant import Variant


@triton.jit
def _products(c0, c2):
    """Return the halves of the 64-bit products of two words with Philox's multipliers: (hi0, lo0, hi2, lo2).

    One wide product has both halves in one instruction, where a product and `umulhi` are two.
    """
    p0 = c0.to(tl.uint64) * 0xD2511F53
    p2 = c2.to(tl.uint64) * 0xCD9E8D57
    return (p0 >> 32).to(tl.uint32), p0.to(tl.uint32), (p2 >> 32).to(tl.uint32), p2.to(tl.uint32)


@triton.jit
def words(seed, index, step, stream, group):
    """Return the four words (uint32) of Philox-4x32-10 of every counter (group, index, step, stream).

    `seed`, `index` and `step` are int64 scalars, `stream` an integer constant, `group` a block of int32. What does not
    depend on `group` stays a scalar: the keys of all rounds, and half of the first two.
    """
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = group.to(tl.uint32, bitcast=True)
    c1 = index.to(tl.uint32)
    c2 = step.to(tl.uint32)
    c3 = tl.full((), stream, tl.uint32)
    for _ in tl.static_range(10):
        hi0, lo0, hi2, lo2 = _products(c0, c2)
        c0 = hi2 ^ (c1 ^ k0)
        c2 = hi0 ^ (c3 ^ k1)
        c1 = lo2
        c3 = lo0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def radius_squared(u):
    """Return -2 log(u) of a normal float32 in (0, 1], to 2 ulp, without cancellation near 1."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000  # of u = m 2^e with m in [sqrt(1/2), sqrt(2)): e 2^23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # -2 log(1 + f) = f p(f), relative error 3.0e-8
    p = tl.fma(f, -0.17477846145629883, 0.2861574590206146)
    p = tl.fma(p, f, -0.2983278036117554)
    p = tl.fma(p, f, 0.33140608668327332)
    p = tl.fma(p, f, -0.39924472570419312)
    p = tl.fma(p, f, 0.50003552436828613)
    p = tl.fma(p, f, -0.66667890548706055)
    p = tl.fma(p, f, 0.99999982118606567)
    p = tl.fma(p, f, -2.0)
    # log(2) rounded to float32 is right to 2.7e-9.
    return tl.fma(exponent.to(tl.float32), -1.6525916635146132e-07, f * p)


@triton.jit
def box_muller(radius_word, angle_word):
    """Return two blocks of standard normals (float32) from two blocks of words: see `fastddpm_kernels.philox`."""
    u = tl.fma(radius_word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2^-32, 2^-33
    # The hardware's square root is accurate to 2^-23. A Newton step on its inverse nearly halves the error.
    squared = radius_squared(u)
    inverse = tl.rsqrt(tl.maximum(squared, 1e-30))  # 0 at u = 1 stays 0
    radius = squared * inverse
    radius = tl.fma(tl.fma(-radius, radius, squared), 0.5 * inverse, radius)

    # The angle is k half turns and h quarter turns, h in [-1, 1]; k changes the sign of both normals.
    angle = angle_word.to(tl.float32)
    shifted = tl.fma(angle, 9.313225746154785e-10, 25165824.0)  # 2^-30, 1.5 * 2^24: rounds to 2 k, k the lowest bit
    h = tl.fma(angle, 9.313225746154785e-10, 25165824.0 - shifted)  # exact
    h2 = h * h
    # sin(pi/2 h) = h s(h^2), relative error 2.9e-8 (nearly all of it the rounding of pi/2)
    s = tl.fma(h2, 0.000155929708853364, -0.004683104809373617)
    s = tl.fma(s, h2, 0.0796959325671196)
    s = tl.fma(s, h2, -0.6459650993347168)
    s = tl.fma(s, h2, 1.5707963705062866)
    # cos(pi/2 h) = (1 - h^2) c(h^2), relative error 5.0e-9: the zeros are in the factor, which is rounded once
    c = tl.fma(h2, 2.3166903702076524e-05, -0.0008927236776798964)
    c = tl.fma(c, h2, 0.019968155771493912)
    c = tl.fma(c, h2, -0.2337004393339157)
    c = tl.fma(c, h2, 1.0)
    sign = shifted.to(tl.int32, bitcast=True) << 31
    radius = (radius.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return (radius * tl.fma(-h, h, 1.0)) * c, (radius * h) * s


@triton.jit
def normals(key, step, stream, first_element, BLOCK: tl.constexpr):
    """Return elements first_element .. first_element + BLOCK - 1 (multiples of 4) of a sample's noise, float32.

    `key` points to the sample's (seed, index); `step` is an int64 scalar.
    """
    group = first_element // 4 + tl.arange(0, BLOCK // 4)
    r0, r1, r2, r3 = words(tl.load(key), tl.load(key + 1), step, stream, group)
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def box_muller_kernel(cos, sin, radius_words, angle_words, count, BLOCK: tl.constexpr):
    """Write `box_muller` of given words (int64), for tests."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    r = tl.load(radius_words + i, mask=mask, other=0).to(tl.uint32)
    a = tl.load(angle_words + i, mask=mask, other=0).to(tl.uint32)
    z0, z1 = box_muller(r, a)
    tl.store(cos + i, z0, mask=mask)
    tl.store(sin + i, z1, mask=mask)


@triton.jit
def _fill(result, keys, step, stream, numel, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(numel, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    element = elements(first, BLOCK)
    key = keys + 2 * n
    if WORDS:
        group = first // 4 + tl.arange(0, BLOCK // 4)
        r0, r1, r2, r3 = words(tl.load(key), tl.load(key + 1), tl.load(step), stream, group)
        value = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3)).to(tl.int64)
    else:
        value = normals(key, tl.load(step), stream, first, BLOCK)
    tl.store(result + n * numel + element, value, mask=element < numel)


def fill(keys: Tensor, step: Tensor, stream: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Return [N, numel] normals (`dtype` float32) or words (int64). `keys` int64 [N, 2], `step` int64 [1]."""
    result = torch.empty(keys.shape[0], numel, dtype=dtype, device=keys.device)
    if result.numel() == 0:
        return result
    block, _ = block_and_warps(None, len(keys), numel, keys.device)
    with on_device_of(keys):
        _fill[(num_programs(keys.shape[0], numel, block),)](
            result,
            keys.contiguous(),
            step,
            stream,
            numel,
            WORDS=dtype == torch.int64,
            BLOCK=block,
            **launch_options(keys.device),
        )
    return result


def aot_variants() -> list[Variant]:
    """Return the variants of normals and of words."""
    return [
        Variant(
            f"philox.fill[{name}]",
            _fill,
            {"result": pointer, "keys": "*i64", "step": "*i64", "stream": "i32", "numel": "i32"},
            {"WORDS": name == "words", "BLOCK": MOST_BLOCK},
            divisible=("numel",),
            **AOT,
        )
        for name, pointer in (("normal", "*fp32"), ("words", "*i64"))
    ]
