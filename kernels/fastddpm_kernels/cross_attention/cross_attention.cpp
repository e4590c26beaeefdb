// Attention of queries to keys and values of one or two sources (Dao et al. 2022, FlashAttention, arXiv:2205.14135): a
// block of queries meets one block of keys after the other, whose scores stay in the first cache. The largest score so
// far is subtracted; where a block has a larger one, what was summed before shrinks. Exponentials are powers of two: the
// base is in the scale. In bfloat16 they are rounded before they are multiplied, and their sum is that of the rounded.

#include "attention/attention.h"
#include "native/instruction.h"

namespace fastddpm {
namespace {

constexpr long kKeys = 256;          // of a block
constexpr long kQueries = 4 * kRows;  // of an item
constexpr float kLog2E = 1.44269504f;

template <class A>
struct Source {
    const typename A::Element *k, *v;
    long row, keys;
};

template <class A>
struct CrossAttention {
    using Element = typename A::Element;
    Element* y;
    const Element* q;
    Source<A> sources[2];
    const float* mask;  // [N, keys], or null
    long y_row, q_row, n, queries, heads, width;
    float scale;
    int threads;
};

// 2^x for x <= 0, to 2 ulp: the nearest integer goes into the exponent, a polynomial of what is left has the least largest
// error on [-1/2, 1/2] with a value of 1 at 0. A NaN stays one.
inline Vec exp2_negative(Vec x) {
    x = x < -126.0f ? broadcast(-126.0f) : x;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
    const Vec shifted = x + kRound;
    const Vec r = x - (shifted - kRound);
    Vec p = r * 1.326472731e-3f + 9.671512991e-3f;
    p = p * r + 5.550733581e-2f;
    p = p * r + 2.402224243e-1f;
    p = p * r + 6.931470037e-1f;
    p = p * r + 1.0f;
    return p * (Vec)(((IntVec)shifted << 23) + (127 << 23));
}

inline float largest_of(Vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)value);
#endif
    float most = value[0];
    for (int lane = 1; lane < kLanes; ++lane) most = std::max(most, value[lane]);
    return most;
}

// Half a vector, of which a processor with long ones multiplies two at a time: heads of 40 channels need no third.
constexpr int kHalf = kLanes / 2;
typedef float HalfVector __attribute__((vector_size(kHalf * sizeof(float))));

inline HalfVector load_half(const float* p) {
    HalfVector value;
    std::memcpy(&value, p, sizeof(value));
    return value;
}

template <class A>
inline HalfVector multiply_add_half(HalfVector sum, HalfVector words, float word) {
#if defined(__AVX512BF16__)
    if constexpr (A::kDeep == 2)
        return (HalfVector)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_ps(word), (__m256bh)(__m256)words);
#endif
    return sum + words * word;
}

template <class A>
class Attending {
    using Element = typename A::Element;

    const CrossAttention<A>& a;
    const long depth, columns, keys_size, block_size;  // words of a head; panels of its channels; floats of a packed block
    const long blocks[2];                              // of keys, of each source
    const bool narrow;  // whether the values of a key are one panel and half a vector, next to each other

  public:
    explicit Attending(const CrossAttention<A>& args)
        : a(args),
          depth(a.width / A::kDeep),
          columns(ceil_div(a.width, kPanel)),
          keys_size(kKeys * depth),
          block_size(keys_size + columns * ceil_div(kKeys, A::kDeep) * kPanel),
          blocks{ceil_div(a.sources[0].keys, kKeys), ceil_div(a.sources[1].keys, kKeys)},
          narrow(kLanes == 16 && a.width > kPanel && a.width <= kPanel + kHalf) {}

    void run() const {
        const long all = a.n * a.heads, size = (blocks[0] + blocks[1]) * block_size, items = ceil_div(a.queries, kQueries);
        if (all >= 2 * a.threads || a.threads == 1) {
            for_each(all, a.threads, [&](long head) {
                float* packed = scratch<float>(Slot::kPacked, size);
                for (long block = 0; block < blocks[0] + blocks[1]; ++block) pack(head, block, packed);
                for (long item = 0; item < items; ++item) attend(head, item, packed);
            });
            return;
        }
        float* packed = scratch<float>(Slot::kShared, all * size);
        const long count = blocks[0] + blocks[1];
        for_each(all * count, a.threads, [&](long i) { pack(i / count, i % count, packed + i / count * size); });
        for_each(all * items, a.threads, [&](long i) { attend(i / items, i % items, packed + i / items * size); });
    }

