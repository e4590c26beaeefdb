// The gradient of attention. With p = softmax(q k^T scale), y = p v and D the sum over keys of p dp:
//
//     dp = dy v^T,   ds = p (dp - D) scale,   dq = ds k,   dk = ds^T q,   dv = p^T dy
//
// Blocks of queries give D and dq; then blocks of keys, for which scores are computed once more, the other way round, give
// dk and dv. So nothing is added up across blocks, and results do not depend on threads.

#include "attention.h"

namespace fastddpm {
namespace {

template <class A>
class AttentionGradient {
    using Element = typename A::Element;

    const Attention<A>& a;
    const Packing<A> packing;
    const long wide, tall, blocks;  // sizes of one packed matrix: as keys and as values, of the wider of q and v

  public:
    explicit AttentionGradient(const Attention<A>& args)
        : a(args),
          packing(a.pixels),
          wide(packing.keys_size(std::max(a.q.width, a.v.width))),
          tall(packing.values_size(std::max(a.q.width, a.v.width))),
          blocks(ceil_div(a.pixels, kBlock)) {}

    void run() const {
        const long all = a.n * a.heads, size = 4 * wide + 3 * tall + a.pixels;
        if (all >= 2 * a.threads || a.threads == 1) {
            for_each(all, a.threads, [&](long head) {
                float* packed = scratch<float>(Slot::kPacked, size);
                for (int which = 0; which < 7; ++which) pack(head, which, packed);
                for (long block = 0; block < blocks; ++block) of_queries(head, block, packed);
                for (long block = 0; block < blocks; ++block) of_keys(head, block, packed);
            });
            return;
        }
        float* packed = scratch<float>(Slot::kShared, all * size);
        for_each(7 * all, a.threads, [&](long item) { pack(item / 7, item % 7, packed + item / 7 * size); });
        for_each(all * blocks, a.threads, [&](long i) { of_queries(i / blocks, i % blocks, packed + i / blocks * size); });
        for_each(all * blocks, a.threads, [&](long i) { of_keys(i / blocks, i % blocks, packed + i / blocks * size); });
    }

  private:
    // Places in what is packed: q, k, v and dy as keys, k, q and dy as values, then D of every query.
    const float* keys(const float* packed, int which) const { return packed + which * wide; }
    const float* values(const float* packed, int which) const { return packed + 4 * wide + which * tall; }
    float* sums(float* packed) const { return packed + 4 * wide + 3 * tall; }

    void pack(long head, int which, float* packed) const {
        const Rows<const Element>* matrices[] = {&a.q, &a.k, &a.v, &a.dy, &a.k, &a.q, &a.dy};
        const Rows<const Element>& m = *matrices[which];
        const Element* rows = m.at(head / a.heads, a.pixels, head % a.heads);
        if (which < 4)
            packing.keys(rows, m.row, m.width, packed + which * wide);
        else
            packing.values(rows, m.row, m.width, packed + 4 * wide + (which - 4) * tall);
    }

    // out[r][..] = rows `first` to `first + count` of `matrix` times packed keys.
    void scores(
        const Rows<const Element>& matrix, long head, long first, long count, const float* packed, float* out,
        long width) const {
        const Element* rows = matrix.at(head / a.heads, a.pixels, head % a.heads) + first * matrix.row;
        multiply_rows<A>(
            words_of(rows), matrix.row / A::kDeep, matrix.width / A::kDeep, packed, packing.panels, count, out, width);
    }

    // Rows of `matrix` = rows of words times packed values.
    void write(
        const Rows<Element>& matrix, long head, long first, long count, const float* rows, long width,
        const float* packed, float* out) const {
        const long panels = ceil_div(matrix.width, kPanel), out_width = panels * kPanel;
        multiply_rows<A>(rows, width, packing.words, packed, panels, count, out, out_width);
        for (long r = 0; r < count; ++r) {
            Element* to = matrix.at(head / a.heads, a.pixels, head % a.heads) + (first + r) * matrix.row;
            for (long c = 0; c < matrix.width; c += kLanes)
                store_some(to + c, load(out + r * out_width + c), matrix.width - c);
        }
    }

