// Group norm, Mish, FiLM and residual of sequences, channels-last; an item is a group of a sample.

#include <cmath>

#include "native/instruction.h"
#include "native/runtime.h"
#include "native/simd.h"

namespace fastddpm {
namespace {

// v tanh(log(1 + e^v)) = v n / (n + 2) with n = e^v (e^v + 2). From 20 on the factor is 1 in float32.
inline Vec mish(Vec v) {
    const Vec e = exp(v < 20.0f ? v : broadcast(20.0f));
    const Vec n = e * (e + 2.0f);
    return v * (n / (n + 2.0f));
}

inline double sum_of(Vec v, long lanes) {
    double sum = 0;
    for (long lane = 0; lane < std::min<long>(lanes, kLanes); ++lane) sum += v[lane];
    return sum;
}

template <class Element>
struct Arguments {
    Element* y;
    const Element *x, *residual;
    const float *weight, *bias, *scale, *shift;
    long scale_stride, shift_stride, n, pixels, channels, groups;
    float eps;
};

template <class Element>
void normalise(const Arguments<Element>& a, long sample, long group) {
    const long size = a.channels / a.groups, first = group * size, start = sample * a.pixels * a.channels + first;
    const long last = (size - 1) % kLanes + 1;  // lanes of the last vector
    // The sum over all values of f(value): of a pixel in float32, of pixels in float64.
    const auto sum_all = [&](const auto& f) {
        double sum = 0;
        for (long p = 0; p < a.pixels; ++p) {
            const Element* row = a.x + start + p * a.channels;
            Vec lanes = zero();
            long c = 0;
            for (; c + kLanes < size; c += kLanes) lanes += f(load(row + c));
            sum += sum_of(lanes, kLanes) + sum_of(f(load_some(row + c, last)), last);
        }
        return sum / static_cast<double>(a.pixels * size);
    };
    const float mean = static_cast<float>(sum_all([](Vec v) { return v; }));
    const double variance = sum_all([=](Vec v) { return (v - mean) * (v - mean); });
    const float inverse = static_cast<float>(1 / std::sqrt(variance + a.eps));
    const float* scale = a.scale ? a.scale + sample * a.scale_stride : nullptr;
    const float* shift = a.shift ? a.shift + sample * a.shift_stride : nullptr;
    for (long c = 0; c < size; c += kLanes) {
        const long lanes = std::min<long>(kLanes, size - c), channel = first + c;
        const Vec factor = load_some(a.weight + channel, lanes) * inverse, offset = load_some(a.bias + channel, lanes);
        const Vec times = scale ? load_some(scale + channel, lanes) : broadcast(1.0f);
        const Vec plus = shift ? load_some(shift + channel, lanes) : zero();
        for (long p = 0; p < a.pixels; ++p) {
            const long at = start + p * a.channels + c;
            Vec value = mish((load_some(a.x + at, lanes) - mean) * factor + offset) * times + plus;
            if (a.residual) value += load_some(a.residual + at, lanes);
            store_some(a.y + at, value, lanes);
        }
    }
}

}  // namespace
}  // namespace fastddpm

// y = mish(group_norm(x)) * scale + shift + residual, all [N, P, C]; weight and bias [C]; scale and shift are N rows of C,
// a stride apart. scale, shift and residual may be null. All are floats; with `bfloat16`, y, x and residual are bfloat16.
extern "C" void fastddpm_group_norm_mish(
    void* y, const void* x, const void* residual, const float* weight, const float* bias, const float* scale,
    const float* shift, long scale_stride, long shift_stride, long n, long pixels, long channels, long groups, float eps,
    int bfloat16, int threads) {
    using namespace fastddpm;
    with_element(bfloat16, [&](auto element) {
        using Element = decltype(element);
        const Arguments<Element> args{
            static_cast<Element*>(y), static_cast<const Element*>(x), static_cast<const Element*>(residual), weight,
            bias, scale, shift, scale_stride, shift_stride, n, pixels, channels, groups, eps};
        for_each(n * groups, threads, [&](long i) { normalise(args, i / groups, i % groups); });
    });
}
FASTDDPM_INSTRUCTION(fastddpm_group_norm_mish)
