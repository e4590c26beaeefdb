// Philox-4x32-10 and Box-Muller (`philox/__init__.py`), computed in float64 and rounded, so that the numbers are those of
// torch in float64 but where one lies half-way between two floats.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "native/simd.h"

namespace fastddpm {

constexpr int kGroups = kLanes;  // counters at a time; each gives four numbers
typedef uint64_t Counters __attribute__((vector_size(kGroups * sizeof(uint64_t))));
typedef int64_t Integers __attribute__((vector_size(kGroups * sizeof(int64_t))));
typedef double Doubles __attribute__((vector_size(kGroups * sizeof(double))));

// The words of the counters (group .. group + kGroups - 1, index, step, stream), each in 64 bits.
inline void philox_words(uint64_t seed, uint64_t index, uint64_t step, uint64_t stream, uint64_t group, Counters* words) {
    constexpr uint64_t kWord = 0xffffffff;
    Counters c0, c1 = Counters{} + (index & kWord), c2 = Counters{} + (step & kWord), c3 = Counters{} + (stream & kWord);
    for (int i = 0; i < kGroups; ++i) c0[i] = group + i;
    uint64_t k0 = seed & kWord, k1 = seed >> 32;
    for (int round = 0; round < 10; ++round) {
        const Counters product0 = c0 * 0xD2511F53u, product1 = c2 * 0xCD9E8D57u;
        c0 = (product1 >> 32) ^ c1 ^ k0;
        c2 = (product0 >> 32) ^ c3 ^ k1;
        c1 = product1 & kWord;
        c3 = product0 & kWord;
        k0 = (k0 + 0x9E3779B9u) & kWord;
        k1 = (k1 + 0xBB67AE85u) & kWord;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// log(u) for a float u in (0, 1]: u = m 2^e with m in [sqrt(1/2), sqrt(2)), and 2 atanh((m - 1) / (m + 1)) by its series.
inline Doubles log_unit(Doubles u) {
    const Integers bits = (Integers)u, exponent = (bits - 0x3fe6a09e667f3bcd) >> 52;
    const Doubles m = (Doubles)(bits - (exponent << 52));
    const Doubles s = (m - 1.0) / (m + 1.0), s2 = s * s;
    Doubles p = Doubles{} + 1.0 / 23;
    for (int k = 21; k >= 1; k -= 2) p = p * s2 + 1.0 / k;
    return 2.0 * s * p + __builtin_convertvector(exponent, Doubles) * 0.693147180559945309417232121458;
}

// The two normals of each pair of words.
inline void box_muller(Counters radius_word, Counters angle_word, Vec* cosine, Vec* sine) {
    // u and the angle are float32 by definition.
    const Vec u = __builtin_convertvector(radius_word, Vec) * 0x1p-32f + 0x1p-33f;
    const Doubles squared = -2.0 * log_unit(__builtin_convertvector(u, Doubles));
    Doubles radius;
    for (int i = 0; i < kGroups; ++i) radius[i] = std::sqrt(squared[i]);

    // Quarter turns: the nearest whole number of them, and exactly what is left, in [-1/2, 1/2].
    const Doubles quarters = __builtin_convertvector(__builtin_convertvector(angle_word, Vec), Doubles) * 0x1p-30;
    constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
    const Doubles shifted = quarters + kRound, x = (quarters - (shifted - kRound)) * 1.57079632679489661923, x2 = x * x;
    const Integers quarter = (Integers)shifted;
    Doubles s = Doubles{} - 1.0 / 1307674368000.0;  // Taylor's series to x^15 and x^16
    for (const double term : {1.0 / 6227020800, -1.0 / 39916800, 1.0 / 362880, -1.0 / 5040, 1.0 / 120, -1.0 / 6, 1.0})
        s = s * x2 + term;
    s = s * x;
    Doubles c = Doubles{} + 1.0 / 20922789888000.0;
    for (const double term :
         {-1.0 / 87178291200, 1.0 / 479001600, -1.0 / 3628800, 1.0 / 40320, -1.0 / 720, 1.0 / 24, -1.0 / 2, 1.0})
        c = c * x2 + term;

    const Integers odd = (quarter & 1) != 0;
    const Integers own = (Integers)(odd ? s : c) ^ (((quarter + 1) & 2) << 62);
    const Integers other = (Integers)(odd ? c : s) ^ ((quarter & 2) << 62);
    *cosine = __builtin_convertvector(radius * (Doubles)own, Vec);
    *sine = __builtin_convertvector(radius * (Doubles)other, Vec);
}

constexpr long kNormals = 4 * kGroups;  // that are made at a time

// z[0] .. of a sample's noise from element `first` on, a multiple of 4: `count` rounded up to a multiple of kNormals.
inline void normals(const int64_t* key, int64_t step, int64_t stream, long first, long count, float* z) {
    for (long done = 0; done < count; done += kNormals, z += kNormals) {
        Counters words[4];
        philox_words(
            static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1]), static_cast<uint64_t>(step),
            static_cast<uint64_t>(stream), static_cast<uint64_t>((first + done) / 4), words);
        Vec values[4];
        box_muller(words[0], words[1], &values[0], &values[1]);
        box_muller(words[2], words[3], &values[2], &values[3]);
        for (int i = 0; i < kGroups; ++i)
            for (int j = 0; j < 4; ++j) z[4 * i + j] = values[j][i];
    }
}

}  // namespace fastddpm
