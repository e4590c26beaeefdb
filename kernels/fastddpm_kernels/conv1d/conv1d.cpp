// Convolutions of short sequences by weights that are far larger than what they are multiplied with: a plan of 16
// positions, and 250 million weights. Reading the weights is the cost, so every thread reads its own part of them once,
// in the order of memory, and asks for what comes next ahead of time.
//
// The sequence is transposed first, [words of channels, positions]: of a word, the rows of a tile are then adjacent for
// every tap, and no tap needs a copy.

#include "native/arithmetic.h"
#include "native/gemm.h"
#include "native/instruction.h"
#include "native/runtime.h"

namespace fastddpm {
namespace {

constexpr int kVectors = 4, kWide = kVectors * kLanes;  // of a panel of output channels
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24, kTallest = 16;  // of 32 registers; rows of a tile
#else
constexpr int kSums = 10, kTallest = 8;  // of 16 registers
#endif
constexpr long kTogether = 64;  // rows of an item
constexpr long kBlock = 64;    // rows of a panel that are used before the next ones, while these are asked for
constexpr int kMostTaps = 64;
// How many blocks ahead weights are asked for. Measured: where reading and products take as long, one is too few.
template <int C>
constexpr int kAhead = C == 2 ? 2 : 1;
// In bfloat16 a tile of two columns is faster: it loads fewer words for as many products.
template <class A>
constexpr int kMostRows = A::kDeep == 2 ? std::min(kTallest, 12) : kTallest;

// Vectors of a panel that a tile of R rows computes at once.
constexpr int columns_of(int rows) { return rows * 4 <= kSums ? 4 : rows * 2 <= kSums ? 2 : 1; }

template <class A>
struct Convolution {
    using Element = typename A::Element;
    Element* y;
    const Element *x, *x2;
    const float *weight, *bias;
    long n, length, channels, channels2, out_length, out_channels, kernel, stride, padding;
    bool transposed;  // kernel 4, stride 2, padding 1
    int threads;
};

template <class A>
class Sequences {
    using Element = typename A::Element;
    const Convolution<A>& c;
    const long phases, rows, taps, words, words2, panels;  // rows of a sample and phase
    const long apart, places;  // of a word: positions of one remainder by the stride, and all

  public:
    explicit Sequences(const Convolution<A>& conv)
        : c(conv),
          phases(c.transposed ? 2 : 1),
          rows(c.out_length / phases),
          taps(c.transposed ? 2 : c.kernel),
          words(ceil_div(c.channels, A::kDeep)),
          words2(ceil_div(c.channels2, A::kDeep)),
          panels(ceil_div(c.out_channels, kWide)),
          apart(rows + (c.transposed ? 2 : (c.kernel - 1) / c.stride)),
          places(apart * step()) {}

    void run() const {
        const long all = words + words2;
        float* transposed = scratch<float>(Slot::kShared, c.n * all * places);
        for_each(c.n, c.threads, [&](long n) { transpose(n, transposed + n * all * places); });
        const long blocks = ceil_div(c.n * rows, kTogether);
        for_each(phases * panels * blocks, c.threads, [&](long i) {
            const long block = i % blocks, panel = i / blocks % panels, phase = i / blocks / panels;
            multiply(transposed, phase, panel, c.n * rows * block / blocks, c.n * rows * (block + 1) / blocks);
        });
    }

  private:
    long step() const { return c.transposed ? 1 : c.stride; }

    // Positions with the same remainder by the stride are adjacent; what lies outside of the sequence is 0.
    void transpose(long n, float* to) const {
        const long before = c.transposed ? 1 : c.padding;
        const auto words_of = [&](const Element* x, long channels, float* to) {
            const long count = ceil_div(channels, A::kDeep);
            std::fill_n(to, count * places, 0.0f);
            for (long p = 0; p < c.length; ++p) {
                const long at = p + before, place = at % step() * apart + at / step();
                if (at / step() >= apart) continue;
                const Element* row = x + (n * c.length + p) * channels;
                const long whole = channels / A::kDeep;
                for (long w = 0; w < whole; ++w)
                    to[w * places + place] = load_word(reinterpret_cast<const float*>(row) + w);
                if (whole < count) {  // a channel without a second one
                    uint32_t bits = 0;
                    std::memcpy(&bits, row + whole * A::kDeep, sizeof(Element));
                    std::memcpy(to + whole * places + place, &bits, sizeof(bits));
                }
            }
        };
        words_of(c.x, c.channels, to);
        if (c.channels2) words_of(c.x2, c.channels2, to + words * places);
    }

    // The place of tap `tap` for row 0.
    long offset(long phase, long tap) const {
        return c.transposed ? phase - tap + 1 : tap % c.stride * apart + tap / c.stride;
    }

