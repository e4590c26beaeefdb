// The reverse step of `reverse_step/formula.py`, in place. A chunk of a sample's elements, in their logical order, is
// gathered into rows of floats, computed there, and put where it belongs.

#include <cmath>
#include <limits>

#include "native/instruction.h"
#include "native/runtime.h"
#include "native/simd.h"
#include "philox/normal.h"

namespace fastddpm {
namespace {

constexpr long kChunk = 1024;                      // elements of an item
constexpr int64_t kStreamStep = 1, kStreamKnown = 3;  // `philox/__init__.py`
static_assert(kChunk % kNormals == 0);

// A tensor [N, C, ...] whose pixels are one stride apart; or none.
struct Walk {
    void* data;
    bool bfloat16;
    long sample, channel, pixel;
};

struct Step {
    float* x;
    Walk out, net_in, noise, known, mask, known_noise;
    const float *table, *log_variance, *guidance_scale, *known_table, *threshold;
    float *x0, *history;
    const int64_t *step, *keys;
    long n, channels, pixels, rows, guidance_stride, older;  // `older`: predictions in the history
    float clip;  // 0 for none
    bool multistep;
    int threads;
};

class ReverseStep {
    const Step& a;
    const long numel;

  public:
    explicit ReverseStep(const Step& args) : a(args), numel(args.channels * args.pixels) {}

    void run() const {
        const long chunks = ceil_div(numel, kChunk);
        for_each(a.n * chunks, a.threads, [&](long i) { chunk(i / chunks, i % chunks * kChunk); });
    }

  private:
    // f(place, index, stride, count) for runs of elements of one channel.
    template <class F>
    void walk(const Walk& w, long n, long first, long count, long channel_offset, const F& f) const {
        for (long done = 0; done < count;) {
            const long channel = (first + done) / a.pixels, pixel = (first + done) % a.pixels;
            const long together = std::min(count - done, a.pixels - pixel);
            f(n * w.sample + (channel + channel_offset) * w.channel + pixel * w.pixel, done, together);
            done += together;
        }
    }

    void read(const Walk& w, long n, long first, long count, float* row, long channel_offset = 0) const {
        walk(w, n, first, count, channel_offset, [&](long at, long done, long together) {
            if (w.bfloat16) {
                const Bf16* from = static_cast<const Bf16*>(w.data) + at;
                for (long i = 0; i < together; ++i) {
                    const uint32_t bits = static_cast<uint32_t>(from[i * w.pixel]) << 16;
                    std::memcpy(row + done + i, &bits, sizeof(bits));
                }
            } else {
                const float* from = static_cast<const float*>(w.data) + at;
                for (long i = 0; i < together; ++i) row[done + i] = from[i * w.pixel];
            }
        });
    }

    void write(const Walk& w, long n, long first, long count, const float* row) const {
        walk(w, n, first, count, 0, [&](long at, long done, long together) {
            if (w.bfloat16) {
                Bf16* to = static_cast<Bf16*>(w.data) + at;
                for (long i = 0; i < together; i += kLanes) {
                    const HalfVec rounded = to_bf16(load(row + done + i));
                    for (long lane = 0; lane < std::min<long>(kLanes, together - i); ++lane)
                        to[(i + lane) * w.pixel] = rounded[lane];
                }
            } else {
                float* to = static_cast<float*>(w.data) + at;
                for (long i = 0; i < together; ++i) to[i * w.pixel] = row[done + i];
            }
        });
    }

    // The given noise, or what the sample's key makes.
    void noise(const Walk& given, int64_t stream, long n, long first, long count, float* row) const {
        if (given.data)
            read(given, n, first, count, row);
        else
            normals(a.keys + 2 * n, *a.step, stream, first, count, row);
    }

