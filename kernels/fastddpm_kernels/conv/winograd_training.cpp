// What training adds to the convolutions of `winograd.cpp`: weights that are packed at every call, and their gradient.
//
// The gradient of the weight is the exact adjoint of the convolution by tiles of 4x4,
//
//     dw = G^T [ sum over tiles of (A dy A^T)^T . (B^T x B) ] G
//
// 36 products of matrices [O, tiles] x [tiles, C], where the definition has 144 times as many multiplications per tile
// and pair of channels. Tiles come in chunks, whose transforms lie in the caches; a block of channels goes through all
// points and back before the next one, so that the sums of products are never in memory.

#include <type_traits>

#include "native/gemm.h"
#include "native/runtime.h"
#include "winograd_transforms.h"

extern "C" void fastddpm_conv3x3_winograd(
    void* y, const void* x, const void* x2, const float* weight, const float* bias, const void* residual, long n,
    long height, long width, long channels, long channels2, long out_channels, int m, int upsample, int taps,
    int bfloat16, int threads);

namespace fastddpm {
namespace {

// Where element [o, c, i, j] of a weight lies: of either memory format, or seen as that of the convolution's adjoint.
struct Strides {
    long out, in, row, column;
};

template <class T>
struct VectorOf;
template <>
struct VectorOf<double> {
    using type = Wide;
};
template <>
struct VectorOf<float> {
    using type = Vec;
};

// Packs a weight [out_channels, channels + channels2, 3, 3] as `fastddpm_conv3x3_winograd` reads it.
template <class A, int M>
void pack(
    float* packed, const float* weight, const Strides& strides, long out_channels, long channels, long channels2,
    int threads) {
    using Value = typename VectorOf<typename A::Precise>::type;
    constexpr int kSize = Transform<M>::kSize, kGroup = kLanes * A::kDeep;  // channels of a vector of words
    const long panels = ceil_div(out_channels, kPanel);
    if (A::kDeep == 1) {  // nothing is padded: both sources are one
        channels += channels2;
        channels2 = 0;
    }
    const long depth = A::words(channels) + A::words(channels2);
    const long first_groups = ceil_div(channels, kGroup), groups = first_groups + ceil_div(channels2, kGroup);
    for_each(panels * groups, threads, [&](long item) {
        const long panel = item / groups, group = item % groups;
        const bool second = group >= first_groups;
        const long within = (second ? group - first_groups : group) * kGroup;
        const long count = std::min<long>(kGroup, (second ? channels2 : channels) - within);
        const long begin = within + (second ? channels : 0);
        float taps[kGroup][9][kPanel] = {};
        const long outs = std::min<long>(kPanel, out_channels - panel * kPanel);
        for (int tap = 0; tap < 9; ++tap) {
            const float* place = weight + panel * kPanel * strides.out + begin * strides.in + tap / 3 * strides.row +
                                 tap % 3 * strides.column;
            if (strides.out == 1) {  // neighbours in memory are read together
                for (long c = 0; c < count; ++c)
                    std::memcpy(taps[c][tap], place + c * strides.in, outs * sizeof(float));
                continue;
            }
            for (long o = 0; o < outs; ++o)
                for (long c = 0; c < count; ++c) taps[c][tap][o] = place[o * strides.out + c * strides.in];
        }
        for (long word = 0; word < std::min<long>(kLanes, depth - group * kLanes); ++word)
            for (int lane = 0; lane < kPanel; lane += kLanes) {
                Vec points[kSize * kSize][A::kDeep];
                for (int index = 0; index < A::kDeep; ++index) {
                    const auto& tap = taps[A::channel(word, index)];
                    Value w[9], half[kSize][3], whole[kSize];
#pragma GCC unroll 9
                    for (int i = 0; i < 9; ++i) w[i] = __builtin_convertvector(load(tap[i] + lane), Value);
#pragma GCC unroll 3
                    for (int j = 0; j < 3; ++j) Transform<M>::weight(w + j, 3, &half[0][j], 3);
#pragma GCC unroll 6
                    for (int i = 0; i < kSize; ++i) {
                        Transform<M>::weight(half[i], 1, whole, 1);
#pragma GCC unroll 6
                        for (int j = 0; j < kSize; ++j)
                            points[i * kSize + j][index] = __builtin_convertvector(whole[j], Vec);
                    }
                }
                for (int point = 0; point < kSize * kSize; ++point) {
                    const long place = (point * panels + panel) * depth + group * kLanes + word;
                    store(packed + place * kPanel + lane, A::combine(points[point]));
                }
            }
    });
}

template <class A>
struct Gradient {
    using Element = typename A::Element;
    float *dweight, *dbias;
    const Element *dy, *x, *x2;
    Strides strides;  // of dweight
    long n, height, width, channels, channels2, out_channels;
    int threads;
};

template <class A>
class WeightGradient {
    using Element = typename A::Element;
    static constexpr int kTile = A::kGradientTile, kSize = Transform<kTile>::kSize, kPoints = kSize * kSize;
    static constexpr int kOnes = kSize + 1;             // the point (1, 1), at which A dy A^T is the sum over a tile
    static constexpr int kHeight = kLanes < 8 ? kLanes : 8;  // of a product's tile, kColumns vectors wide
    static constexpr long kScratch = 4 << 20;           // bytes of a chunk's transforms

