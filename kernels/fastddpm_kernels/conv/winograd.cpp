// 3x3 convolutions of stride 1 and padding 1 by Winograd's minimal filtering (Lavin & Gray 2016, arXiv:1509.09308).
//
//     y = A^T [ (G w G^T) . (B^T x B) ] A          for every m x m tile of the output
//
// m = 2: 4 points, 16 products for 4 outputs, where the definition has 36. m = 4: 36 products for 16 outputs (144).
// Products of one point are a matrix product over the channels. A block of tiles goes through all three steps before
// the next one, so that what lies between them stays in the cache.
//
// Where the input is an image upsampled by two (nearest neighbour), rows 2i and 2i + 1 are equal, and point -1, whose
// row of B^T takes their differences, gives zero: m = 4 needs only 25 of its 36 products.
//
// Weights are transformed beforehand; or, in a quarter of the memory for m = 4, by every thread as it multiplies: a part
// of a panel, which stays in its cache for all tiles of a block.

#include <type_traits>

#include "native/gemm.h"
#include "native/instruction.h"
#include "native/runtime.h"
#include "winograd_transforms.h"

namespace fastddpm {
namespace {

constexpr int kVanishing = 2;  // the index of -1

template <class A>
struct Conv {
    using Element = typename A::Element;
    Element* y;
    const Element *x, *x2;
    const typename A::Weight* weight;
    const float* bias;
    const Element* residual;
    long n, height, width, channels, channels2, out_channels;  // of y, in space
    bool taps;  // whether the weight is [panels, 9 taps, words of C and C2, kPanel], not transformed
    int threads;
};

template <class A, int M, bool kUpsample>
class Winograd {
    using Element = typename A::Element;
    using Group = typename A::Group;
    static constexpr int kParts = sizeof(Group) / sizeof(Vec), kGroup = kParts * kLanes;  // vectors, channels
    static constexpr int kSize = Transform<M>::kSize;
    static constexpr int kPoints = kUpsample ? (kSize - 1) * (kSize - 1) : kSize * kSize;

    const Conv<A>& c;
    const long rows_of_tiles, tiles_in_row, tiles, depth, stride, panels;  // depth and stride in words
    const long columns;                                                    // vectors of output channels

  public:
    explicit Winograd(const Conv<A>& conv)
        : c(conv),
          rows_of_tiles(ceil_div(c.height, M)),
          tiles_in_row(ceil_div(c.width, M)),
          tiles(c.n * rows_of_tiles * tiles_in_row),
          depth(A::words(c.channels) + A::words(c.channels2)),
          stride(ceil_div(c.channels, kGroup) * kLanes + ceil_div(c.channels2, kGroup) * kLanes + kLanes),
          panels(ceil_div(c.out_channels, kPanel)),
          columns(ceil_div(c.out_channels, kLanes)) {}

    // Tiles of a block: few, so that the cache holds them, or, where it does not hold all weights, enough that one that
    // is read from memory is used often.
    static constexpr long kCache = 4 << 20, kFewBytes = 128 << 10, kOwnBytes = 2 << 20, kInputBytes = 10 << 20;

