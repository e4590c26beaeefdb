// Packs the weight [O, C + C2, k, k] of a convolution as `direct.cpp` and `winograd.cpp` read it.
//
// Rows and columns of a kernel go through one matrix m [R, k]: products[a][b] = sum_ij m[a][i] m[b][j] w[i][j]. R x R
// products are R / T x R / T phases (or points) of T x T taps. Without a matrix they are the taps themselves.

#include "native/arithmetic.h"
#include "native/instruction.h"
#include "native/runtime.h"

namespace fastddpm {
namespace {

// Element [o, c, i, j] of the weight lies at out * o + in * c + row * i + column * j.
template <class Value>
struct Unpacked {
    const Value* data;
    long out, in, row, column, out_channels, channels, channels2, kernel;
};

struct Products {
    const double* matrix;  // [rows, kernel], or null
    long rows, taps;       // R and T
    bool grouped;          // whether the channels of a vector are in the order of `A::channel`, each source padded
};

template <class A, class Value>
class Packer {
    using Weight = typename A::Weight;
    static constexpr long kGroup = kLanes * A::kDeep;  // channels of a vector of words

    Weight* const packed;
    const Unpacked<Value>& w;
    const Products& products;
    const long channels[2], depth, panels, groups[2], taps;

  public:
    Packer(Weight* out, const Unpacked<Value>& weight, const Products& how)
        : packed(out),
          w(weight),
          products(how),
          channels{weight.channels + (how.grouped ? 0 : weight.channels2), how.grouped ? weight.channels2 : 0},
          depth(how.grouped ? A::words(channels[0]) + A::words(channels[1]) : channels[0] / A::kDeep),
          panels(ceil_div(weight.out_channels, kPanel)),
          groups{ceil_div(channels[0], kGroup), ceil_div(channels[1], kGroup)},
          taps(weight.kernel * weight.kernel) {}

    void run(int threads) const {
        const long all = groups[0] + groups[1];
        for_each(panels * all, threads, [&](long item) { pack(item / all, item % all); });
    }

  private:
    // A group of channels of a panel.
    void pack(long panel, long group) const {
        const bool second = group >= groups[0];
        const long within = (second ? group - groups[0] : group) * kGroup;
        const long count = std::min<long>(kGroup, channels[second] - within);
        const Value* block = read(panel, within + (second ? channels[0] : 0), count);
        const long words = std::min<long>(kLanes, depth - group * kLanes);
        for (long word = 0; word < words; ++word)
            for (long lane = 0; lane < kPanel; lane += kLanes) {
                const Value* sources[A::kDeep];
                for (int index = 0; index < A::kDeep; ++index)
                    sources[index] = block + channel(word, index) * taps * kPanel + lane;
                Weight* to = packed + (group * kLanes + word) * kPanel + lane;
                if (products.matrix)
                    multiply(sources, to, panel);
                else
                    for (long tap = 0; tap < taps; ++tap) {
                        Vec values[A::kDeep];
                        for (int index = 0; index < A::kDeep; ++index) values[index] = load_value(sources[index] + tap * kPanel);
                        store(to + (panel * taps + tap) * depth * kPanel, A::combine(values));
                    }
            }
    }

    long channel(long word, int index) const {
        return products.grouped ? A::channel(word, index) : word * A::kDeep + index;
    }

    // [kGroup, taps, kPanel] of the weight, zeros where there is none.
    const Value* read(long panel, long begin, long count) const {
        const long outs = std::min<long>(kPanel, w.out_channels - panel * kPanel);
        Value* block = scratch<Value>(Slot::kInput, kGroup * taps * kPanel);
        if (outs < kPanel || count < kGroup) std::fill_n(block, kGroup * taps * kPanel, Value(0));
        const long step = w.kernel == 1 ? w.in : w.column;
        const bool even = w.in == taps * step && (w.kernel == 1 || w.row == w.kernel * step);
        for (long o = 0; o < outs; ++o) {
            const Value* from = w.data + (panel * kPanel + o) * w.out + begin * w.in;
            Value* to = block + o;
            if (even) {
                for (long i = 0; i < count * taps; ++i) to[i * kPanel] = from[i * step];
                continue;
            }
            for (long c = 0; c < count; ++c, from += w.in)
                for (long i = 0; i < w.kernel; ++i)
                    for (long j = 0; j < w.kernel; ++j, to += kPanel) *to = from[i * w.row + j * w.column];
        }
        return block;
    }

    static Vec load_value(const Value* p) {
        if constexpr (std::is_same_v<Value, float>)
            return load(p);
        else
            return __builtin_convertvector(load_wide(p), Vec);
    }
    static Wide load_wide(const Value* p) {
        if constexpr (std::is_same_v<Value, float>) return __builtin_convertvector(load(p), Wide);
        Wide value;
        std::memcpy(&value, p, sizeof(value));
        return value;
    }

    void multiply(const Value* const* sources, Weight* to, long panel) const {
        const long rows = products.rows, kernel = w.kernel, side = products.taps, phases = rows / side;
        Wide* half = scratch<Wide>(Slot::kOutput, A::kDeep * rows * kernel);  // [value of a word][row][column]
        for (int index = 0; index < A::kDeep; ++index)
            for (long a = 0; a < rows; ++a)
                for (long j = 0; j < kernel; ++j) {
                    Wide sum = {};
                    for (long i = 0; i < kernel; ++i)
                        sum += products.matrix[a * kernel + i] * load_wide(sources[index] + (i * kernel + j) * kPanel);
                    half[(index * rows + a) * kernel + j] = sum;
                }
        for (long a = 0; a < rows; ++a)
            for (long b = 0; b < rows; ++b) {
                Vec values[A::kDeep];
                for (int index = 0; index < A::kDeep; ++index) {
                    Wide sum = {};
                    for (long j = 0; j < kernel; ++j)
                        sum += products.matrix[b * kernel + j] * half[(index * rows + a) * kernel + j];
                    values[index] = __builtin_convertvector(sum, Vec);
                }
                const long phase = a / side * phases + b / side, tap = a % side * side + b % side;
                store(to + ((phase * panels + panel) * side * side + tap) * depth * kPanel, A::combine(values));
            }
    }
};

}  // namespace
}  // namespace fastddpm

// Into `packed`: [phases, ceil(O / panel), T x T taps, words of C and C2, panel]. The weight holds floats, or doubles with
// `wide`; see above for its strides, `matrix` [rows, kernel] and `taps` = T. `kind` as for the convolutions.
extern "C" void fastddpm_conv_pack(
    void* packed, const void* weight, const double* matrix, long out, long in, long row, long column, long out_channels,
    long channels, long channels2, long kernel, long rows, long taps, int grouped, int wide, int kind, int threads) {
    using namespace fastddpm;
    const Products products{matrix, rows, taps, grouped != 0};
    with_weights(kind, [&](auto arithmetic) {
        using A = decltype(arithmetic);
        const auto run = [&](auto* data) {
            using Value = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
            const Unpacked<Value> unpacked{data, out, in, row, column, out_channels, channels, channels2, kernel};
            Packer<A, Value>(static_cast<typename A::Weight*>(packed), unpacked, products).run(threads);
        };
        if (wide)
            run(static_cast<const double*>(weight));
        else
            run(static_cast<const float*>(weight));
    });
}
FASTDDPM_INSTRUCTION(fastddpm_conv_pack)