    const Gradient<A>& g;
    // A unit is as many tiles as a word has values.
    const long rows_of_tiles, tiles_in_row, tiles, units, first_panels, in_panels, out_panels, chunks;

  public:
    explicit WeightGradient(const Gradient<A>& gradient)
        : g(gradient),
          rows_of_tiles(ceil_div(g.height, kTile)),
          tiles_in_row(ceil_div(g.width, kTile)),
          tiles(g.n * rows_of_tiles * tiles_in_row),
          units(ceil_div(tiles, A::kDeep)),
          first_panels(ceil_div(g.channels, kLanes)),
          in_panels(first_panels + ceil_div(g.channels2, kLanes)),
          out_panels(ceil_div(g.out_channels, kLanes)),
          chunks(ceil_div(units, std::max<long>(64, kScratch / (kPoints * 4 * kLanes * (in_panels + out_panels))))) {}

    void run() const {
        const long rows = ceil_div(units, chunks) + 1;  // one more than there are, lest all points meet in one cache set
        const Transformed v{rows, in_panels}, z{rows, out_panels};
        float* input = scratch<float>(Slot::kShared, kPoints * (v.point() + z.point()));
        float* output = input + kPoints * v.point();
        for (long chunk = 0; chunk < chunks; ++chunk) {
            const long first = units * chunk / chunks, count = units * (chunk + 1) / chunks - first;
            for_each(ceil_div(count, 8), g.threads, [&](long item) {
                for (long unit = item * 8; unit < std::min(count, item * 8 + 8); ++unit)
                    transform(first + unit, input + unit * kLanes, v, output + unit * kLanes, z);
            });
            if (g.dbias) add_bias(output + kOnes * z.point(), z, count, chunk == 0);
            // Panels of a block: many are fewer reads of the transforms, few are work for every thread.
            const long side = ceil_div(in_panels, 4) * ceil_div(out_panels, 4) >= 2 * g.threads ? 4 : 2;
            const long across = ceil_div(in_panels, side);
            for_each(across * ceil_div(out_panels, side), g.threads, [&](long item) {
                const long o = item / across * side, c = item % across * side;
                multiply(
                    input, v, output, z, count, c, std::min(side, in_panels - c), o, std::min(side, out_panels - o),
                    chunk == 0);
            });
        }
    }

  private:
    // [points, panels of channels, units, kLanes]
    struct Transformed {
        long rows, panels;
        long panel() const { return rows * kLanes; }
        long point() const { return panels * panel(); }
    };

    void transform(long unit, float* v, const Transformed& v_size, float* z, const Transformed& z_size) const {
        long pixels[A::kDeep][kSize][kSize];  // of every tile of the unit; -1 outside
        for (int index = 0; index < A::kDeep; ++index) {
            const long tile = unit * A::kDeep + index;
            const long in_image = tile % (rows_of_tiles * tiles_in_row);
            const long image = tile / (rows_of_tiles * tiles_in_row) * g.height;
            const long y = in_image / tiles_in_row * kTile, x = in_image % tiles_in_row * kTile;
            const auto inside = [&](long i, long j) {
                return tile < tiles && i >= 0 && i < g.height && j >= 0 && j < g.width;
            };
            for (int i = 0; i < kSize; ++i)
                for (int j = 0; j < kSize; ++j)
                    pixels[index][i][j] =
                        inside(y + i - 1, x + j - 1) ? (image + y + i - 1) * g.width + x + j - 1 : -1;
        }
        const auto source = [&](const Element* from, long channels, long panel) {
            for (long c = 0; c < channels; c += kLanes, ++panel)
                both<kSize>(
                    v + panel * v_size.panel(), v_size.point(), Transform<kTile>::input, [&](int index, int i, int j) {
                        const long pixel = pixels[index][i][j];
                        return pixel < 0 ? zero() : load_some(from + pixel * channels + c, channels - c);
                    });
        };
        source(g.x, g.channels, 0);
        if (g.channels2) source(g.x2, g.channels2, first_panels);
        for (long o = 0; o < g.out_channels; o += kLanes)
            both<kTile>(
                z + o / kLanes * z_size.panel(), z_size.point(), Transform<kTile>::output_adjoint,
                [&](int index, int i, int j) {
                    const long pixel = pixels[index][i + 1][j + 1];
                    return pixel < 0 ? zero() : load_some(g.dy + pixel * g.out_channels + o, g.out_channels - o);
                });
    }