    struct Block {
        long first, count, width;
        float *scores, *products, *out;
    };
    Block block_of(long index) const {
        const long first = index * kBlock, count = std::min(kBlock, a.pixels - first);
        const long width = packing.panels * kPanel + kLanes;
        const long out = ceil_div(std::max(a.q.width, a.v.width), kPanel) * kPanel;
        float* memory = scratch<float>(Slot::kOutput, count * (2 * width + out));
        return {first, count, width, memory, memory + count * width, memory + 2 * count * width};
    }

    void of_queries(long head, long index, float* packed) const {
        const Block b = block_of(index);
        scores(a.q, head, b.first, b.count, keys(packed, 1), b.scores, b.width);
        scores(a.dy, head, b.first, b.count, keys(packed, 2), b.products, b.width);
        for (long r = 0; r < b.count; ++r) {
            float *p = b.scores + r * b.width, *dp = b.products + r * b.width;
            const float* kept = a.statistics + 2 * head * a.pixels + b.first + r;
            Vec total = zero();
            for (long key = 0; key < a.pixels; key += kLanes) {
                const Vec value = exp((load(p + key) - kept[0]) * a.scale) * kept[a.pixels];
                store(p + key, masked(value, key, a.pixels, 0.0f));
                total += load(p + key) * masked(load(dp + key), key, a.pixels, 0.0f);
            }
            const float sum = sums(packed)[b.first + r] = sum_of(total);
            Element* ds = reinterpret_cast<Element*>(p);
            for (long key = 0; key < a.pixels; key += kLanes) {
                const Vec value = load(p + key) * (load(dp + key) - sum) * a.scale;
                store(ds + key, masked(value, key, a.pixels, 0.0f));
            }
        }
        write(a.dq, head, b.first, b.count, b.scores, b.width, values(packed, 0), b.out);
    }

    void of_keys(long head, long index, float* packed) const {
        const Block b = block_of(index);
        scores(a.k, head, b.first, b.count, keys(packed, 0), b.scores, b.width);
        scores(a.v, head, b.first, b.count, keys(packed, 3), b.products, b.width);
        const float *mosts = a.statistics + 2 * head * a.pixels, *inverses = mosts + a.pixels, *totals = sums(packed);
        for (long r = 0; r < b.count; ++r) {
            float *p = b.scores + r * b.width, *dp = b.products + r * b.width;
            Element *rounded = reinterpret_cast<Element*>(p), *ds = reinterpret_cast<Element*>(dp);
            for (long query = 0; query < a.pixels; query += kLanes) {
                const long lanes = a.pixels - query;
                const Vec most = load_some(mosts + query, lanes), inverse = load_some(inverses + query, lanes);
                const Vec sum = load_some(totals + query, lanes);
                const Vec value = masked(exp((load(p + query) - most) * a.scale) * inverse, query, a.pixels, 0.0f);
                const Vec gradient = value * (load(dp + query) - sum) * a.scale;
                store(rounded + query, value);
                store(ds + query, masked(gradient, query, a.pixels, 0.0f));
            }
        }
        write(a.dv, head, b.first, b.count, b.scores, b.width, values(packed, 2), b.out);
        write(a.dk, head, b.first, b.count, b.products, b.width, values(packed, 1), b.out);
    }
};

}  // namespace
}  // namespace fastddpm

// dq, dk and dv from dy and what `fastddpm_attention` took and gave. All are without gaps: [N, P, heads, ..].
extern "C" void fastddpm_attention_gradient(
    void* dq, void* dk, void* dv, const void* dy, const void* q, const void* k, const void* v, float* statistics,
    long n, long pixels, long heads, long width, long value_width, float scale, int bfloat16, int threads) {
    using namespace fastddpm;
    with_arithmetic(bfloat16, [&](auto arithmetic) {
        using A = decltype(arithmetic);
        using Element = typename A::Element;
        const auto read = [&](const void* data, long columns) {
            return Rows<const Element>{static_cast<const Element*>(data), heads * columns, columns};
        };
        const auto write = [&](void* data, long columns) {
            return Rows<Element>{static_cast<Element*>(data), heads * columns, columns};
        };
        const Attention<A> args{
            {}, read(q, width), read(k, width), read(v, value_width), n, pixels, heads, scale, threads, statistics,
            write(dq, width), write(dk, width), write(dv, value_width), read(dy, value_width)};
        AttentionGradient<A>(args).run();
    });
}
