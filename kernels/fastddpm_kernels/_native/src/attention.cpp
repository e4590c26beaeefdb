// Self-attention over pixels: softmax(q k^T scale) v, of queries, keys and values that lie side by side.
//
// A block of queries meets all keys: its scores stay in the cache, in float32, and so does what softmax makes of them. The
// largest score is subtracted before the exponential; the sum is divided by when the values have been added up. In
// bfloat16 the exponentials, at most 1, are rounded before they are multiplied, and their sum is that of the rounded.

#include <type_traits>

#include "gemm.h"
#include "runtime.h"

namespace fastddpm {
namespace {

template <class A>
struct Attention {
    using Element = typename A::Element;
    Element* y;
    const Element* qkv;
    long n, pixels, heads, width, value_width;  // channels of a head
    float scale;
    int threads;
};

template <class A>
class SelfAttention {
    using Element = typename A::Element;
    static constexpr long kBlock = 2 * kRows;  // queries of an item

    const Attention<A>& a;
    const long row, words, key_panels, value_panels, key_words, keys_size, values_size, blocks;

  public:
    explicit SelfAttention(const Attention<A>& args)
        : a(args),
          row(a.heads * (2 * a.width + a.value_width)),
          words(a.width / A::kDeep),
          key_panels(ceil_div(a.pixels, kPanel)),
          value_panels(ceil_div(a.value_width, kPanel)),
          key_words(ceil_div(a.pixels, A::kDeep)),
          keys_size(key_panels * words * kPanel),
          values_size(value_panels * key_words * kPanel),
          blocks(ceil_div(a.pixels, kBlock)) {}

    void run() const {
        const long all = a.n * a.heads;
        if (all >= 2 * a.threads || a.threads == 1) {
            for_each(all, a.threads, [&](long head) {
                float* packed = scratch<float>(Slot::kPacked, keys_size + values_size);
                pack_keys(head, packed);
                pack_values(head, packed + keys_size);
                for (long block = 0; block < blocks; ++block) attend(head, block, packed);
            });
            return;
        }
        float* packed = scratch<float>(Slot::kShared, all * (keys_size + values_size));
        const auto of_head = [&](long head) { return packed + head * (keys_size + values_size); };
        for_each(2 * all, a.threads, [&](long item) {
            if (item % 2)
                pack_values(item / 2, of_head(item / 2) + keys_size);
            else
                pack_keys(item / 2, of_head(item / 2));
        });
        for_each(all * blocks, a.threads, [&](long item) { attend(item / blocks, item % blocks, of_head(item / blocks)); });
    }

  private:
    // Where a head's queries (0), keys (1) or values (2) are at the first pixel.
    const Element* part(long head, int which) const {
        const long n = head / a.heads, h = head % a.heads;
        const long offset = which < 2 ? (which * a.heads + h) * a.width : 2 * a.heads * a.width + h * a.value_width;
        return a.qkv + n * a.pixels * row + offset;
    }

    // [panels of keys, words of channels, kPanel]; what fills up the last panel is zero.
    void pack_keys(long head, float* packed) const {
        const Element* keys = part(head, 1);
        for (long panel = 0; panel < key_panels; ++panel, packed += words * kPanel) {
            const long count = std::min<long>(kPanel, a.pixels - panel * kPanel);
            if (count < kPanel) std::fill_n(packed, words * kPanel, 0.0f);
            for (long key = 0; key < count; ++key) {
                const float* from = reinterpret_cast<const float*>(keys + (panel * kPanel + key) * row);
                for (long word = 0; word < words; ++word) packed[word * kPanel + key] = load_word(from + word);
            }
        }
    }

