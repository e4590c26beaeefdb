// GELU, for the ops that have it.
#pragma once

#include "native/simd.h"

namespace fastddpm {

// g * Phi(g), the exact one. The upper tail Phi(-|g|) is e^(-g^2/2) times a polynomial of t = 1 / (1 + 0.3 |g|) whose largest
// relative error, 2e-7, is the least: so negative g lose nothing to 1 - 1.
inline Vec gelu(Vec g) {
    const Vec size = g < 0.0f ? -g : g, t = 1.0f / (1.0f + size * 0.3f);
    Vec p = t * 3.517818451e-2f - 1.551400721e-1f;
    p = p * t + 2.028124183e-1f;
    p = p * t - 5.044056475e-2f;
    p = p * t + 1.268567890e-1f;
    p = p * t + 1.004259512e-1f;
    p = p * t + 1.206726730e-1f;
    p = p * t + 1.196345314e-1f;
    const Vec tail = p * t * exp(size * size * -0.5f);
    return g * (g > 0.0f ? 1.0f - tail : tail);
}

}  // namespace fastddpm
