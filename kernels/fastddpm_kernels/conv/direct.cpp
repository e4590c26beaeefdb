// Convolutions by their definition: one matrix product whose rows are gathered by pointers, so that what it multiplies
// is never copied (Dukhan 2019, The Indirect Convolution Algorithm, arXiv:1907.02129). For layers with few pixels,
// where reading the weights is the cost, and for all that Winograd's algorithm does not do.

#include <type_traits>

#include "native/gemm.h"
#include "native/instruction.h"
#include "native/runtime.h"

namespace fastddpm {
namespace {

template <class A>
struct Conv {
    using Element = typename A::Element;
    Element* y;
    const Element *x, *x2;
    const typename A::Weight* weight;
    const float* bias;
    const Element* residual;
    long n, height, width, channels, channels2;  // of x
    long out_height, out_width, out_channels;    // of y
    long kernel, stride, padding;                // padding above and to the left
    bool upsample;
    int threads;
};

// Nearest-neighbour upsampling by two and a 3x3 convolution are four 2x2 convolutions, one for the output pixels of
// each parity: with padding 1 for even rows and 0 for odd ones. Else there is one phase, which is the convolution.
template <class A>
struct Phase {
    long kernel, pad_top, pad_left, step, top, left, height, width;  // its pixel (i, j) is y[step * i + top][..]
    const typename A::Weight* weight;
};

template <class A>
class Direct {
    using Element = typename A::Element;
    static constexpr long kBlock = 4 * kRows;  // output pixels of an item

    static constexpr long kFewWords = 8;  // of a pixel: rows are then gathered before they are multiplied
    static constexpr long kApart = 2048;  // bytes: rows that begin multiples of this apart meet in few sets of a cache
    static constexpr int kFewChannels = 4, kPixels = 4;
    static constexpr long kAhead = 128;  // rows of a panel that are asked for before they are multiplied

    const Conv<A>& c;
    const long depth, panels, columns, taps;  // depth in words: whole ones, as of channels next to each other; columns
                                              // are vectors of output channels

  public:
    explicit Direct(const Conv<A>& conv)
        : c(conv),
          depth((c.channels + c.channels2) / A::kDeep),
          panels(ceil_div(c.out_channels, kPanel)),
          columns(ceil_div(c.out_channels, kLanes)),
          taps(c.upsample ? 4 : c.kernel * c.kernel) {}

    void run() const {
        const long phases = c.upsample ? 4 : 1;
        const long blocks = ceil_div(rows(), kBlock);
        // Few blocks: every thread reads its own part of the weights. Else its own part of the pixels.
        long parts = blocks >= 4 * c.threads || c.threads == 1 ? 1 : panels;
        if (parts > 1 && phases * blocks * panels < 4 * c.threads && kHalves > 1) parts = columns;
        // What lies outside of the image is read from here. Behind it, for few output channels, their weights.
        const long outside = ceil_div(std::max(c.channels, c.channels2) * sizeof(Element), sizeof(float));
        float* words = scratch<float>(Slot::kShared, outside + (few_channels() ? c.out_channels * taps * depth : 0));
        std::fill_n(words, outside, 0.0f);
        const Element* zeros = reinterpret_cast<const Element*>(words);
        if (few_channels()) {
            float* rows = words + outside;
            for (long k = 0; k < taps * depth; ++k)
                for (long o = 0; o < c.out_channels; ++o) rows[o * taps * depth + k] = load_word(c.weight + k * kPanel + o);
            for_each(blocks, c.threads, [&](long block) {
                const long first = rows_of(blocks, block), last = rows_of(blocks, block + 1);
                with_rows<kFewChannels>(static_cast<int>(c.out_channels), [&](auto channels) {
                    dot_products<channels>(zeros, rows, first, last - first);
                });
            });
            return;
        }
        const Call call;
        const long width = parts == columns ? 1 : kColumns;  // of a part's unit, in vectors
        const long units = ceil_div(columns, width);
        for_each(phases * blocks * parts, c.threads, [&](long i) {
            const long block = i % blocks, part = i / blocks % parts, phase = i / blocks / parts;
            const long first = rows_of(blocks, block), last = rows_of(blocks, block + 1);
            multiply(
                this->phase(phase), zeros, first, last - first, width * (units * part / parts),
                std::min(columns, width * (units * (part + 1) / parts)), call.done(phase * blocks + block));
        });
    }

  private:
    // Output pixels of a phase, and the first of a block.
    long rows() const { return c.n * c.out_height * c.out_width / (c.upsample ? 4 : 1); }
    long rows_of(long blocks, long block) const { return rows() * block / blocks; }

    // Of the two sources, whose segments take turns.
    long words_of(long segment, long sources) const {
        return (sources == 2 && segment % 2 ? c.channels2 : c.channels) / A::kDeep;
    }

