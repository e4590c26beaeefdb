// What matrix products multiply. Either way an operand is made of words of 32 bits, a vector of them holds kLanes.
//
// Float32: a word is a float. Bfloat16: a word is two of them, whose products with another two are added to a float32 in
// one instruction; there are twice as many in a vector, and they take half the memory.
#pragma once

#include "native/simd.h"

#include <algorithm>
#include <cstdlib>
#include <type_traits>

namespace fastddpm {

struct Float32 {
    using Element = float;           // of the tensors in memory
    using Weight = float;            // of packed weights: a word
    using Precise = double;          // in which weights are transformed
    static constexpr int kDeep = 1;  // values of a word: of neighbouring channels, or of neighbouring tiles
    static constexpr int kGradientTile = 4;
    struct Group {  // channels that are transformed together, a vector of words
        Vec part[1];
    };

    // Words of a row of channels, and the channel of value `index` of a word.
    static long words(long channels) { return channels; }
    static long channel(long word, int) { return word; }

    static Group load_group(const float* p, long count) { return {{load_some(p, count)}}; }
    static void store_group(float* words, const Group& group) { store(words, group.part[0]); }
    // The words that hold the values, and the sum of the values in each.
    static Vec combine(const Vec* values) { return values[0]; }
    static Vec total(Vec words) { return words; }
    static Vec value(Vec words, int) { return words; }  // of each word
    static Vec multiply_add(Vec sum, Vec words, float word) { return sum + words * word; }
    static Vec multiply_add(Vec sum, Vec words, Vec others) { return sum + words * others; }
};

#if defined(FASTDDPM_HALF)
// The same products of weights that take half the memory.
struct Float32OfHalf : Float32 {
    using Weight = Half;
};
#endif

#if defined(__AVX512BF16__)
struct Bfloat16 {
    using Element = Bf16;
    using Weight = float;
    using Precise = float;
    static constexpr int kDeep = 2;
    static constexpr int kGradientTile = 2;
    struct Group {
        Vec part[2];  // of even and of odd channels
    };

    // Of a group the even channels come first: so no lane has to move.
    static long words(long channels) { return (channels + 2 * kLanes - 1) / (2 * kLanes) * kLanes; }
    static long channel(long word, int index) {
        const long group = word / kLanes, within = 2 * (word % kLanes) + index;
        return group * 2 * kLanes + (within < kLanes ? 2 * within : 2 * (within - kLanes) + 1);
    }

    static Group load_group(const Bf16* p, long count) {
        const __mmask32 present = count >= 2 * kLanes ? ~0u : (1u << count) - 1;
        const Vec words = (Vec)_mm512_maskz_loadu_epi16(present, p);
        return {{first(words), second(words)}};
    }
    static void store_group(float* words, const Group& group) {
        store(words, (Vec)_mm512_cvtne2ps_pbh((__m512)group.part[1], (__m512)group.part[0]));
    }
    static Vec combine(const Vec* values) {
        const IntVec low = __builtin_convertvector(to_bf16(values[0]), IntVec);
        const IntVec high = __builtin_convertvector(to_bf16(values[1]), IntVec);
        return (Vec)(low | high << 16);
    }
    static Vec total(Vec words) { return first(words) + second(words); }
    static Vec value(Vec words, int index) { return index ? second(words) : first(words); }
    static Vec multiply_add(Vec sum, Vec words, float word) {
        const __m512bh pair = (__m512bh)_mm512_set1_ps(word);
        return (Vec)_mm512_dpbf16_ps((__m512)sum, pair, (__m512bh)(__m512)words);
    }
    static Vec multiply_add(Vec sum, Vec words, Vec others) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)others, (__m512bh)(__m512)words);
    }

  private:
    static Vec first(Vec words) { return (Vec)((IntVec)words << 16); }
    static Vec second(Vec words) { return (Vec)((IntVec)words & -0x10000); }
};
#endif

// f(arithmetic).
template <class F>
inline void with_arithmetic(int bfloat16, const F& f) {
    if (!bfloat16) return f(Float32{});
#if defined(__AVX512BF16__)
    f(Bfloat16{});
#else
    std::abort();  // `fastddpm_bfloat16` has said that it is not there
#endif
}

// f(arithmetic) for convolutions, whose weights may be stored in another type: 0 float32, 1 bfloat16, 2 float32 with weights
// in float16.
template <class F>
inline void with_weights(int kind, const F& f) {
    if (kind != 2) return with_arithmetic(kind, f);
#if defined(FASTDDPM_HALF)
    f(Float32OfHalf{});
#else
    std::abort();  // `fastddpm_half` has said that it is not there
#endif
}

// f(arithmetic, tile's side) for Winograd's algorithm, both known to the compiler. bfloat16 has tiles of 2 x 2 only.
template <class A, class F>
inline void with_tile_of(A arithmetic, int m, const F& f) {
    if constexpr (A::kDeep == 1)
        if (m == 4) return f(arithmetic, std::integral_constant<int, 4>{});
    f(arithmetic, std::integral_constant<int, 2>{});
}
template <class F>
inline void with_tile(int bfloat16, int m, const F& f) {
    with_arithmetic(bfloat16, [&](auto arithmetic) { with_tile_of(arithmetic, m, f); });
}

}  // namespace fastddpm
