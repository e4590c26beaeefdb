// GEGLU: one half of the channels times the GELU of the other.

#include "geglu/gelu.h"
#include "native/instruction.h"
#include "native/runtime.h"

namespace fastddpm {
namespace {

constexpr long kItem = 16384;  // values

template <class Element>
void geglu(Element* y, const Element* x, long pixels, long channels, int threads) {
    const long together = std::max<long>(1, kItem / channels);
    for_each(ceil_div(pixels, together), threads, [&](long item) {
        for (long p = item * together; p < std::min(pixels, (item + 1) * together); ++p) {
            const Element *values = x + 2 * p * channels, *gates = values + channels;
            for (long c = 0; c < channels; c += kLanes) {
                const long lanes = channels - c;
                store_some(y + p * channels + c, load_some(values + c, lanes) * gelu(load_some(gates + c, lanes)), lanes);
            }
        }
    });
}

}  // namespace
}  // namespace fastddpm

// y [P, C] = x[:, :C] * gelu(x[:, C:]), of x [P, 2C]. Floats; with `bfloat16` both are bfloat16.
extern "C" void fastddpm_geglu(void* y, const void* x, long pixels, long channels, int bfloat16, int threads) {
    using namespace fastddpm;
    with_element(bfloat16, [&](auto element) {
        using Element = decltype(element);
        geglu(static_cast<Element*>(y), static_cast<const Element*>(x), pixels, channels, threads);
    });
}
FASTDDPM_INSTRUCTION(fastddpm_geglu)