    // Whether whole vectors of a pixel's words are multiplied with those of each output channel: a panel would be empty.
    bool few_channels() const {
        const long words = c.channels / A::kDeep, words2 = c.channels2 / A::kDeep;
        return !c.upsample && c.out_channels <= kFewChannels && words % kLanes == 0 && words2 % kLanes == 0;
    }

    Phase<A> phase(long index) const {
        const typename A::Weight* weight = c.weight + index * taps * panels * depth * kPanel;
        if (!c.upsample) return {c.kernel, c.padding, c.padding, 1, 0, 0, c.out_height, c.out_width, weight};
        const long top = index / 2, left = index % 2;
        return {2, 1 - top, 1 - left, 2, top, left, c.height, c.width, weight};
    }

    // Where each row begins, of every tap and source; and where its result goes.
    struct Gathered {
        const Element** starts;
        long* targets;
    };
    Gathered gather(const Phase<A>& p, const Element* zeros, long first, long count, bool again = false) const {
        const long sources = c.channels2 ? 2 : 1;
        const Element** starts = scratch<const Element*>(Slot::kPointers, taps * sources * count);
        long* targets = scratch<long>(Slot::kOutput, count);
        if (again) return {starts, targets};
        long j = first % p.width, i = first / p.width % p.height, n = first / (p.width * p.height);
        for (long r = 0; r < count; ++r) {
            const Element** place = starts + r;
            for (long row = 0; row < p.kernel; ++row) {
                const long y = i * c.stride - p.pad_top + row;
                for (long column = 0; column < p.kernel; ++column, place += sources * count) {
                    const long x = j * c.stride - p.pad_left + column;
                    const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
                    const long pixel = (n * c.height + y) * c.width + x;
                    place[0] = inside ? c.x + pixel * c.channels : zeros;
                    if (sources == 2) place[count] = inside ? c.x2 + pixel * c.channels2 : zeros;
                }
            }
            targets[r] = ((n * c.out_height + p.step * i + p.top) * c.out_width + p.step * j + p.left) * c.out_channels;
            if (++j == p.width) {
                j = 0;
                if (++i == p.height) {
                    i = 0;
                    ++n;
                }
            }
        }
        return {starts, targets};
    }

    // Vectors [begin, end) of output channels of `count` rows. `again`: this thread has just done others of these rows.
    void multiply(
        const Phase<A>& p, const Element* zeros, long first, long count, long begin, long end, bool again) const {
        const Gathered rows = gather(p, zeros, first, count, again);
        const Element* const* starts = rows.starts;
        long segments = taps * (c.channels2 ? 2 : 1), words[2] = {c.channels / A::kDeep, c.channels2 / A::kDeep};
        const bool meet = segments == 1 && depth * static_cast<long>(sizeof(float)) % kApart == 0 && end - begin > kColumns;
        if ((depth < kFewWords && segments > 1) || meet) {
            starts = put_together(starts, segments, count, again);
            segments = 1;
            words[0] = taps * depth;
        }
        // Rows that one high tile holds: then it reads the weights once.
        const bool high = kHalves > 1 && count > kRows && count <= 2 * kRows;
        for (long column = begin; column < end;) {
            const long within = column % kColumns, panel = column / kColumns;
            const auto* weights = p.weight + panel * taps * depth * kPanel + within * kLanes;
            const auto multiply_tile = [&](auto height, auto width, long r) {
                tile<height, width>(
                    starts + r, rows.targets + r, count, count - r, segments, words, weights, column * kLanes);
            };
            if (kHalves > 1 && (high || within > 0 || end - column < kColumns)) {
                for_high_tiles(count, [&](long r, auto height) {
                    multiply_tile(height, std::integral_constant<int, kColumns / kHalves>{}, r);
                });
                ++column;
                continue;
            }
            for_row_tiles(count, [&](long r, auto height) {
                multiply_tile(height, std::integral_constant<int, kColumns>{}, r);
            });
            column += kColumns;
        }
    }

    // The words of all segments of a row, next to each other, and a gap behind them. Returns where the rows begin.
    const Element* const* put_together(const Element* const* starts, long segments, long count, bool again) const {
        const long sources = c.channels2 ? 2 : 1;
        float* together = scratch<float>(Slot::kInput, count * (taps * depth + kLanes));
        const Element** begins = scratch<const Element*>(Slot::kPacked, count);
        if (again) return begins;
        for (long r = 0; r < count; ++r) {
            begins[r] = reinterpret_cast<const Element*>(together);
            for (long segment = 0; segment < segments; ++segment) {
                const float* from = reinterpret_cast<const float*>(starts[segment * count + r]);
                const long words = words_of(segment, sources);
                std::memcpy(together, from, words * sizeof(float));
                together += words;
            }
            together += kLanes;
        }
        return begins;
    }