  private:
    struct Keys {
        const Source<A>& source;
        long first, count, before;  // keys; those of the sources before
    };
    Keys keys_of(long block) const {
        const bool second = block >= blocks[0];
        const Source<A>& source = a.sources[second];
        const long first = (second ? block - blocks[0] : block) * kKeys;
        return {source, first, std::min(kKeys, source.keys - first), second ? a.sources[0].keys : 0};
    }

    void pack(long head, long block, float* packed) const {
        const Keys keys = keys_of(block);
        const Packing<A> packing(keys.count);
        const long at = (head / a.heads * keys.source.keys + keys.first) * keys.source.row + head % a.heads * a.width;
        packing.keys(keys.source.k + at, keys.source.row, a.width, packed + block * block_size);
        float* values = packed + block * block_size + keys_size;
        if (!narrow) return packing.values(keys.source.v + at, keys.source.row, a.width, values);
        for (long word = 0; word < packing.words; ++word, values += kPanel + kHalf)
            for (long channel = 0; channel < a.width; channel += kLanes) {  // the last half is the next word's
                Vec of_keys[A::kDeep];
                for (int index = 0; index < A::kDeep; ++index) {
                    const long key = word * A::kDeep + index;
                    of_keys[index] = key < keys.count
                                         ? load_some(keys.source.v + at + key * keys.source.row + channel, a.width - channel)
                                         : zero();
                }
                store(values + channel, A::combine(of_keys));
            }
    }

    void attend(long head, long item, const float* packed) const {
        const long n = head / a.heads, first = item * kQueries, count = std::min(kQueries, a.queries - first);
        const long out_row = columns * kPanel, at = head % a.heads * a.width;
        float* scores = scratch<float>(Slot::kOutput, kRows * (kKeys + kLanes) + kQueries * out_row);
        float* out = scores + kRows * (kKeys + kLanes);
        float most[kQueries], sums[kQueries];
        std::fill_n(out, count * out_row, 0.0f);
        std::fill_n(most, count, kLeast);
        std::fill_n(sums, count, 0.0f);
        const Element* queries = a.q + (n * a.queries + first) * a.q_row + at;
        for (long block = 0; block < blocks[0] + blocks[1]; ++block) {
            const Keys keys = keys_of(block);
            const float* mask = a.mask ? a.mask + n * (a.sources[0].keys + a.sources[1].keys) + keys.before + keys.first : nullptr;
            for_row_tiles(count, [&](long r, auto height) {
                tile<height>(
                    words_of(queries + r * a.q_row), keys.count, mask, packed + block * block_size, scores, out + r * out_row,
                    most + r, sums + r);
            });
        }
        for (long r = 0; r < count; ++r) {
            Element* y = a.y + (n * a.queries + first + r) * a.y_row + at;
            const float inverse = 1.0f / sums[r];
            for (long c = 0; c < a.width; c += kLanes)
                store_some(y + c, load(out + r * out_row + c) * inverse, a.width - c);
        }
    }

    // Adds a block of `count` keys to the sums of R queries.
    template <int R>
    void tile(
        const float* queries, long count, const float* mask, const float* packed, float* scores, float* out, float* most,
        float* sums) const {
        constexpr long row = kKeys + kLanes;
        const long panels = ceil_div(count, kPanel), words = ceil_div(count, A::kDeep), out_row = columns * kPanel;
        for (long panel = 0; panel < panels; ++panel)
            multiply_tile<A, R>(
                queries, a.q_row / A::kDeep, packed + panel * depth * kPanel, depth, scores + panel * kPanel, row);
        for (int r = 0; r < R; ++r) {
            float* own = scores + r * row;
            const float highest = scale_scores(own, count, mask);
            if (highest > most[r]) {
                const float shrink = exp2_negative(broadcast(std::max(most[r] - highest, -1000.0f)))[0];
                most[r] = highest;
                sums[r] *= shrink;
                for (long c = 0; c < out_row; c += kLanes) store(out + r * out_row + c, load(out + r * out_row + c) * shrink);
            }
            sums[r] += exponentials(own, count, most[r]);
        }
        const float* values = packed + keys_size;
        if (narrow) {
            constexpr int kFirst = (R + 1) / 2;
            add_narrow_values<kFirst>(scores, values, words, out, out_row);
            if constexpr (R > kFirst) add_narrow_values<R - kFirst>(scores + kFirst * row, values, words, out + kFirst * out_row, out_row);
            return;
        }
        for (long panel = 0; panel < columns; ++panel)
            with_columns(a.width - panel * kPanel, [&](auto vectors) {
                add_values<R, vectors>(
                    scores, row, values + panel * words * kPanel, words, out + panel * kPanel, out_row);
            });
    }