    // Rows from `first` to `last` of all samples, times one panel.
    void multiply(const float* transposed, long phase, long panel, long first, long last) const {
        const long all = words + words2, deep = std::max<long>(1, kBlock / taps);
        const float* weight = c.weight + (phase * panels + panel) * all * taps * kWide;
        float* total = scratch<float>(Slot::kOutput, (last - first) * kWide);
        std::fill_n(total, (last - first) * kWide, 0.0f);
        long offsets[kMostTaps];
        for (long tap = 0; tap < taps; ++tap) offsets[tap] = offset(phase, tap);
        const long vectors = std::min<long>(kVectors, ceil_div(c.out_channels - panel * kWide, kLanes));
        for (long word = 0; word < all; word += deep) {
            const long count = std::min(deep, all - word);
            for_tiles(first, last, [&](long row, auto height) {
                const float* x = transposed + (row / rows * all + word) * places + row % rows;
                constexpr int R = height, C = columns_of(R);
                const float* block = weight + word * taps * kWide;
                // The first tile asks for a later block, line by line.
                const float* next = row == first ? block + kAhead<C> * count * taps * kWide : block;
                for (long j = 0; j < vectors; j += C, next += count * taps * C * kLanes)
                    tile<R, C>(
                        x, offsets, block + j * kLanes, next, count, total + (row - first) * kWide + j * kLanes);
            });
        }
        for (long row = first; row < last; ++row) {
            const long place = (row / rows * c.out_length + row % rows * phases + phase) * c.out_channels;
            for (long j = 0; j < vectors; ++j) {
                const long channel = panel * kWide + j * kLanes, lanes = c.out_channels - channel;
                const Vec bias = c.bias ? load_some(c.bias + channel, lanes) : zero();
                store_some(c.y + place + channel, load(total + (row - first) * kWide + j * kLanes) + bias, lanes);
            }
        }
    }

    // f(row, std::integral_constant<int, rows>) for tiles that lie in one sample each.
    template <class F>
    void for_tiles(long first, long last, const F& f) const {
        while (first < last) {
            const long end = std::min(last, (first / rows + 1) * rows), tiles = ceil_div(end - first, kMostRows<A>);
            for (long i = 0; i < tiles; ++i) {
                const long from = first + (end - first) * i / tiles, to = first + (end - first) * (i + 1) / tiles;
                with_rows<kMostRows<A>>(static_cast<int>(to - from), [&](auto height) { f(from, height); });
            }
            first = end;
        }
    }

    template <int R, int C>
    __attribute__((noinline)) void tile(
        const float* x, const long* offsets, const float* weight, const float* next, long count, float* total) const {
        Vec sums[R][C] = {};
        for (long word = 0; word < count; ++word, x += places)
            for (long tap = 0; tap < taps; ++tap, weight += kWide) {
                const float* from = x + offsets[tap];
                Vec weights[C];
#pragma GCC unroll 4
                for (int j = 0; j < C; ++j) {
                    weights[j] = load(weight + j * kLanes);
                    __builtin_prefetch(next + j * kLanes, 0, kAhead<C> == 1 ? 3 : 2);  // near, or in the second cache
                }
                next += C * kLanes;
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const float value = load_word(from + r);
#pragma GCC unroll 4
                    for (int j = 0; j < C; ++j) sums[r][j] = A::multiply_add(sums[r][j], weights[j], value);
                }
            }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
                float* place = total + r * kWide + j * kLanes;
                store(place, load(place) + sums[r][j]);
            }
    }
};

}  // namespace
}  // namespace fastddpm

// The width of a panel of packed weights.
extern "C" int fastddpm_conv1d_panel() { return fastddpm::kWide; }

// y [N, L', O] = conv(concat(x [N, L, C], x2 [N, L, C2]), weight) + bias [O]; beyond the sequence x is 0. With
// `transposed` the transposed convolution of kernel 4, stride 2 and padding 1, L' = 2 L. bias and x2 (C2 = 0) may be
// null. weight is packed, [phases, ceil(O / panel), words of C and C2, taps, panel]. All are floats; with `bfloat16`, y, x
// and x2 are bfloat16, and the last word of x or x2 is filled up with a zero.
extern "C" void fastddpm_conv1d(
    void* y, const void* x, const void* x2, const float* weight, const float* bias, long n, long length, long channels,
    long channels2, long out_length, long out_channels, long kernel, long stride, long padding, int transposed,
    int bfloat16, int threads) {
    using namespace fastddpm;
    with_arithmetic(bfloat16, [&](auto arithmetic) {
        using A = decltype(arithmetic);
        using Element = typename A::Element;
        const Convolution<A> conv{
            static_cast<Element*>(y), static_cast<const Element*>(x), static_cast<const Element*>(x2), weight, bias, n,
            length, channels, channels2, out_length, out_channels, kernel, stride, padding, transposed != 0, threads};
        Sequences<A>(conv).run();
    });
}
FASTDDPM_INSTRUCTION(fastddpm_conv1d)
