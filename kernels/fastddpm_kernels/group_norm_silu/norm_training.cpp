// The gradient of group norm with time bias, FiLM and SiLU, channels-last.
//
//     h = concat(x, x2) + time_bias,  u = (h - mean) * rstd,  v = u * a + b,  y = silu(v)
//     dv = dy * silu'(v)
//     dh = rstd * (a * dv - m1 - u * m2),  m1 and m2 the means over a group of a * dv and a * dv * u
//
// with a = weight * (1 + scale) and b = bias * (1 + scale) + shift. The first pass over a sample takes the sums over the
// pixels of dv, dv * u and u, from which all other gradients follow. It writes dv where dh will be, and the second pass
// finds it there; in bfloat16, which would round it once more, the second computes it anew. Sums are those of chunks, in
// float32, added in float64: they do not depend on the number of threads.

#include "native/runtime.h"
#include "native/simd.h"

namespace fastddpm {
namespace {

typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));

template <class Element>
struct NormGradient {
    Element *dx, *dx2;
    float* sums;  // [3, N, C + C2]
    const Element *dy, *x, *x2;
    const float *weight, *bias, *mean, *rstd, *time_bias, *scale, *shift;
    long time_stride, scale_stride, shift_stride;
    long n, pixels, channels, channels2, groups;
    bool silu;
    int threads;
};

constexpr long kChunk = 8192;  // values

template <class Element>
class GroupNormGradient {
    static constexpr bool kKept = sizeof(Element) == sizeof(float);  // dv, from the first pass to the second

    const NormGradient<Element>& a;
    const long all, size, chunk, chunks, row;  // channels; of a group; pixels of a chunk; chunks of a sample; of a row

  public:
    explicit GroupNormGradient(const NormGradient<Element>& args)
        : a(args),
          all(a.channels + a.channels2),
          size(all / a.groups),
          chunk(std::max<long>(16, kChunk / all)),
          chunks(ceil_div(a.pixels, chunk)),
          row(ceil_div(all, kLanes) * kLanes + 2 * kLanes) {}

    void run() const {
        const long block = (kRows + 3 * chunks) * row;
        float* rows = scratch<float>(Slot::kShared, a.n * block);
        if (a.n >= 2 * a.threads || a.threads == 1) {  // a sample at a time: the second pass finds it in the cache
            for_each(a.n, a.threads, [&](long n) {
                prepare(n, rows + n * block);
                for (long i = 0; i < chunks; ++i) first_pass(n, i, rows + n * block);
                combine(n, rows + n * block);
                for (long i = 0; i < chunks; ++i) second_pass(n, i, rows + n * block);
            });
            return;
        }
        for_each(a.n, a.threads, [&](long n) { prepare(n, rows + n * block); });
        for_each(a.n * chunks, a.threads, [&](long i) { first_pass(i / chunks, i % chunks, rows + i / chunks * block); });
        for_each(a.n, a.threads, [&](long n) { combine(n, rows + n * block); });
        for_each(a.n * chunks, a.threads, [&](long i) { second_pass(i / chunks, i % chunks, rows + i / chunks * block); });
    }

  private:
    // Rows of a sample: of every channel the mean (without the time bias), rstd, a and b; for the second pass
    // dh = p * dv + q * (x - mean) + r; then three of sums for each chunk.
    enum Row { kMean, kInverse, kA, kB, kP, kQ, kR, kRows };

    void prepare(long n, float* rows) const {
        for (long c = 0; c < all; ++c) {
            const long group = n * a.groups + c / size;
            const float film = a.scale ? 1.0f + a.scale[n * a.scale_stride + c] : 1.0f;
            rows[kMean * row + c] = a.mean[group] - (a.time_bias ? a.time_bias[n * a.time_stride + c] : 0.0f);
            rows[kInverse * row + c] = a.rstd[group];
            rows[kA * row + c] = a.weight[c] * film;
            rows[kB * row + c] = a.bias[c] * film + (a.shift ? a.shift[n * a.shift_stride + c] : 0.0f);
        }
    }

    // Calls f(x, dx, channels, offset) for both sources, at the sample's pixel `first`.
    template <class F>
    void sources(long n, long first, const F& f) const {
        const long start = n * a.pixels + first;
        f(a.x + start * a.channels, a.dx + start * a.channels, a.channels, 0);
        if (a.channels2) f(a.x2 + start * a.channels2, a.dx2 + start * a.channels2, a.channels2, a.channels);
    }

    // dv from dy, and from v where there is an activation.
    Vec before_activation(Vec dy, Vec v) const {
        if (!a.silu) return dy;
        const Vec s = 1.0f / (1.0f + exp(-v));
        return dy * (s * (1.0f + v * (1.0f - s)));
    }