    void run() const {
        const long bytes = (c.taps ? 9 : kPoints) * panels * kPanel * depth * static_cast<long>(sizeof(*c.weight));
        const bool kept = bytes <= kCache;
        long blocks = ceil_div(tiles, (kept ? 2 : 6) * kRows);
        // All input of a block is read once more for every panel. With packed weights fewer tiles would cost more.
        if (c.taps) blocks = std::max<long>(blocks, kPoints * tiles * stride * static_cast<long>(sizeof(float)) / kInputBytes);
        // Few weights, or those of too few output channels for all threads, are read by every thread.
        if (tiles >= 2 * c.threads && (bytes <= kFewBytes || columns * blocks < c.threads))
            blocks = std::max<long>(blocks, c.threads);
        // Each thread takes its own tiles with all channels, so that no core reads what another wrote.
        const bool apart = kept ? blocks >= c.threads : tiles >= 2 * kRows * c.threads;
        if (apart) blocks = ceil_div(blocks, c.threads) * c.threads;
        if (apart || c.threads == 1) {
            for_each(blocks, c.threads, [&](long i) {
                const long first = tiles * i / blocks, count = tiles * (i + 1) / blocks - first;
                float* input = scratch<float>(Slot::kInput, kPoints * count * stride);
                transform_input(input, count, first, count);
                for (long column = 0; column < columns; column += kColumns)
                    multiply(input, count, 0, first, count, column, std::min(columns, column + kColumns));
            });
            return;
        }
        // Few tiles: every thread reads its own part of the weights. Each transforms all the input for itself, which is
        // faster than to wait for another one and to read what lies in its cache; a large input is transformed once for all.
        const long size = kPoints * tiles * stride;
        float* shared = nullptr;
        if (size * static_cast<long>(sizeof(float)) > kOwnBytes) {
            shared = scratch<float>(Slot::kShared, size);
            const long parts = std::min<long>(tiles, 4 * c.threads);
            for_each(parts, c.threads, [&](long i) {
                const long first = tiles * i / parts, count = tiles * (i + 1) / parts - first;
                transform_input(shared + first * stride, tiles, first, count);
            });
        }
        const Call call;
        const long width = kHalves > 1 && panels * blocks < 4 * c.threads ? 1 : kColumns;  // of an item, in vectors
        for_each(ceil_div(columns, width) * blocks, c.threads, [&](long i) {
            float* input = shared;
            if (shared == nullptr) {
                input = scratch<float>(Slot::kInput, size);
                if (!call.done(0)) transform_input(input, tiles, 0, tiles);
            }
            const long block = i % blocks, column = i / blocks * width;
            const long first = tiles * block / blocks, count = tiles * (block + 1) / blocks - first;
            multiply(input, tiles, first, first, count, column, std::min(columns, column + width));
        });
    }

  private:
    struct Place {
        long n, y, x;  // of the first output pixel
    };
    Place place(long tile) const {
        const long in_image = tile % (rows_of_tiles * tiles_in_row);
        return {tile / (rows_of_tiles * tiles_in_row), in_image / tiles_in_row * M, in_image % tiles_in_row * M};
    }

    // out[point][out_rows][stride]: B^T x B of `count` tiles from `first` on.
    void transform_input(float* out, long out_rows, long first, long count) const {
        for (long tile = 0; tile < count; ++tile) {
            const Place at = place(first + tile);
            transform_source(out + tile * stride, out_rows, at, c.x, c.channels);
            if (c.channels2)
                transform_source(out + tile * stride + A::words(c.channels), out_rows, at, c.x2, c.channels2);
        }
    }

    void transform_source(float* out, long out_rows, const Place& at, const Element* x, long channels) const {
        const long height = kUpsample ? c.height / 2 : c.height, width = kUpsample ? c.width / 2 : c.width;
        const Element* pixels[kSize][kSize];  // null outside
        for (int i = 0; i < kSize; ++i)
            for (int j = 0; j < kSize; ++j) {
                const long row = at.y + i - 1, column = at.x + j - 1;
                const bool inside = row >= 0 && row < c.height && column >= 0 && column < c.width;
                pixels[i][j] = inside ? x + ((at.n * height + (kUpsample ? row / 2 : row)) * width +
                                             (kUpsample ? column / 2 : column)) * channels
                                      : nullptr;
            }
        const long full = channels / kGroup * kGroup;
        for (long channel = 0; channel < full; channel += kGroup, out += kLanes)
            transform_group(out, out_rows, [&](int i, int j) {
                return pixels[i][j] ? A::load_group(pixels[i][j] + channel, kGroup) : Group{};
            });
        if (full < channels)
            transform_group(out, out_rows, [&](int i, int j) {
                return pixels[i][j] ? A::load_group(pixels[i][j] + full, channels - full) : Group{};
            });
    }