    // The outputs of `count` pixels, few channels each: sums of products of vectors, and those of their lanes.
    template <int O>
    void dot_products(const Element* zeros, const float* weights, long first, long count) const {
        const Gathered rows = gather(this->phase(0), zeros, first, count);
        const long sources = c.channels2 ? 2 : 1, all = taps * depth;
        for (long r = 0; r < count; r += kPixels) {
            Vec sums[kPixels][O] = {};
            long k = 0;
            for (long segment = 0; segment < taps * sources; ++segment) {
                const float* from[kPixels];
                for (long i = 0; i < kPixels; ++i)
                    from[i] = reinterpret_cast<const float*>(rows.starts[segment * count + std::min(r + i, count - 1)]);
                const long words = words_of(segment, sources);
                for (long word = 0; word < words; word += kLanes, k += kLanes)
#pragma GCC unroll 4
                    for (int o = 0; o < O; ++o) {
                        const Vec weight = load(weights + o * all + k);
#pragma GCC unroll 4
                        for (int i = 0; i < kPixels; ++i)
                            sums[i][o] = A::multiply_add(sums[i][o], load(from[i] + word), weight);
                    }
            }
            for (long i = 0; i < std::min<long>(kPixels, count - r); ++i)
                for (int o = 0; o < O; ++o) {
                    const long at = rows.targets[r + i] + o;
                    float value = sum_of_lanes(sums[i][o]) + (c.bias ? c.bias[o] : 0.0f);
                    if (c.residual) value += load_some(c.residual + at, 1)[0];
                    store_some(c.y + at, broadcast(value), 1);
                }
        }
    }

    static float sum_of_lanes(Vec value) {
        float lanes[kLanes];
        store(lanes, value);
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        return lanes[0];
    }

    // Output channels from `first` on of R rows, of which `left` are there; `words` of the two sources, whose segments take
    // turns.
    template <int R, int C>
    void tile(
        const Element* const* starts, const long* targets, long count, long left, long segments, const long* words,
        const typename A::Weight* weights, long first) const {
        Vec sums[R][C] = {};
        const bool two = segments > taps;
        for (long segment = 0; segment < segments; ++segment) {
            const float* rows[R];  // of words
            for (int r = 0; r < R; ++r)
                rows[r] = reinterpret_cast<const float*>(
                    starts[segment * count + (R > kRows ? std::min<long>(r, left - 1) : r)]);
            const long length = words[two ? segment % 2 : 0];
            multiply_add_blocks<A>(sums, [&](int r) { return rows[r]; }, length, weights, kAhead * kPanel);
            weights += length * kPanel;
        }
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) {
            const long channel = first + j * kLanes, lanes = std::min<long>(kLanes, c.out_channels - channel);
            if (lanes <= 0) break;
            const Vec bias = c.bias ? load_some(c.bias + channel, lanes) : zero();
#pragma GCC unroll 28
            for (int r = 0; r < R; ++r) {
                if (R > kRows && r >= left) break;
                Vec value = sums[r][j] + bias;
                if (c.residual) value += load_some(c.residual + targets[r] + channel, lanes);
                store_some(c.y + targets[r] + channel, value, lanes);
            }
        }
    }
};

}  // namespace
}  // namespace fastddpm

// y [N, H', W', O] = conv(concat(x [N, H, W, C], x2 [N, H, W, C2])) + bias [O] + residual [N, H', W', O], square
// kernels. Beyond the image x is zero, so the padding below and to the right is what H' and W' imply. With `upsample`
// (kernel 3, stride 1, padding 1) the image is upsampled by two before. bias, residual and x2 (C2 = 0) may be null.
// weight is packed, [phases, ceil(O / panel), taps, words of C and C2, panel]. `kind`: 0 all are
// floats; 1 y, x, x2 and residual are bfloat16, C and C2 even; 2 weight is float16.
extern "C" void fastddpm_conv_direct(
    void* y, const void* x, const void* x2, const void* weight, const float* bias, const void* residual, long n,
    long height, long width, long channels, long channels2, long out_height, long out_width, long out_channels,
    long kernel, long stride, long padding, int upsample, int kind, int threads) {
    using namespace fastddpm;
    with_weights(kind, [&](auto arithmetic) {
        using A = decltype(arithmetic);
        using Element = typename A::Element;
        const Conv<A> conv{
            static_cast<Element*>(y), static_cast<const Element*>(x), static_cast<const Element*>(x2),
            static_cast<const typename A::Weight*>(weight), bias, static_cast<const Element*>(residual), n, height, width, channels, channels2, out_height, out_width,
            out_channels, kernel, stride, padding, upsample != 0, threads};
        Direct<A>(conv).run();
    });
}
FASTDDPM_INSTRUCTION(fastddpm_conv_direct)
