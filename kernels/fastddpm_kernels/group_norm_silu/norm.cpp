// Group norm and RMS norm with what surrounds them, channels-last.
//
// Statistics are those of chunks of pixels that lie in the first cache: a chunk's mean, then the squares of what
// differs from it; chunks are combined as Chan, Golub & LeVeque (1979) do, around the mean of all. Never E[x^2] - E[x]^2.
// Chunks do not depend on the number of threads, so the results do not either.

#include <cmath>

#include "native/instruction.h"
#include "native/runtime.h"
#include "native/simd.h"

namespace fastddpm {
namespace {

template <class Element>
struct Norm {
    Element* y;
    const Element *x, *x2, *residual;
    Element* total;
    const float *weight, *bias, *time_bias, *scale, *shift;  // [C + C2], and rows of as many
    long time_stride, scale_stride, shift_stride;            // from sample to sample
    long n, pixels, channels, channels2, groups;
    float eps;
    bool silu;
    int threads;
    float *mean, *rstd;  // [N, groups] to be written, for gradients, or null
};

constexpr long kChunk = 4096, kFewValues = 1024;  // values of a chunk, and of one of a small image

inline long padded(long channels) { return ceil_div(channels, kLanes) * kLanes; }

// sums[c] = sum over pixels of f(x[pixel][c], c), for W vectors of channels from `c` on. `lanes`: of the last.
template <int W, class Element, class F>
inline void sum_pixels(const Element* x, long channels, long count, long c, long lanes, float* sums, const F& f) {
    Vec sum[W] = {};
    for (long p = 0; p < count; ++p)
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) {
            const Element* place = x + p * channels + c + j * kLanes;
            sum[j] += f(j + 1 < W ? load(place) : load_some(place, lanes), j);
        }
    for (int j = 0; j < W; ++j) store(sums + c + j * kLanes, sum[j]);
}

// The same for all channels; `f(value, means)`. Writes whole vectors of `sums`.
template <class Element, class F>
inline void sum_all(const Element* x, long channels, long count, const float* means, float* sums, const F& f) {
    long c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
        Vec mean[4];
        for (int j = 0; j < 4; ++j) mean[j] = means ? load(means + c + j * kLanes) : zero();
        sum_pixels<4>(x, channels, count, c, kLanes, sums, [&](Vec v, int j) { return f(v, mean[j]); });
    }
    for (; c < channels; c += kLanes) {
        const long lanes = std::min<long>(kLanes, channels - c);
        const Vec mean = means ? load_some(means + c, lanes) : zero();
        sum_pixels<1>(x, channels, count, c, lanes, sums, [&](Vec v, int) { return f(v, mean); });
    }
}

template <class Element>
class GroupNorm {
    const Norm<Element>& a;
    const long all, size, chunk, chunks, row;  // channels; of a group; pixels of a chunk; chunks of a sample; of a row

  public:
    explicit GroupNorm(const Norm<Element>& args)
        : a(args),
          all(a.channels + a.channels2),
          size(all / a.groups),
          chunk(std::max<long>(16, (a.pixels * all < 8 * kChunk ? kFewValues : kChunk) / all)),
          chunks(ceil_div(a.pixels, chunk)),
          row(padded(all) + kLanes) {}

    void run() const {
        const long parts = 2 * a.groups;
        float* moments = scratch<float>(Slot::kShared, a.n * (chunks * parts + 3 * row));
        float* rows = moments + a.n * chunks * parts;
        if (a.n >= 2 * a.threads || a.threads == 1) {  // a sample at a time: the second pass finds it in the cache
            for_each(a.n, a.threads, [&](long n) {
                for (long i = 0; i < chunks; ++i) measure(n, i, moments + (n * chunks + i) * parts);
                prepare(n, moments + n * chunks * parts, rows + n * 3 * row);
                for (long i = 0; i < chunks; ++i) apply(n, i, rows + n * 3 * row);
            });
            return;
        }
        for_each(a.n * chunks, a.threads, [&](long i) { measure(i / chunks, i % chunks, moments + i * parts); });
        for_each(a.n, a.threads, [&](long n) { prepare(n, moments + n * chunks * parts, rows + n * 3 * row); });
        for_each(a.n * chunks, a.threads, [&](long i) { apply(i / chunks, i % chunks, rows + i / chunks * 3 * row); });
    }