    template <class Pixel>
    inline __attribute__((always_inline)) void transform_group(float* out, long out_rows, const Pixel& pixel) const {
        Vec half[kParts][kSize][kSize];
#pragma GCC unroll 6
        for (int j = 0; j < kSize; ++j) {
            Vec column[kParts][kSize];
#pragma GCC unroll 6
            for (int i = 0; i < kSize; ++i) {
                const Group group = pixel(i, j);
#pragma GCC unroll 2
                for (int part = 0; part < kParts; ++part) column[part][i] = group.part[part];
            }
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part)
                Transform<M>::input(column[part], 1, &half[part][0][j], kSize);
        }
        long point = 0;
#pragma GCC unroll 6
        for (int i = 0; i < kSize; ++i) {
            if (kUpsample && i == kVanishing) continue;
            Vec whole[kParts][kSize];
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) Transform<M>::input(half[part][i], 1, whole[part], 1);
#pragma GCC unroll 6
            for (int j = 0; j < kSize; ++j) {
                if (kUpsample && j == kVanishing) continue;
                Group group;
#pragma GCC unroll 2
                for (int part = 0; part < kParts; ++part) group.part[part] = whole[part][j];
                A::store_group(out + point++ * out_rows * stride, group);
            }
        }
    }

    // Rows `row` .. `row + count` of `input`, which are the tiles from `first` on, times vectors of output channels, [begin,
    // end) of one panel, into y.
    void multiply(
        const float* input, long input_rows, long row, long first, long count, long begin, long end) const {
        const long width = kPanel + kLanes, panel = begin / kColumns, channel0 = begin * kLanes;
        float* products = scratch<float>(Slot::kOutput, kPoints * count * width);
        if (c.taps) multiply_taps(input, input_rows, row, count, begin, end, products, width);
        for (long point = 0; point < kPoints && !c.taps; ++point) {
            const float* a = input + (point * input_rows + row) * stride;
            float* out = products + point * count * width;
            const typename A::Weight* weights =
                c.weight + (point * panels + panel) * depth * kPanel + begin % kColumns * kLanes;
            // Those of the next point, or of the first one of the next panel.
            const long ahead = (point + 1 < kPoints ? panels : panel + 1 < panels ? 1 - (kPoints - 1) * panels : 0) * depth * kPanel;
            with_columns((end - begin) * kLanes, [&](auto columns) {
                for_row_tiles(count, [&](long r, auto rows) {
                    multiply_tile<A, rows, columns>(
                        a + r * stride, stride, weights, depth, out + r * width, width, ahead);
                });
            });
        }
        const long end_channel = std::min(end * kLanes, c.out_channels);
        for (long tile = 0; tile < count; ++tile) {
            const Place at = place(first + tile);
            for (long channel = channel0; channel < end_channel; channel += kLanes)
                transform_output(
                    products + tile * width + channel - channel0, count * width, at, channel,
                    std::min<long>(kLanes, end_channel - channel));
        }
    }

    // The products of `multiply`, of weights that are transformed here.
    void multiply_taps(
        const float* input, long input_rows, long row, long count, long begin, long end, float* products, long width) const {
        if constexpr (!kUpsample && std::is_same_v<typename A::Weight, float>) {
            constexpr long kPart = M == 4 ? 64 : 128;  // words
            const long panel = begin / kColumns, first = begin % kColumns * kLanes, last = first + (end - begin) * kLanes;
            float* weights = scratch<float>(Slot::kPacked, kPoints * kPart * kPanel);
            for (long start = 0; start < depth; start += kPart) {
                const long deep = std::min(kPart, depth - start);
                for (long lane = first; lane < last; lane += kLanes)
                    transform_taps(c.weight + (panel * 9 * depth + start) * kPanel + lane, deep, weights + lane);
                for (long point = 0; point < kPoints; ++point) {
                    const float* a = input + (point * input_rows + row) * stride + start;
                    float* out = products + point * count * width;
                    with_columns((end - begin) * kLanes, [&](auto columns) {
                        for_row_tiles(count, [&](long r, auto rows) {
                            multiply_tile<A, rows, columns>(
                                a + r * stride, stride, weights + point * deep * kPanel + first, deep, out + r * width, width, 0,
                                start > 0);
                        });
                    });
                }
            }
        }
    }