    void chunk(long n, long first) const {
        const long count = std::min(kChunk, numel - first);
        // Rows have room for whole vectors, and what is in the rest of them does not matter.
        float* rows = scratch<float>(Slot::kOutput, 8 * (kChunk + kLanes));
        const auto row = [&](long i) { return rows + i * (kChunk + kLanes); };
        float *prediction = row(0), *other = row(1), *new_x0 = row(2), *next = row(3), *z = row(4), *before = row(5);
        float *state = row(6), *known = row(7);
        std::memset(rows, 0, 8 * (kChunk + kLanes) * sizeof(float));
        float coefficients[7];
        const bool valid = *a.step >= 0 && *a.step < a.rows;
        const long at = valid ? *a.step : 0;
        for (int i = 0; i < 7; ++i)
            coefficients[i] = valid ? a.table[(7 + a.older) * at + i] : std::numeric_limits<float>::quiet_NaN();
        const auto [A, B, C, D, E, F, S] = coefficients;

        std::memcpy(state, a.x + n * numel + first, count * sizeof(float));
        if (a.guidance_scale) {
            const float scale = a.guidance_scale[n * a.guidance_stride];
            read(a.out, n, first, count, other);
            read(a.out, a.n + n, first, count, prediction);
            each(count, [&](long i) {
                store(prediction + i, load(other + i) + scale * (load(prediction + i) - load(other + i)));
            });
        } else {
            read(a.out, n, first, count, prediction);
        }
        const bool before_counts = a.multistep && !(F == 0);
        if (before_counts || a.older) std::memcpy(before, a.x0 + n * numel + first, count * sizeof(float));
        const bool bounded = a.threshold || a.clip > 0;
        const float bound = a.threshold ? a.threshold[n] : a.clip;
        each(count, [&](long i) {
            const Vec x = load(state + i), out = load(prediction + i);
            Vec x0 = A * x + B * out;
            if (bounded) {
                x0 = x0 < -bound ? broadcast(-bound) : x0;
                x0 = x0 > bound ? broadcast(bound) : x0;
                if (a.threshold) x0 = x0 / bound;
            }
            Vec value = C * x0 + D * x + E * out;
            if (before_counts) value += F * load(before + i);
            store(new_x0 + i, x0);
            store(next + i, value);
        });
        for (long age = a.older - 1; age >= 0; --age) {  // the oldest first: each then takes the newer one's place
            const float factor = a.table[(7 + a.older) * at + 7 + age];
            float* past = a.history + (age * a.n + n) * numel + first;
            if (!(factor == 0)) {
                std::memcpy(other, past, count * sizeof(float));
                each(count, [&](long i) { store(next + i, load(next + i) + factor * load(other + i)); });
            }
            const float* newer = age ? past - a.n * numel : before;
            std::memcpy(past, newer, count * sizeof(float));
        }
        if ((a.noise.data || a.keys) && !(S == 0)) {
            noise(a.noise, kStreamStep, n, first, count, z);
            if (a.log_variance) {
                const float least = a.log_variance[2 * at], most = a.log_variance[2 * at + 1];
                read(a.out, (a.guidance_scale ? a.n : 0) + n, first, count, other, a.channels);
                each(count, [&](long i) {
                    const Vec fraction = (load(other + i) + 1.0f) * 0.5f;
                    const Vec deviation = exp(0.5f * (fraction * most + (1.0f - fraction) * least));
                    store(next + i, load(next + i) + S * deviation * load(z + i));
                });
            } else {
                each(count, [&](long i) { store(next + i, load(next + i) + S * load(z + i)); });
            }
        }
        if (a.known.data) {
            const float signal = a.known_table[2 * at], sigma = a.known_table[2 * at + 1];
            read(a.known, n, first, count, known);
            read(a.mask, n, first, count, other);
            const bool noisy = !(sigma == 0);
            if (noisy) noise(a.known_noise, kStreamKnown, n, first, count, z);
            each(count, [&](long i) {
                Vec value = signal * load(known + i);
                if (noisy) value += sigma * load(z + i);
                const Vec mask = load(other + i);
                store(next + i, mask * value + (1.0f - mask) * load(next + i));
            });
        }
        std::memcpy(a.x + n * numel + first, next, count * sizeof(float));
        if (a.x0) std::memcpy(a.x0 + n * numel + first, new_x0, count * sizeof(float));
        if (a.net_in.data) {
            write(a.net_in, n, first, count, next);
            if (a.guidance_scale) write(a.net_in, a.n + n, first, count, next);
        }
    }

    template <class F>
    static void each(long count, const F& f) {
        for (long i = 0; i < count; i += kLanes) f(i);
    }
};

}  // namespace
}  // namespace fastddpm

// x [N, C, P] and x0, contiguous, in place. Of `out` [N or 2N, C or 2C, P], net_in [N or 2N, C, P], noise, known,
// known_mask and known_noise [N, C, P] the strides of sample, channel and pixel are given. What may be left out is null:
// x0, net_in, keys, noise, log_variance, guidance_scale (the batch of out is then not double), threshold, history
// [older, N, C, P], contiguous, and all of known. A row that is not in the table gives NaN.
extern "C" void fastddpm_reverse_step(
    float* x, void* out, const float* table, const int64_t* step, float* x0, void* net_in, const int64_t* keys,
    void* noise, const float* log_variance, const float* guidance_scale, void* known, void* known_mask,
    const float* known_table, void* known_noise, const float* threshold, float* history, long n, long channels,
    long pixels, long rows, long guidance_stride, long older, long out_s, long out_c, long out_p, long net_s, long net_c, long net_p, long noise_s,
    long noise_c, long noise_p, long known_s, long known_c, long known_p, long mask_s, long mask_c, long mask_p,
    long known_noise_s, long known_noise_c, long known_noise_p, float clip, int multistep, int out_bfloat16,
    int net_in_bfloat16, int threads) {
    using namespace fastddpm;
    const Step args{
        x, {out, out_bfloat16 != 0, out_s, out_c, out_p}, {net_in, net_in_bfloat16 != 0, net_s, net_c, net_p},
        {noise, false, noise_s, noise_c, noise_p}, {known, false, known_s, known_c, known_p},
        {known_mask, false, mask_s, mask_c, mask_p}, {known_noise, false, known_noise_s, known_noise_c, known_noise_p},
        table, log_variance, guidance_scale, known_table, threshold, x0, history, step, keys, n, channels, pixels,
        rows, guidance_stride, older, clip, multistep != 0, threads};
    ReverseStep(args).run();
}
FASTDDPM_INSTRUCTION(fastddpm_reverse_step)