    // Both dimensions of a transform from kFrom x kFrom pixels of every tile of a unit, to out[point * distance].
    template <int kFrom, class OneDimension, class Pixel>
    static inline __attribute__((always_inline)) void both(
        float* out, long distance, const OneDimension& transform, const Pixel& pixel) {
        Vec half[A::kDeep][kSize][kFrom], column[kFrom];
#pragma GCC unroll 2
        for (int index = 0; index < A::kDeep; ++index)
#pragma GCC unroll 6
            for (int j = 0; j < kFrom; ++j) {
#pragma GCC unroll 6
                for (int i = 0; i < kFrom; ++i) column[i] = pixel(index, i, j);
                transform(column, 1, &half[index][0][j], kFrom);
            }
#pragma GCC unroll 6
        for (int i = 0; i < kSize; ++i) {
            Vec whole[A::kDeep][kSize];
#pragma GCC unroll 2
            for (int index = 0; index < A::kDeep; ++index) transform(half[index][i], 1, whole[index], 1);
#pragma GCC unroll 6
            for (int j = 0; j < kSize; ++j) {
                Vec values[A::kDeep];
#pragma GCC unroll 2
                for (int index = 0; index < A::kDeep; ++index) values[index] = whole[index][j];
                store(out + (i * kSize + j) * distance, A::combine(values));
            }
        }
    }

    void add_bias(const float* sums, const Transformed& size, long count, bool first) const {
        for (long o = 0; o < g.out_channels; o += kLanes) {
            const float* rows = sums + o / kLanes * size.panel();
            Wide sum = {};
            for (long unit = 0; unit < count; ++unit)
                sum += __builtin_convertvector(A::total(load(rows + unit * kLanes)), Wide);
            Vec value = __builtin_convertvector(sum, Vec);
            if (!first) value += load_some(g.dbias + o, g.out_channels - o);
            store_some(g.dbias + o, value, g.out_channels - o);
        }
    }

    // The gradient of `outs` panels of output channels from `o` on by `ins` of input channels from `c` on.
    void multiply(
        const float* v, const Transformed& v_size, const float* z, const Transformed& z_size, long count, long c,
        long ins, long o, long outs, bool first) const {
        const long width = ins * kLanes, height = outs * kLanes;
        float* products = scratch<float>(Slot::kOutput, kPoints * (height * width + kLanes));
        const long distance = height * width + kLanes;
        for (int point = 0; point < kPoints; ++point)
            for (long start = 0; start < count; start += kDepth) {
                const long depth = std::min(kDepth, count - start);
                const float* columns = v + point * v_size.point() + c * v_size.panel() + start * kLanes;
                const float* rows = z + point * z_size.point() + o * z_size.panel() + start * kLanes;
                for (long in = 0; in < ins; in += kColumns)
                    for (long out = 0; out < height; out += kHeight) {
                        float* sums = products + point * distance + out * width + in * kLanes;
                        const float* row = rows + out / kLanes * z_size.panel() + out % kLanes;
                        with_rows<kColumns>(static_cast<int>(std::min<long>(kColumns, ins - in)), [&](auto vectors) {
                            add_product<vectors>(
                                sums, width, row, columns + in * v_size.panel(), v_size.panel(), depth, start == 0);
                        });
                    }
            }
        for (long out = 0; out < std::min(height, g.out_channels - o * kLanes); ++out)
            for (long in = 0; in < ins; ++in)
                transform_back(products + out * width + in * kLanes, distance, o * kLanes + out, c + in, first);
    }

    // sums[kHeight][kVectors] (+)= sum over k of rows[k][r] * columns[vector][k]
    template <int kVectors>
    static void add_product(
        float* sums, long width, const float* rows, const float* columns, long panel, long depth, bool first) {
        Vec total[kHeight][kVectors] = {};
        for (long k = 0; k < depth; ++k) {
            Vec column[kVectors];
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) column[j] = load(columns + j * panel + k * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < kHeight; ++r) {
                const float word = rows[k * kLanes + r];
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j) total[r][j] = A::multiply_add(total[r][j], column[j], word);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kHeight; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) {
                float* place = sums + r * width + j * kLanes;
                store(place, first ? total[r][j] : load(place) + total[r][j]);
            }
    }