    // G w G^T of `deep` words of a vector of output channels: [taps, depth, kPanel] to [points, deep, kPanel].
    void transform_taps(const float* weight, long deep, float* out) const {
        // In bfloat16 the input's words hold the even and the odd ones of four neighbouring channels.
        for (long word = 0; word < deep; word += A::kDeep) {
            Vec values[A::kDeep][A::kDeep][kSize * kSize];  // [even, odd][of a word]
#pragma GCC unroll 2
            for (int of = 0; of < A::kDeep; ++of)
#pragma GCC unroll 2
                for (int index = 0; index < A::kDeep; ++index) {
                    Vec w[9], half[kSize][3];
#pragma GCC unroll 9
                    for (int tap = 0; tap < 9; ++tap)
                        w[tap] = A::value(load(weight + (tap * depth + word + index) * kPanel), of);
#pragma GCC unroll 3
                    for (int j = 0; j < 3; ++j) Transform<M>::weight(w + j, 3, &half[0][j], 3);
#pragma GCC unroll 6
                    for (int i = 0; i < kSize; ++i) Transform<M>::weight(half[i], 1, &values[of][index][i * kSize], 1);
                }
            const long group = word / kLanes * kLanes, within = word % kLanes / A::kDeep;
#pragma GCC unroll 2
            for (int of = 0; of < A::kDeep; ++of) {
                const long place = A::kDeep == 1 ? word : group + within + of * (kLanes / 2);
                for (int point = 0; point < kSize * kSize; ++point) {
                    Vec words[A::kDeep];
                    for (int index = 0; index < A::kDeep; ++index) words[index] = values[of][index][point];
                    store(out + (point * deep + place) * kPanel, A::combine(words));
                }
            }
        }
    }

    void transform_output(const float* products, long distance, const Place& at, long channel, long lanes) const {
        Vec half[M][kSize], out[M];
        long point = 0;
        Vec points[kSize][kSize];
#pragma GCC unroll 6
        for (int i = 0; i < kSize; ++i)
#pragma GCC unroll 6
            for (int j = 0; j < kSize; ++j)
                points[i][j] = kUpsample && (i == kVanishing || j == kVanishing)
                                   ? zero()
                                   : load(products + point++ * distance);
#pragma GCC unroll 6
        for (int j = 0; j < kSize; ++j) Transform<M>::output(&points[0][j], kSize, &half[0][j], kSize);
        const Vec bias = c.bias ? load_some(c.bias + channel, lanes) : zero();
        for (int i = 0; i < M && at.y + i < c.height; ++i) {
            Transform<M>::output(half[i], 1, out, 1);
            const long start = ((at.n * c.height + at.y + i) * c.width + at.x) * c.out_channels + channel;
            for (int j = 0; j < M && at.x + j < c.width; ++j) {
                const long offset = start + j * c.out_channels;
                Vec value = out[j] + bias;
                if (c.residual) value += load_some(c.residual + offset, lanes);
                store_some(c.y + offset, value, lanes);
            }
        }
    }
};

}  // namespace
}  // namespace fastddpm

// y [N, H, W, O] = conv3x3(concat(x [N, H, W, C], x2 [N, H, W, C2])) + bias [O] + residual [N, H, W, O]; H and W are
// those of y, twice those of x where `upsample`. bias, residual and x2 (C2 = 0) may be null. weight is packed,
// [points, ceil(O / panel), words of C and C2, panel], for tiles of m x m; with `taps` as `fastddpm_conv_direct` reads it
// (not for `upsample`; C and C2 multiples of 32 in bfloat16). `kind`: 0 all are floats; 1 y, x, x2 and residual are
// bfloat16 (m = 2); 2 weight is float16 (without `taps`).
extern "C" void fastddpm_conv3x3_winograd(
    void* y, const void* x, const void* x2, const void* weight, const float* bias, const void* residual, long n,
    long height, long width, long channels, long channels2, long out_channels, int m, int upsample, int taps, int kind,
    int threads) {
    using namespace fastddpm;
    const auto convolve = [&](auto arithmetic, auto tile) {
        using A = decltype(arithmetic);
        using Element = typename A::Element;
        const Conv<A> conv{
            static_cast<Element*>(y), static_cast<const Element*>(x), static_cast<const Element*>(x2),
            static_cast<const typename A::Weight*>(weight), bias, static_cast<const Element*>(residual), n, height,
            width, channels, channels2, out_channels, taps != 0, threads};
        if (upsample)
            Winograd<A, tile, true>(conv).run();
        else
            Winograd<A, tile, false>(conv).run();
    };
    with_weights(kind, [&](auto arithmetic) { with_tile_of(arithmetic, m, convolve); });
}
FASTDDPM_INSTRUCTION(fastddpm_conv3x3_winograd)
