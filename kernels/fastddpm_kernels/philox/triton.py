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

from fastddpm_kernels.device.strided import AOT, BLOCK, launch_options, num_programs, on_device_of
from fastddpm_kernels.device.variant import Variant


@triton.jit
def words(seed, index, step, stream, group):
    """Return the four words (uint32) of Philox-4x32-10 of every counter (group, index, step, stream).

    `seed`, `index` and `step` are int64 scalars, `stream` an integer constant, `group` a block of int32.
    """
    c0 = group.to(tl.uint32, bitcast=True)
    zero = c0 * 0
    return tl.philox(seed, c0, zero + index.to(tl.uint32), zero + step.to(tl.uint32), (zero + stream).to(tl.uint32))


@triton.jit
def log_unit(u):
    """Return the natural logarithm of a normal float32 in (0, 1], to 1 ulp, without cancellation near 1."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # u = m 2^exponent with m in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    # log(1 + f) = f + f^2 p(f), relative error 4.2e-9
    p = tl.fma(f, -0.0762317031621933, 0.12914729118347168)
    p = tl.fma(p, f, -0.13247500360012054)
    p = tl.fma(p, f, 0.141805961728096)
    p = tl.fma(p, f, -0.16608430445194244)
    p = tl.fma(p, f, 0.20002013444900513)
    p = tl.fma(p, f, -0.25001609325408936)
    p = tl.fma(p, f, 0.33333325386047363)
    p = tl.fma(p, f, -0.49999988079071045)
    e = exponent.to(tl.float32)
    # log(2) in two parts, the first so short that its product with the exponent is exact.
    return tl.fma(e, 0.693359375, f + tl.fma(f * f, p, e * -2.12194440e-4))


@triton.jit
def box_muller(radius_word, angle_word):
    """Return two blocks of standard normals (float32) from two blocks of words: see `fastddpm_kernels.philox`."""
    u = tl.fma(radius_word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2^-32, 2^-33
    # The hardware's square root is accurate to 2^-23. A Newton step on its inverse nearly halves the error.
    squared = -2.0 * log_unit(u)
    inverse = tl.rsqrt(tl.maximum(squared, 1e-30))  # 0 at u = 1 stays 0
    radius = squared * inverse
    radius = tl.fma(tl.fma(-radius, radius, squared), 0.5 * inverse, radius)

    turns4 = angle_word.to(tl.float32) * 9.313225746154785e-10  # 2^-30: the angle in quarter turns, in [0, 4]
    shifted = turns4 + 12582912.0  # 1.5 * 2^23: rounds to an integer, held in the lowest bits
    quarter = shifted.to(tl.int32, bitcast=True)
    f = turns4 - (shifted - 12582912.0)  # exact, in [-1/2, 1/2]
    f2 = f * f
    # sin(pi/2 f) = f s(f^2), relative error 2.8e-8 (nearly all of it the rounding of pi/2)
    s = tl.fma(f2, -0.004685971885919571, 0.07971252501010895)
    s = tl.fma(s, f2, -0.645966649055481)
    s = tl.fma(s, f2, 1.5707963705062866)
    s = s * f
    # cos(pi/2 f) = 1 + f^2 c(f^2), relative error 4.4e-10
    c = tl.fma(f2, 0.0008944863802753389, -0.020855596289038658)
    c = tl.fma(c, f2, 0.25366854667663574)
    c = tl.fma(c, f2, -1.2337005138397217)
    c = tl.fma(c, f2, 1.0)

    odd = (quarter & 1) != 0
    cos = tl.where(odd, s, c).to(tl.int32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    sin = tl.where(odd, c, s).to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)
    return radius * cos.to(tl.float32, bitcast=True), radius * sin.to(tl.float32, bitcast=True)


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
    element = first + tl.arange(0, BLOCK)
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
    with on_device_of(keys):
        _fill[(num_programs(keys.shape[0], numel),)](
            result,
            keys.contiguous(),
            step,
            stream,
            numel,
            WORDS=dtype == torch.int64,
            BLOCK=BLOCK,
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
            {"WORDS": name == "words", "BLOCK": BLOCK},
            divisible=("numel",),
            **AOT,
        )
        for name, pointer in (("normal", "*fp32"), ("words", "*i64"))
    ]
