// Shared by attention and its gradient: the layout of heads, their packing, products of their rows.
#pragma once

#include "native/gemm.h"
#include "native/runtime.h"

namespace fastddpm {

// A matrix [pixels, width] of every head: that of sample n, head h begins at data + n * pixels * row + h * width.
template <class Element>
struct Rows {
    Element* data;
    long row, width;

    Element* at(long n, long pixels, long head) const { return data + n * pixels * row + head * width; }
};

template <class A>
struct Attention {
    using Element = typename A::Element;
    Rows<Element> y;
    Rows<const Element> q, k, v;
    long n, pixels, heads;
    float scale;
    int threads;
    float* statistics;  // [N, heads, 2, pixels], for gradients, or null: of every query the largest score, 1 / sum

    // For gradients.
    Rows<Element> dq, dk, dv;
    Rows<const Element> dy;
};

constexpr long kBlock = 2 * kRows;  // rows of an item
constexpr float kLeast = -3.4e38f;

// What is multiplied with rows of words: packed as columns of a product of all pixels, padded with zeros.
template <class A>
struct Packing {
    using Element = typename A::Element;
    long pixels, panels, words;  // panels of pixels; words of all pixels

    explicit Packing(long count) : pixels(count), panels(ceil_div(count, kPanel)), words(ceil_div(count, A::kDeep)) {}

    long keys_size(long width) const { return panels * (width / A::kDeep) * kPanel; }
    long values_size(long width) const { return ceil_div(width, kPanel) * words * kPanel; }

    // A product over channels, a column for each pixel: [panels of pixels, words of channels, kPanel].
    void keys(const Element* rows, long row, long width, float* packed) const {
        const long depth = width / A::kDeep;
        for (long panel = 0; panel < panels; ++panel, packed += depth * kPanel) {
            const long count = std::min<long>(kPanel, pixels - panel * kPanel);
            if (count < kPanel) std::fill_n(packed, depth * kPanel, 0.0f);
            for (long key = 0; key < count; ++key) {
                const float* from = reinterpret_cast<const float*>(rows + (panel * kPanel + key) * row);
                for (long word = 0; word < depth; ++word) packed[word * kPanel + key] = load_word(from + word);
            }
        }
    }

    // A product over pixels, a column for each channel: [panels of channels, words of pixels, kPanel].
    void values(const Element* rows, long row, long width, float* packed) const {
        for (long panel = 0; panel < ceil_div(width, kPanel); ++panel)
            for (long word = 0; word < words; ++word)
                for (int column = 0; column < kColumns; ++column, packed += kLanes) {
                    const long channel = panel * kPanel + column * kLanes, lanes = width - channel;
                    Vec of_pixels[A::kDeep];
                    for (int index = 0; index < A::kDeep; ++index) {
                        const long pixel = word * A::kDeep + index;
                        const bool present = pixel < pixels && lanes > 0;
                        of_pixels[index] = present ? load_some(rows + pixel * row + channel, lanes) : zero();
                    }
                    store(packed, A::combine(of_pixels));
                }
    }
};

// out[count][panels * kPanel], a row every `out_row`, = rows of `depth` words times packed panels.
template <class A>
void multiply_rows(
    const float* rows, long row, long depth, const float* packed, long panels, long count, float* out, long out_row) {
    for (long panel = 0; panel < panels; ++panel)
        for_row_tiles(count, [&](long r, auto height) {
            multiply_tile<A, height>(
                rows + r * row, row, packed + panel * depth * kPanel, depth, out + r * out_row + panel * kPanel, out_row);
        });
}

template <class Element>
inline const float* words_of(const Element* p) {
    return reinterpret_cast<const float*>(p);
}

// The lanes of keys from `key` on that there are; `other` in the rest.
inline Vec masked(Vec value, long key, long pixels, float other) {
    for (long lane = std::max<long>(0, pixels - key); lane < kLanes; ++lane) value[lane] = other;
    return value;
}

inline float sum_of(Vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);
#endif
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
    return total;
}

}  // namespace fastddpm