  private:
    // Of every group in chunk `index` of sample `n`: the mean and the sum of squared differences. Writes the total.
    void measure(long n, long index, float* moments) const {
        const long first = index * chunk, count = std::min(chunk, a.pixels - first), start = n * a.pixels + first;
        float* sums = scratch<float>(Slot::kOutput, 2 * row);
        float* means = sums + row;
        const Element* x = (a.residual ? a.total : a.x) + start * a.channels;
        const Element* x2 = a.x2 + start * a.channels2;
        if (a.residual) add(start * a.channels, count * a.channels);
        sum_all(x, a.channels, count, nullptr, sums, [](Vec v, Vec) { return v; });
        if (a.channels2) sum_all(x2, a.channels2, count, nullptr, sums + a.channels, [](Vec v, Vec) { return v; });
        const float* time = a.time_bias ? a.time_bias + n * a.time_stride : nullptr;
        for (long g = 0; g < a.groups; ++g) {
            float sum = 0;
            for (long c = g * size; c < (g + 1) * size; ++c) sum += sums[c] + (time ? count * time[c] : 0.0f);
            const float mean = sum / static_cast<float>(count * size);
            moments[2 * g] = mean;
            for (long c = g * size; c < (g + 1) * size; ++c) means[c] = mean - (time ? time[c] : 0.0f);
        }
        const auto squared = [](Vec v, Vec mean) { return (v - mean) * (v - mean); };
        sum_all(x, a.channels, count, means, sums, squared);
        if (a.channels2) sum_all(x2, a.channels2, count, means + a.channels, sums + a.channels, squared);
        for (long g = 0; g < a.groups; ++g) {
            float sum = 0;
            for (long c = g * size; c < (g + 1) * size; ++c) sum += sums[c];
            moments[2 * g + 1] = sum;
        }
    }

    void add(long start, long count) const {
        for (long i = 0; i < count; i += kLanes) {
            const long at = start + i, lanes = std::min<long>(kLanes, count - i);
            store_some(a.total + at, load_some(a.x + at, lanes) + load_some(a.residual + at, lanes), lanes);
        }
    }

    // Rows means, factors, offsets: the norm and FiLM are (x - mean) * factor + offset.
    void prepare(long n, const float* moments, float* rows) const {
        float *means = rows, *factors = rows + row, *offsets = rows + 2 * row;
        const float* time = a.time_bias ? a.time_bias + n * a.time_stride : nullptr;
        const float* scale = a.scale ? a.scale + n * a.scale_stride : nullptr;
        const float* shift = a.shift ? a.shift + n * a.shift_stride : nullptr;
        const double count = static_cast<double>(a.pixels * size);
        for (long g = 0; g < a.groups; ++g) {
            double mean = 0, squares = 0;
            for (long i = 0; i < chunks; ++i) mean += values_of(i) * moments[(i * a.groups + g) * 2];
            mean /= count;
            for (long i = 0; i < chunks; ++i) {
                const float* part = moments + (i * a.groups + g) * 2;
                squares += part[1] + values_of(i) * (part[0] - mean) * (part[0] - mean);
            }
            const double inverse = 1 / std::sqrt(squares / count + a.eps);
            if (a.mean) {
                a.mean[n * a.groups + g] = static_cast<float>(mean);
                a.rstd[n * a.groups + g] = static_cast<float>(inverse);
            }
            for (long c = g * size; c < (g + 1) * size; ++c) {
                const double film = scale ? 1.0 + scale[c] : 1.0;
                means[c] = static_cast<float>(mean - (time ? time[c] : 0.0f));
                factors[c] = static_cast<float>(a.weight[c] * inverse * film);
                offsets[c] = static_cast<float>(a.bias[c] * film + (shift ? shift[c] : 0.0f));
            }
        }
    }

    // Values of a group in a chunk.
    double values_of(long index) const { return static_cast<double>(std::min(chunk, a.pixels - index * chunk) * size); }

    void apply(long n, long index, const float* rows) const {
        const long first = index * chunk, count = std::min(chunk, a.pixels - first), start = n * a.pixels + first;
        const Element* x = a.residual ? a.total : a.x;
        for (long p = start; p < start + count; ++p) {
            apply_pixel(x + p * a.channels, a.channels, rows, a.y + p * all);
            if (a.channels2) apply_pixel(a.x2 + p * a.channels2, a.channels2, rows + a.channels, a.y + p * all + a.channels);
        }
    }

    void apply_pixel(const Element* x, long channels, const float* rows, Element* y) const {
        for (long c = 0; c < channels; c += kLanes) {
            const long lanes = channels - c;
            const Vec value = (load_some(x + c, lanes) - load(rows + c)) * load(rows + row + c) + load(rows + 2 * row + c);
            store_some(y + c, a.silu ? silu(value) : value, lanes);
        }
    }
};

template <class Element>
class RmsNorm {
    const Norm<Element>& a;
    const long all, chunk;

  public:
    explicit RmsNorm(const Norm<Element>& args)
        : a(args), all(a.channels + a.channels2), chunk(std::max<long>(1, 4 * kChunk / all)) {}

