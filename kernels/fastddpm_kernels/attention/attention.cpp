// Self-attention over pixels: softmax(q k^T scale) v, of queries, keys and values that lie side by side.
//
// A block of queries meets all keys: its scores stay in the cache, in float32, and so does what softmax makes of them. The
// largest score is subtracted before the exponential; the sum is divided by when the values have been added up. In
// bfloat16 the exponentials, at most 1, are rounded before they are multiplied, and their sum is that of the rounded.

#include "attention.h"
#include "native/instruction.h"

namespace fastddpm {
namespace {

template <class A>
class SelfAttention {
    using Element = typename A::Element;

    static constexpr long kFewProducts = 200'000;

    const Attention<A>& a;
    const Packing<A> packing;
    const long keys_size, values_size, blocks;

  public:
    explicit SelfAttention(const Attention<A>& args)
        : a(args),
          packing(a.pixels),
          keys_size(packing.keys_size(a.k.width)),
          values_size(packing.values_size(a.v.width)),
          blocks(ceil_div(a.pixels, kBlock)) {}

    void run() const {
        const long all = a.n * a.heads;
        // Few products are done before another thread has been told of them.
        const bool few = all * a.pixels * a.pixels * (a.q.width + a.v.width) < kFewProducts;
        if (all >= 2 * a.threads || a.threads == 1 || few) {
            for_each(all, few ? 1 : a.threads, [&](long head) {
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
    void pack_keys(long head, float* packed) const {
        packing.keys(a.k.at(head / a.heads, a.pixels, head % a.heads), a.k.row, a.k.width, packed);
    }
    void pack_values(long head, float* packed) const {
        packing.values(a.v.at(head / a.heads, a.pixels, head % a.heads), a.v.row, a.v.width, packed);
    }

    void attend(long head, long block, const float* packed) const {
        const long n = head / a.heads, h = head % a.heads;
        const long first = block * kBlock, count = std::min(kBlock, a.pixels - first);
        const long width = packing.panels * kPanel + kLanes, value_panels = ceil_div(a.v.width, kPanel);
        const long out_width = value_panels * kPanel;
        float* scores = scratch<float>(Slot::kOutput, count * (width + out_width));
        float* out = scores + count * width;
        const Element* queries = a.q.at(n, a.pixels, h) + first * a.q.row;
        multiply_rows<A>(
            words_of(queries), a.q.row / A::kDeep, a.q.width / A::kDeep, packed, packing.panels, count, scores, width);
        float inverses[kBlock];
        for (long r = 0; r < count; ++r) {
            const float most = largest(scores + r * width);
            inverses[r] = 1.0f / exponentials(scores + r * width, most);
            if (!a.statistics) continue;
            float* kept = a.statistics + 2 * head * a.pixels + first + r;
            kept[0] = most;
            kept[a.pixels] = inverses[r];
        }
        multiply_rows<A>(scores, width, packing.words, packed + keys_size, value_panels, count, out, out_width);
        for (long r = 0; r < count; ++r) {
            Element* y = a.y.at(n, a.pixels, h) + (first + r) * a.y.row;
            for (long c = 0; c < a.v.width; c += kLanes)
                store_some(y + c, load(out + r * out_width + c) * inverses[r], a.v.width - c);
        }
    }

    float largest(const float* scores) const {
        Vec most = broadcast(kLeast);
        for (long key = 0; key < a.pixels; key += kLanes) {
            const Vec score = masked(load(scores + key), key, a.pixels, kLeast);
            most = score > most ? score : most;
        }
        float result = most[0];
        for (int lane = 1; lane < kLanes; ++lane) result = std::max(result, most[lane]);
        return result;
    }

    // Of a row of scores, in its place, as words. Returns their sum.
    float exponentials(float* scores, float most) const {
        Element* rounded = reinterpret_cast<Element*>(scores);
        Vec sum = zero();
        for (long key = 0; key < a.pixels; key += kLanes) {
            const Vec value = exp((load(scores + key) - most) * a.scale);
            store(rounded + key, masked(value, key, a.pixels, 0.0f));
            sum += load(rounded + key);
        }
        return sum_of(sum);
    }
};

}  // namespace
}  // namespace fastddpm

// y = softmax(q k^T * scale) v of every head, with scale > 0. Each is [N, P, ..], a pixel every `*_row` values; in a pixel
// the heads follow each other, of q and k with `width` channels, of v and y with `value_width`. `statistics` [N, heads, 2,
// P] is written for the gradient, or null. All are floats; with `bfloat16` q, k, v and y are bfloat16, rows and widths even.
extern "C" void fastddpm_attention(
    void* y, const void* q, const void* k, const void* v, long y_row, long q_row, long k_row, long v_row, long n,
    long pixels, long heads, long width, long value_width, float scale, int bfloat16, int threads, float* statistics) {
    using namespace fastddpm;
    with_arithmetic(bfloat16, [&](auto arithmetic) {
        using A = decltype(arithmetic);
        using Element = typename A::Element;
        const auto read = [](const void* data, long row, long columns) {
            return Rows<const Element>{static_cast<const Element*>(data), row, columns};
        };
        const Attention<A> args{
            {static_cast<Element*>(y), y_row, value_width}, read(q, q_row, width), read(k, k_row, width),
            read(v, v_row, value_width), n, pixels, heads, scale, threads, statistics, {}, {}, {}, {}};
        SelfAttention<A>(args).run();
    });
}
FASTDDPM_INSTRUCTION(fastddpm_attention)