    void first_pass(long n, long index, float* rows) const {
        const long first = index * chunk, count = std::min(chunk, a.pixels - first);
        float* sums = rows + (kRows + 3 * index) * row;
        const Element* dy = a.dy + (n * a.pixels + first) * all;
        sources(n, first, [&](const Element* x, Element* dx, long channels, long offset) {
            for (long c = 0; c < channels; c += kLanes) {
                const long lanes = channels - c, at = offset + c;
                const Vec mean = load(rows + kMean * row + at), inverse = load(rows + kInverse * row + at);
                const Vec factor = load(rows + kA * row + at), term = load(rows + kB * row + at);
                Vec sum_dv = zero(), sum_dvu = zero(), sum_u = zero();
                for (long p = 0; p < count; ++p) {
                    const Vec u = (load_some(x + p * channels + c, lanes) - mean) * inverse;
                    const Vec dv = before_activation(load_some(dy + p * all + at, lanes), u * factor + term);
                    if (kKept) store_some(dx + p * channels + c, dv, lanes);
                    sum_dv += dv;
                    sum_dvu += dv * u;
                    sum_u += u;
                }
                store_some(sums + at, sum_dv, lanes);
                store_some(sums + row + at, sum_dvu, lanes);
                store_some(sums + 2 * row + at, sum_u, lanes);
            }
        });
    }

    void combine(long n, float* rows) const {
        for (long c = 0; c < all; c += kLanes)
            for (long sum = 0; sum < 3; ++sum) {
                Wide total = {};
                for (long i = 0; i < chunks; ++i)
                    total += __builtin_convertvector(load(rows + (kRows + 3 * i + sum) * row + c), Wide);
                store_some(a.sums + (sum * a.n + n) * all + c, __builtin_convertvector(total, Vec), all - c);
            }
        const float *sum_dv = a.sums + n * all, *sum_dvu = a.sums + (a.n + n) * all;
        for (long g = 0; g < a.groups; ++g) {
            double m1 = 0, m2 = 0;
            for (long c = g * size; c < (g + 1) * size; ++c) {
                m1 += static_cast<double>(rows[kA * row + c]) * sum_dv[c];
                m2 += static_cast<double>(rows[kA * row + c]) * sum_dvu[c];
            }
            const double count = static_cast<double>(size * a.pixels), inverse = a.rstd[n * a.groups + g];
            for (long c = g * size; c < (g + 1) * size; ++c) {
                rows[kP * row + c] = static_cast<float>(rows[kA * row + c] * inverse);
                rows[kQ * row + c] = static_cast<float>(-m2 / count * inverse * inverse);
                rows[kR * row + c] = static_cast<float>(-m1 / count * inverse);
            }
        }
    }

    void second_pass(long n, long index, const float* rows) const {
        const long first = index * chunk, count = std::min(chunk, a.pixels - first);
        const Element* dy = a.dy + (n * a.pixels + first) * all;
        sources(n, first, [&](const Element* x, Element* dx, long channels, long offset) {
            for (long c = 0; c < channels; c += kLanes) {
                const long lanes = channels - c, at = offset + c;
                const Vec mean = load(rows + kMean * row + at), inverse = load(rows + kInverse * row + at);
                const Vec factor = load(rows + kA * row + at) * inverse, term = load(rows + kB * row + at);
                const Vec p = load(rows + kP * row + at), q = load(rows + kQ * row + at), r = load(rows + kR * row + at);
                for (long pixel = 0; pixel < count; ++pixel) {
                    Element* place = dx + pixel * channels + c;
                    const Vec h = load_some(x + pixel * channels + c, lanes) - mean;
                    const Vec dv = kKept ? load_some(place, lanes)
                                         : before_activation(load_some(dy + pixel * all + at, lanes), h * factor + term);
                    store_some(place, dv * p + (h * q + r), lanes);
                }
            }
        });
    }
};

}  // namespace
}  // namespace fastddpm

// dx [N, P, C], dx2 [N, P, C2] and sums [3, N, C + C2] over the pixels of dv, dv * u and u, from dy [N, P, C + C2] and
// what `fastddpm_group_norm` took, without residual, and gave: mean and rstd [N, groups]. With `bfloat16`, dx, dx2, dy, x
// and x2 are bfloat16.
extern "C" void fastddpm_group_norm_gradient(
    void* dx, void* dx2, float* sums, const void* dy, const void* x, const void* x2, const float* weight,
    const float* bias, const float* mean, const float* rstd, const float* time_bias, const float* scale,
    const float* shift, long time_stride, long scale_stride, long shift_stride, long n, long pixels, long channels,
    long channels2, long groups, int silu, int bfloat16, int threads) {
    using namespace fastddpm;
    with_element(bfloat16, [&](auto element) {
        using Element = decltype(element);
        const NormGradient<Element> args{
            static_cast<Element*>(dx), static_cast<Element*>(dx2), sums, static_cast<const Element*>(dy),
            static_cast<const Element*>(x), static_cast<const Element*>(x2), weight, bias, mean, rstd, time_bias, scale,
            shift, time_stride, scale_stride, shift_stride, n, pixels, channels, channels2, groups, silu != 0, threads};
        GroupNormGradient<Element>(args).run();
    });
}