    // [panels of channels, words of pixels, kPanel]
    void pack_values(long head, float* packed) const {
        const Element* values = part(head, 2);
        for (long panel = 0; panel < value_panels; ++panel)
            for (long word = 0; word < key_words; ++word)
                for (int column = 0; column < kColumns; ++column, packed += kLanes) {
                    const long channel = panel * kPanel + column * kLanes, lanes = a.value_width - channel;
                    Vec pixels[A::kDeep];
                    for (int index = 0; index < A::kDeep; ++index) {
                        const long pixel = word * A::kDeep + index;
                        const bool present = pixel < a.pixels && lanes > 0;
                        pixels[index] = present ? load_some(values + pixel * row + channel, lanes) : zero();
                    }
                    store(packed, A::combine(pixels));
                }
    }

    void attend(long head, long block, const float* packed) const {
        const long first = block * kBlock, count = std::min(kBlock, a.pixels - first);
        const long width = key_panels * kPanel + kLanes, out_width = value_panels * kPanel;
        float* scores = scratch<float>(Slot::kOutput, count * (width + out_width));
        float* out = scores + count * width;
        const float* queries = reinterpret_cast<const float*>(part(head, 0) + first * row);
        for (long panel = 0; panel < key_panels; ++panel)
            for_row_tiles(count, [&](long r, auto rows) {
                multiply_tile<A, rows>(
                    queries + r * row / A::kDeep, row / A::kDeep, packed + panel * words * kPanel, words,
                    scores + r * width + panel * kPanel, width);
            });
        float inverses[kBlock];
        for (long r = 0; r < count; ++r) inverses[r] = 1.0f / softmax(scores + r * width);
        for (long panel = 0; panel < value_panels; ++panel)
            for_row_tiles(count, [&](long r, auto rows) {
                multiply_tile<A, rows>(
                    scores + r * width, width, packed + keys_size + panel * key_words * kPanel, key_words,
                    out + r * out_width + panel * kPanel, out_width);
            });
        const long n = head / a.heads, h = head % a.heads, y_row = a.heads * a.value_width;
        for (long r = 0; r < count; ++r) {
            Element* y = a.y + (n * a.pixels + first + r) * y_row + h * a.value_width;
            for (long c = 0; c < a.value_width; c += kLanes)
                store_some(y + c, load(out + r * out_width + c) * inverses[r], a.value_width - c);
        }
    }

    // Makes exponentials of a row of scores, in its place, as words. Returns their sum.
    float softmax(float* scores) const {
        const auto masked = [&](long key, Vec score, float other) {
            for (long lane = std::max<long>(0, a.pixels - key); lane < kLanes; ++lane) score[lane] = other;
            return score;
        };
        Vec largest = broadcast(-3.4e38f);
        for (long key = 0; key < a.pixels; key += kLanes) {
            const Vec score = masked(key, load(scores + key), -3.4e38f);
            largest = score > largest ? score : largest;
        }
        float most = largest[0];
        for (int lane = 1; lane < kLanes; ++lane) most = std::max(most, largest[lane]);
        Element* rounded = reinterpret_cast<Element*>(scores);
        Vec sum = zero();
        for (long key = 0; key < a.pixels; key += kLanes) {
            const Vec value = masked(key, exp((load(scores + key) - most) * a.scale), 0.0f);
            store(rounded + key, value);
            sum += load(rounded + key);
        }
        float total = 0;
        for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
        return total;
    }
};

}  // namespace
}  // namespace fastddpm

// y [N, P, heads * value_width] = softmax(q k^T * scale) v of every head, with scale > 0; a pixel of qkv has the queries
// of all heads [heads, width], their keys and their values [heads, value_width]. All are floats; with `bfloat16` they are
// bfloat16, width and value_width even.
extern "C" void fastddpm_attention(
    void* y, const void* qkv, long n, long pixels, long heads, long width, long value_width, float scale, int bfloat16,
    int threads) {
    using namespace fastddpm;
    with_arithmetic(bfloat16, [&](auto arithmetic) {
        using A = decltype(arithmetic);
        using Element = typename A::Element;
        const Attention<A> args{static_cast<Element*>(y), static_cast<const Element*>(qkv), n, pixels, heads, width,
                                value_width, scale, threads};
        SelfAttention<A>(args).run();
    });
}
