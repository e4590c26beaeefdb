// Vectors of floats by the extensions that GCC and Clang share, as wide as the CPU that is compiled for has them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastddpm {

// Lanes of a vector, and the tile of a matrix product that fits the registers: kRows x (kColumns vectors).
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 14, kColumns = 2;  // 32 registers: 28 sums, 2 of weights, 1 of the input
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 6, kColumns = 2;  // 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 7, kColumns = 4;  // 32 registers
#else
constexpr int kLanes = 4, kRows = 4, kColumns = 2;
#endif
constexpr int kPanel = kColumns * kLanes;  // output channels of one panel of packed weights

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef float UnalignedVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));  // in which weights are transformed

// A bfloat16: the upper half of a float.
typedef uint16_t Bf16;
typedef Bf16 HalfVec __attribute__((vector_size(kLanes * sizeof(Bf16))));
typedef Bf16 UnalignedHalfVec __attribute__((vector_size(kLanes * sizeof(Bf16)), aligned(2), may_alias));

// A float16, in which weights may be stored; nothing is computed in it.
enum class Half : uint16_t {};
#if defined(__F16C__) || defined(__aarch64__)
#define FASTDDPM_HALF 1
inline Vec load(const Half* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
#endif
}
inline void store(Half* p, Vec v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#endif
}
inline float load_word(const Half* p) {
#if defined(__F16C__)
    return _cvtsh_ss(static_cast<uint16_t>(*p));
#else
    __fp16 value;
    std::memcpy(&value, p, sizeof(value));
    return value;
#endif
}
#endif

// Bits, be they a float or two bfloat16.
typedef float AliasedFloat __attribute__((may_alias));
inline float load_word(const float* p) { return *reinterpret_cast<const AliasedFloat*>(p); }

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline Vec load(const Bf16* p) {
    const HalfVec bits = *reinterpret_cast<const UnalignedHalfVec*>(p);
    return (Vec)(__builtin_convertvector(bits, IntVec) << 16);
}
// Rounded to nearest, ties to even; a NaN stays one.
inline HalfVec to_bf16(Vec v) {
#if defined(__AVX512BF16__)
    return (HalfVec)_mm512_cvtneps_pbh((__m512)v);
#else
    const IntVec bits = (IntVec)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector((v == v ? rounded : bits | 0x400000) >> 16, HalfVec);
#endif
}
inline void store(Bf16* p, Vec v) { *reinterpret_cast<UnalignedHalfVec*>(p) = to_bf16(v); }
inline Vec zero() { return Vec{}; }
inline Vec broadcast(float value) { return zero() + value; }

// The first `count` lanes, others zero; and their counterpart.
template <class Element>
inline Vec load_some(const Element* p, long count) {
    if (count >= kLanes) return load(p);
    Element lanes[kLanes] = {};
    std::memcpy(lanes, p, count * sizeof(Element));
    return load(lanes);
}
template <class Element>
inline void store_some(Element* p, Vec v, long count) {
    if (count >= kLanes) return store(p, v);
    Element lanes[kLanes];
    store(lanes, v);
    std::memcpy(p, lanes, count * sizeof(Element));
}

// f(a value of the type that tensors have in memory).
template <class F>
inline void with_element(int bfloat16, const F& f) {
    if (bfloat16)
        f(Bf16{});
    else
        f(float{});
}

// e^x to 2 ulp: x = n ln 2 + r, a polynomial of r (the coefficients of Cephes' expf), and n into the exponent.
// What is beyond the range of normal numbers comes out as its end; a NaN stays one.
inline Vec exp(Vec x) {
    x = x < -87.0f ? broadcast(-87.0f) : x;
    x = x > 88.0f ? broadcast(88.0f) : x;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const Vec shifted = x * 1.44269504f + kRound;
    const Vec n = shifted - kRound;
    const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const IntVec exponent = ((IntVec)shifted << 23) + (127 << 23);
    return p * (Vec)exponent;
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

}  // namespace fastddpm
