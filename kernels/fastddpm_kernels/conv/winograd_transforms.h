// One dimension of every transform of Winograd's minimal filtering F(M, 3): y = A^T ((G w) * (B^T x)).
//
// The polynomials are evaluated at 0, 1, -1 and infinity; for M = 4 also at a and -a. Element i of `x` is at x[s * i],
// of `out` at out[t * i]. `T` is a vector: of floats, or of doubles for weights.
#pragma once

#include <type_traits>
#include <utility>

#include "native/simd.h"

namespace fastddpm {

constexpr float kPoint = 0.625f;  // a: for the least error, and exact

// A constant as values of T have it.
template <class T>
using Scalar = std::remove_reference_t<decltype(std::declval<T&>()[0])>;

template <int M>
struct Transform;

template <>
struct Transform<2> {
    static constexpr int kSize = 4;
    // B^T x
    static void input(const Vec* x, int s, Vec* out, int t) {
        out[0] = x[2 * s] - x[0];
        out[t] = x[s] + x[2 * s];
        out[2 * t] = x[2 * s] - x[s];
        out[3 * t] = x[3 * s] - x[s];
    }
    // A^T x
    static void output(const Vec* x, int s, Vec* out, int t) {
        out[0] = x[0] + x[s] + x[2 * s];
        out[t] = x[s] - x[2 * s] + x[3 * s];
    }
    // G x
    template <class T>
    static void weight(const T* x, int s, T* out, int t) {
        constexpr Scalar<T> half = 0.5;
        const T even = half * (x[0] + x[2 * s]), odd = half * x[s];
        out[0] = -x[0];
        out[t] = even + odd;
        out[2 * t] = even - odd;
        out[3 * t] = x[2 * s];
    }
    // The adjoints of the last two, for the gradient of the weight: A x and G^T x.
    static void output_adjoint(const Vec* x, int s, Vec* out, int t) {
        out[0] = x[0];
        out[t] = x[0] + x[s];
        out[2 * t] = x[0] - x[s];
        out[3 * t] = x[s];
    }
    static void weight_adjoint(const Vec* x, int s, Vec* out, int t) {
        const Vec sum = 0.5f * (x[s] + x[2 * s]);
        out[0] = sum - x[0];
        out[t] = 0.5f * (x[s] - x[2 * s]);
        out[2 * t] = sum + x[3 * s];
    }
};

template <>
struct Transform<4> {
    static constexpr int kSize = 6;
    static void input(const Vec* x, int s, Vec* out, int t) {
        constexpr float a = kPoint, aa = a * a;
        const Vec even1 = x[4 * s] - aa * x[2 * s], odd1 = x[3 * s] - aa * x[s];
        const Vec even2 = x[4 * s] - x[2 * s], odd2 = a * (x[3 * s] - x[s]);
        out[0] = aa * x[0] - (1 + aa) * x[2 * s] + x[4 * s];
        out[t] = even1 + odd1;
        out[2 * t] = even1 - odd1;
        out[3 * t] = even2 + odd2;
        out[4 * t] = even2 - odd2;
        out[5 * t] = aa * x[s] - (1 + aa) * x[3 * s] + x[5 * s];
    }
    static void output(const Vec* x, int s, Vec* out, int t) {
        constexpr float a = kPoint, aa = a * a;
        const Vec sum1 = x[s] + x[2 * s], difference1 = x[s] - x[2 * s];
        const Vec sum2 = x[3 * s] + x[4 * s], difference2 = x[3 * s] - x[4 * s];
        out[0] = x[0] + sum1 + sum2;
        out[t] = difference1 + a * difference2;
        out[2 * t] = sum1 + aa * sum2;
        out[3 * t] = difference1 + aa * a * difference2 + x[5 * s];
    }
    template <class T>
    static void weight(const T* x, int s, T* out, int t) {
        constexpr double a = kPoint, aa = a * a;
        constexpr Scalar<T> zero = 1 / aa, one = 1 / (2 * (1 - aa)), two = 1 / (2 * aa * (aa - 1)), square = aa;
        constexpr Scalar<T> odd = a / (2 * aa * (aa - 1));
        const T even1 = one * (x[0] + x[2 * s]), odd1 = one * x[s];
        const T even2 = two * (x[0] + square * x[2 * s]), odd2 = odd * x[s];
        out[0] = x[0] * zero;
        out[t] = even1 + odd1;
        out[2 * t] = even1 - odd1;
        out[3 * t] = even2 + odd2;
        out[4 * t] = even2 - odd2;
        out[5 * t] = x[2 * s];
    }
    // The adjoints of the last two, for the gradient of the weight: A x and G^T x.
    static void output_adjoint(const Vec* x, int s, Vec* out, int t) {
        constexpr float a = kPoint, aa = a * a;
        const Vec even1 = x[0] + x[2 * s], odd1 = x[s] + x[3 * s];
        const Vec even2 = x[0] + aa * x[2 * s], odd2 = a * (x[s] + aa * x[3 * s]);
        out[0] = x[0];
        out[t] = even1 + odd1;
        out[2 * t] = even1 - odd1;
        out[3 * t] = even2 + odd2;
        out[4 * t] = even2 - odd2;
        out[5 * t] = x[3 * s];
    }
    static void weight_adjoint(const Vec* x, int s, Vec* out, int t) {
        constexpr double a = kPoint, aa = a * a;
        constexpr float zero = 1 / aa, one = 1 / (2 * (1 - aa)), two = 1 / (2 * aa * (aa - 1)), square = aa;
        const Vec sum1 = one * (x[s] + x[2 * s]), difference1 = one * (x[s] - x[2 * s]);
        const Vec sum2 = two * (x[3 * s] + x[4 * s]), difference2 = two * (x[3 * s] - x[4 * s]);
        out[0] = zero * x[0] + (sum1 + sum2);
        out[t] = difference1 + kPoint * difference2;
        out[2 * t] = (sum1 + square * sum2) + x[5 * s];
    }
};

}  // namespace fastddpm
