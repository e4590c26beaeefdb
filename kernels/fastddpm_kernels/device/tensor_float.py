"""Round float32 to TensorFloat-32 in kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_tf32(x):
    """Return x rounded to TensorFloat-32, ties away from zero: the hardware would truncate and shrink every product."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # the carry could make a number of NaN
