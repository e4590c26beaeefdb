// Layer norm of the channels of every pixel, and the residual before it. A pixel's channels lie in the first cache, so the
// mean is known before the squares of what differs from it are summed.

#include <cmath>

#include "native/instruction.h"
#include "native/runtime.h"
#include "native/simd.h"

namespace fastddpm {
namespace {

constexpr long kItem = 8192;  // values

// sum of f(vector of x) over a pixel; f gets zeros beyond the last channel, and the number of channels that there are.
template <class Element, class F>
inline float sum_channels(const Element* x, long channels, const F& f) {
    Vec sums[4] = {};
    long c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] += f(load(x + c + j * kLanes), kLanes);
    for (; c < channels; c += kLanes) sums[0] += f(load_some(x + c, channels - c), channels - c);
    const Vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += all[lane];
    return total;
}

template <class Element>
void layer_norm(
    Element* y, const Element* x, const Element* residual, Element* total, const float* weight, const float* bias,
    long channels, float eps) {
    if (residual) {
        for (long c = 0; c < channels; c += kLanes)
            store_some(total + c, load_some(x + c, channels - c) + load_some(residual + c, channels - c), channels - c);
        x = total;
    }
    const float count = static_cast<float>(channels);
    const float mean = sum_channels(x, channels, [](Vec v, long) { return v; }) / count;
    const float squares = sum_channels(x, channels, [=](Vec v, long present) {
        Vec d = v - mean;
        for (long lane = std::max<long>(present, 0); lane < kLanes; ++lane) d[lane] = 0;
        return d * d;
    });
    const float inverse = 1.0f / std::sqrt(squares / count + eps);
    for (long c = 0; c < channels; c += kLanes) {
        const long lanes = channels - c;
        const Vec value = (load_some(x + c, lanes) - mean) * inverse;
        store_some(y + c, value * load_some(weight + c, lanes) + load_some(bias + c, lanes), lanes);
    }
}

}  // namespace
}  // namespace fastddpm

// y [P, C] = layer_norm(x + residual) * weight [C] + bias [C], and total = x + residual; residual and total may both be
// null. All are floats; with `bfloat16`, y, x, residual and total are bfloat16.
extern "C" void fastddpm_layer_norm(
    void* y, const void* x, const void* residual, void* total, const float* weight, const float* bias, long pixels,
    long channels, float eps, int bfloat16, int threads) {
    using namespace fastddpm;
    with_element(bfloat16, [&](auto element) {
        using Element = decltype(element);
        const long together = std::max<long>(1, kItem / channels);
        for_each(ceil_div(pixels, together), threads, [&](long item) {
            for (long p = item * together; p < std::min(pixels, (item + 1) * together); ++p) {
                const long at = p * channels;
                layer_norm(
                    static_cast<Element*>(y) + at, static_cast<const Element*>(x) + at,
                    residual ? static_cast<const Element*>(residual) + at : nullptr,
                    total ? static_cast<Element*>(total) + at : nullptr, weight, bias, channels, eps);
            }
        });
    });
}
FASTDDPM_INSTRUCTION(fastddpm_layer_norm)