    void run() const {
        const long pixels = a.n * a.pixels;
        for_each(ceil_div(pixels, chunk), a.threads, [&](long i) {
            for (long p = i * chunk; p < std::min(pixels, (i + 1) * chunk); ++p) apply(p);
        });
    }

  private:
    void apply(long p) const {
        const long n = p / a.pixels;
        const Element *x = a.x + p * a.channels, *x2 = a.x2 + p * a.channels2;
        const float squares = sum_of_squares(x, a.channels) + (a.channels2 ? sum_of_squares(x2, a.channels2) : 0.0f);
        const float factor = std::sqrt(static_cast<float>(all)) / std::max(std::sqrt(squares), a.eps);
        const float* scale = a.scale ? a.scale + n * a.scale_stride : nullptr;
        const float* shift = a.shift ? a.shift + n * a.shift_stride : nullptr;
        write(x, a.channels, 0, factor, scale, shift, p);
        if (a.channels2) write(x2, a.channels2, a.channels, factor, scale, shift, p);
    }

    static float sum_of_squares(const Element* x, long channels) {
        Vec sum = zero();
        for (long c = 0; c < channels; c += kLanes) {
            const Vec value = load_some(x + c, channels - c);
            sum += value * value;
        }
        float result = 0;
        for (int lane = 0; lane < kLanes; ++lane) result += sum[lane];
        return result;
    }

    void write(
        const Element* x, long channels, long offset, float factor, const float* scale, const float* shift,
        long p) const {
        for (long c = 0; c < channels; c += kLanes) {
            const long at = offset + c, lanes = channels - c;
            Vec value = load_some(x + c, lanes) * factor * load_some(a.weight + at, lanes);
            if (scale) value = value * (1.0f + load_some(scale + at, lanes)) + load_some(shift + at, lanes);
            if (a.silu) value = silu(value);
            if (a.residual) value += load_some(a.residual + p * all + at, lanes);
            store_some(a.y + p * all + at, value, lanes);
        }
    }
};

}  // namespace
}  // namespace fastddpm

// y [N, P, C + C2] = silu(group_norm(concat(x + residual, x2) + time_bias) * (1 + scale) + shift), with x, residual and
// total = x + residual [N, P, C], x2 [N, P, C2], weight and bias [C + C2]; time_bias, scale and shift are N rows of
// C + C2, a stride apart. What may be left out is null: x2 (C2 = 0), residual (with total), time_bias, scale, shift; and
// mean and rstd [N, groups], the statistics of all that is normalised. All are floats; with `bfloat16`, y, x, x2,
// residual and total are bfloat16.
extern "C" void fastddpm_group_norm(
    void* y, const void* x, const void* x2, const void* residual, void* total, const float* weight, const float* bias,
    const float* time_bias, const float* scale, const float* shift, long time_stride, long scale_stride,
    long shift_stride, long n, long pixels, long channels, long channels2, long groups, float eps, int silu,
    int bfloat16, int threads, float* mean, float* rstd) {
    using namespace fastddpm;
    with_element(bfloat16, [&](auto element) {
        using Element = decltype(element);
        const Norm<Element> args{
            static_cast<Element*>(y), static_cast<const Element*>(x), static_cast<const Element*>(x2),
            static_cast<const Element*>(residual), static_cast<Element*>(total), weight, bias, time_bias, scale, shift,
            time_stride, scale_stride, shift_stride, n, pixels, channels, channels2, groups, eps, silu != 0, threads,
            mean, rstd};
        GroupNorm<Element>(args).run();
    });
}
FASTDDPM_INSTRUCTION(fastddpm_group_norm)

// y = silu(h / max(|h|, eps) * sqrt(C + C2) * weight * (1 + scale) + shift) + residual, h = concat(x, x2) at a pixel;
// residual [N, P, C + C2]. With `bfloat16`, y, x, x2 and residual are bfloat16.
extern "C" void fastddpm_rms_norm(
    void* y, const void* x, const void* x2, const void* residual, const float* weight, const float* scale,
    const float* shift, long scale_stride, long shift_stride, long n, long pixels, long channels, long channels2,
    float eps, int silu, int bfloat16, int threads) {
    using namespace fastddpm;
    with_element(bfloat16, [&](auto element) {
        using Element = decltype(element);
        const Norm<Element> args{
            static_cast<Element*>(y), static_cast<const Element*>(x), static_cast<const Element*>(x2),
            static_cast<const Element*>(residual), nullptr, weight, nullptr, nullptr, scale, shift, 0, scale_stride,
            shift_stride, n, pixels, channels, channels2, 1, eps, silu != 0, threads, nullptr, nullptr};
        RmsNorm<Element>(args).run();
    });
}
FASTDDPM_INSTRUCTION(fastddpm_rms_norm)
