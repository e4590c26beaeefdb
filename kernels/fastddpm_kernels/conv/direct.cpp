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
    const float *weight, *bias;
    const Element* residual;
    long n, height, width, channels, channels2;  // of x
    long out_height, out_width, out_channels;    // of y
    long kernel, stride, padding;                // padding above and to the left
    bool upsample;
    int threads;
};

// Nearest-neighbour upsampling by two and a 3x3 convolution are four 2x2 convolutions, one for the output pixels of
// each parity: with padding 1 for even rows and 0 for odd ones. Else there is one phase, which is the convolution.
struct Phase {
    long kernel, pad_top, pad_left, step, top, left, height, width;  // its pixel (i, j) is y[step * i + top][..]
    const float* weight;
};

template <class A>
class Direct {
    using Element = typename A::Element;
    static constexpr long kBlock = 4 * kRows;  // output pixels of an item

    const Conv<A>& c;
    const long depth, panels, taps;  // depth in words: whole ones, as of channels that are next to each other

  public:
    explicit Direct(const Conv<A>& conv)
        : c(conv),
          depth((c.channels + c.channels2) / A::kDeep),
          panels(ceil_div(c.out_channels, kPanel)),
          taps(c.upsample ? 4 : c.kernel * c.kernel) {}

    void run() const {
        const long phases = c.upsample ? 4 : 1;
        const long rows = c.n * c.out_height * c.out_width / phases;
        const long blocks = ceil_div(rows, kBlock);
        // Few blocks: every thread reads its own part of the weights. Else its own part of the pixels.
        const long parts = blocks >= 4 * c.threads || c.threads == 1 ? 1 : panels;
        // What lies outside of the image is read from here.
        Element* zeros = scratch<Element>(Slot::kShared, std::max(c.channels, c.channels2));
        std::fill_n(zeros, std::max(c.channels, c.channels2), Element{});
        for_each(phases * blocks * parts, c.threads, [&](long i) {
            const long block = i % blocks, part = i / blocks % parts, phase = i / blocks / parts;
            const long first = rows * block / blocks, last = rows * (block + 1) / blocks;
            multiply(this->phase(phase), zeros, first, last - first, panels * part / parts, panels * (part + 1) / parts);
        });
    }

  private:
    Phase phase(long index) const {
        const float* weight = c.weight + index * taps * panels * depth * kPanel;
        if (!c.upsample) return {c.kernel, c.padding, c.padding, 1, 0, 0, c.out_height, c.out_width, weight};
        const long top = index / 2, left = index % 2;
        return {2, 1 - top, 1 - left, 2, top, left, c.height, c.width, weight};
    }

    void multiply(const Phase& p, const Element* zeros, long first, long count, long begin, long end) const {
        const long sources = c.channels2 ? 2 : 1;
        // Where each row begins, of every tap and source; and where its result goes.
        const Element** starts = scratch<const Element*>(Slot::kPointers, taps * sources * count);
        long* targets = scratch<long>(Slot::kOutput, count);
        for (long r = 0; r < count; ++r) {
            const long row = first + r, n = row / (p.height * p.width);
            const long i = row / p.width % p.height, j = row % p.width;
            for (long tap = 0; tap < taps; ++tap) {
                const long y = i * c.stride - p.pad_top + tap / p.kernel;
                const long x = j * c.stride - p.pad_left + tap % p.kernel;
                const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
                const long pixel = (n * c.height + y) * c.width + x;
                starts[tap * sources * count + r] = inside ? c.x + pixel * c.channels : zeros;
                if (sources == 2)
                    starts[(tap * sources + 1) * count + r] = inside ? c.x2 + pixel * c.channels2 : zeros;
            }
            targets[r] = ((n * c.out_height + p.step * i + p.top) * c.out_width + p.step * j + p.left) * c.out_channels;
        }
        for (long panel = begin; panel < end; ++panel)
            for_row_tiles(count, [&](long r, auto rows) {
                tile<rows>(starts + r, targets + r, count, sources, p.weight + panel * taps * depth * kPanel, panel);
            });
    }

    template <int R>
    void tile(
        const Element* const* starts, const long* targets, long count, long sources, const float* weights,
        long panel) const {
        Vec sums[R][kColumns] = {};
        for (long segment = 0; segment < taps * sources; ++segment) {
            const float* rows[R];  // of words
            for (int r = 0; r < R; ++r) rows[r] = reinterpret_cast<const float*>(starts[segment * count + r]);
            const long words = (segment % sources ? c.channels2 : c.channels) / A::kDeep;
            multiply_add_blocks<A, R>(sums, [&](int r) { return rows[r]; }, words, weights);
            weights += words * kPanel;
        }
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) {
            const long channel = panel * kPanel + j * kLanes, lanes = std::min<long>(kLanes, c.out_channels - channel);
            if (lanes <= 0) break;
            const Vec bias = c.bias ? load_some(c.bias + channel, lanes) : zero();
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
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
// weight is packed, [phases, ceil(O / panel), taps, words of C and C2, panel]. All are floats; with `bfloat16`, y, x, x2 and
// residual are bfloat16, C and C2 even.
extern "C" void fastddpm_conv_direct(
    void* y, const void* x, const void* x2, const float* weight, const float* bias, const void* residual, long n,
    long height, long width, long channels, long channels2, long out_height, long out_width, long out_channels,
    long kernel, long stride, long padding, int upsample, int bfloat16, int threads) {
    using namespace fastddpm;
    with_arithmetic(bfloat16, [&](auto arithmetic) {
        using A = decltype(arithmetic);
        using Element = typename A::Element;
        const Conv<A> conv{
            static_cast<Element*>(y), static_cast<const Element*>(x), static_cast<const Element*>(x2), weight, bias,
            static_cast<const Element*>(residual), n, height, width, channels, channels2, out_height, out_width,
            out_channels, kernel, stride, padding, upsample != 0, threads};
        Direct<A>(conv).run();
    });
}
FASTDDPM_INSTRUCTION(fastddpm_conv_direct)