    void transform_back(const float* products, long distance, long out, long panel, bool first) const {
        Vec points[kSize][kSize], half[3][kSize], taps[3];
#pragma GCC unroll 6
        for (int i = 0; i < kSize; ++i)
#pragma GCC unroll 6
            for (int j = 0; j < kSize; ++j) points[i][j] = load(products + (i * kSize + j) * distance);
#pragma GCC unroll 6
        for (int j = 0; j < kSize; ++j) Transform<kTile>::weight_adjoint(&points[0][j], kSize, &half[0][j], kSize);
        const bool second = panel >= first_panels;
        const long within = (second ? panel - first_panels : panel) * kLanes;
        const long lanes = (second ? g.channels2 : g.channels) - within, channel = within + (second ? g.channels : 0);
        for (int i = 0; i < 3; ++i) {
            Transform<kTile>::weight_adjoint(half[i], 1, taps, 1);
            for (int j = 0; j < 3; ++j) {
                float* place = g.dweight + out * g.strides.out + channel * g.strides.in + i * g.strides.row +
                               j * g.strides.column;
                if (g.strides.in == 1) {
                    store_some(place, first ? taps[j] : taps[j] + load_some(place, lanes), lanes);
                    continue;
                }
                for (long lane = 0; lane < std::min<long>(kLanes, lanes); ++lane, place += g.strides.in)
                    *place = first ? taps[j][lane] : *place + taps[j][lane];
            }
        }
    }
};

template <class A, int M>
void convolve(
    void* y, const void* x, const void* x2, const float* weight, const Strides& strides, const float* bias, long n,
    long height, long width, long channels, long channels2, long out_channels, int threads) {
    constexpr long kPoints = Transform<M>::kSize * Transform<M>::kSize;
    const long panels = ceil_div(out_channels, kPanel), depth = A::words(channels) + A::words(channels2);
    float* packed = scratch<float>(Slot::kPacked, kPoints * panels * depth * kPanel);
    pack<A, M>(packed, weight, strides, out_channels, channels, channels2, threads);
    fastddpm_conv3x3_winograd(
        y, x, x2, packed, bias, nullptr, n, height, width, channels, channels2, out_channels, M, 0, 0, A::kDeep == 2,
        threads);
}

}  // namespace
}  // namespace fastddpm

// y [N, H, W, O] = conv3x3(concat(x [N, H, W, C], x2 [N, H, W, C2])) + bias [O] by tiles of m x m. Element [o, c, i, j]
// of the weight is at o * out + c * in + i * row + j * column: with channels exchanged and rows and columns backwards,
// this is the gradient of the input. bias and x2 (C2 = 0) may be null. All are floats; with `bfloat16` (m = 2), y, x and
// x2 are bfloat16.
extern "C" void fastddpm_conv3x3_unpacked(
    void* y, const void* x, const void* x2, const float* weight, long out, long in, long row, long column,
    const float* bias, long n, long height, long width, long channels, long channels2, long out_channels, int m,
    int bfloat16, int threads) {
    using namespace fastddpm;
    const Strides strides{out, in, row, column};
    with_tile(bfloat16, m, [&](auto arithmetic, auto tile) {
        convolve<decltype(arithmetic), tile>(
            y, x, x2, weight, strides, bias, n, height, width, channels, channels2, out_channels, threads);
    });
}

// The gradients of weight and bias (which may be null) of that convolution from dy [N, H, W, O]; strides as there. With
// `bfloat16`, dy, x and x2 are bfloat16.
extern "C" void fastddpm_conv3x3_weight_gradient(
    float* dweight, long out, long in, long row, long column, float* dbias, const void* dy, const void* x,
    const void* x2, long n, long height, long width, long channels, long channels2, long out_channels, int bfloat16,
    int threads) {
    using namespace fastddpm;
    with_tile(bfloat16, 4, [&](auto arithmetic, auto tile) {
        using A = decltype(arithmetic);
        using Element = typename A::Element;
        static_assert(tile == A::kGradientTile || A::kDeep == 1);
        const Strides strides{out, in, row, column};
        const Gradient<A> gradient{
            dweight, dbias, static_cast<const Element*>(dy), static_cast<const Element*>(x),
            static_cast<const Element*>(x2), strides, n, height, width, channels, channels2, out_channels, threads};
        WeightGradient<A>(gradient).run();
    });
}