    // out[R][..] += rows x panel.
    template <int R, int C>
    static void add_values(const float* rows, long row, const float* panel, long words, float* out, long out_row) {
        Vec sums[R][C];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) sums[r][j] = load(out + r * out_row + j * kLanes);
        multiply_add_blocks<A>(sums, [=](int r) { return rows + r * row; }, words, panel, 0);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) store(out + r * out_row + j * kLanes, sums[r][j]);
    }

    // The same of values that are `narrow`.
    template <int R>
    static void add_narrow_values(const float* rows, const float* values, long words, float* out, long out_row) {
        constexpr long row = kKeys + kLanes, step = kPanel + kHalf;
        for (long start = 0; start < words; start += kDepth) {
            Vec sums[R][2] = {};
            HalfVector halves[R] = {};
            const float* value = values + start * step;
            for (long word = start; word < std::min(words, start + kDepth); ++word, value += step) {
                const Vec first = load(value), second = load(value + kLanes);
                const HalfVector last = load_half(value + 2 * kLanes);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const float weight = load_word(rows + r * row + word);
                    sums[r][0] = A::multiply_add(sums[r][0], first, weight);
                    sums[r][1] = A::multiply_add(sums[r][1], second, weight);
                    halves[r] = multiply_add_half<A>(halves[r], last, weight);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                float* place = out + r * out_row;
                store(place, load(place) + sums[r][0]);
                store(place + kLanes, load(place + kLanes) + sums[r][1]);
                halves[r] += load_half(place + 2 * kLanes);
                std::memcpy(place + 2 * kLanes, &halves[r], sizeof(HalfVector));
            }
        }
    }

    // Scales a row of scores to exponents of two, adds the mask. Returns the largest; beyond the last key they are least.
    float scale_scores(float* scores, long count, const float* mask) const {
        const float scale = a.scale * kLog2E;
        Vec most = broadcast(kLeast);
        for (long key = 0; key < count; key += kLanes) {
            Vec score = load(scores + key) * scale;
            if (mask) score += load_some(mask + key, count - key) * kLog2E;
            if (key + kLanes > count) score = masked(score, key, count, kLeast);
            store(scores + key, score);
            most = score > most ? score : most;
        }
        return largest_of(most);
    }

    // Of a row of scores, in its place, as words. Returns their sum.
    float exponentials(float* scores, long count, float most) const {
        Element* rounded = reinterpret_cast<Element*>(scores);
        Vec sum = zero();
        for (long key = 0; key < count; key += kLanes) {
            Vec value = exp2_negative(load(scores + key) - most);
            if (key + kLanes > count) value = masked(value, key, count, 0.0f);
            store(rounded + key, value);
            sum += A::kDeep == 1 ? value : load(rounded + key);
        }
        return sum_of(sum);
    }
};

}  // namespace
}  // namespace fastddpm

// y = softmax(q k^T * scale + mask) v of every head, with scale > 0. y and q are [N, queries, ..], the two sources of keys
// and values [N, keys, ..] and [N, own_keys, ..], a pixel every `*_row` values. In a pixel of y and q the heads follow each
// other, `width` channels each; in one of a source all keys, then all values. `own` (own_keys = 0) and `mask` [N, keys +
// own_keys], floats, may be null. All are floats; with `bfloat16` y, q, kv and own are bfloat16, rows and width even.
extern "C" void fastddpm_cross_attention(
    void* y, const void* q, const void* kv, const void* own, const float* mask, long y_row, long q_row, long kv_row,
    long own_row, long n, long queries, long keys, long own_keys, long heads, long width, float scale, int bfloat16,
    int threads) {
    using namespace fastddpm;
    with_arithmetic(bfloat16, [&](auto arithmetic) {
        using A = decltype(arithmetic);
        using Element = typename A::Element;
        const auto source = [=](const void* data, long row, long count) {
            const Element* k = static_cast<const Element*>(data);
            return Source<A>{k, k + heads * width, row, count};
        };
        const CrossAttention<A> args{
            static_cast<Element*>(y), static_cast<const Element*>(q), {source(kv, kv_row, keys), source(own, own_row, own_keys)},
            mask, y_row, q_row, n, queries, heads, width, scale, threads};
        Attending<A>(args).run();
    });
}
FASTDDPM_INSTRUCTION(fastddpm_cross_attention)
