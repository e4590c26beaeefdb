// Replaces torch between the ops of a loop's step: looks up rows, adds numbers, copies images.

#include <algorithm>
#include <cstring>

#include "native/instruction.h"
#include "native/runtime.h"
#include "native/simd.h"

namespace fastddpm {
namespace {

constexpr long kItem = 4096;  // elements

inline float widened(float value) { return value; }
inline float widened(Bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}
inline void put(float* place, float value) { *place = value; }
inline void put(Bf16* place, float value) {
    Vec lanes = broadcast(value);
    *place = to_bf16(lanes)[0];
}
inline int64_t widened(int64_t value) { return value; }
inline void put(int64_t* place, int64_t value) { *place = value; }

// f(target, a, b, count) for rows of the innermost of five dimensions; strides are those of target, a and b.
template <class T, class F>
void rows_of_three(T* target, const T* a, const T* b, const long* size, const long* strides, int threads, const F& f) {
    const long rows = size[0] * size[1] * size[2] * size[3], width = size[4];
    const long together = std::max<long>(1, kItem / std::max<long>(width, 1));
    for_each(ceil_div(rows, together), threads, [&](long item) {
        for (long row = item * together; row < std::min(rows, (item + 1) * together); ++row) {
            long offset[3] = {}, rest = row;
            for (int d = 3; d >= 0; --d) {
                for (int of = 0; of < 3; ++of) offset[of] += rest % size[d] * strides[5 * of + d];
                rest /= size[d];
            }
            f(target + offset[0], a + offset[1], b + offset[2], width);
        }
    });
}

template <class To, class From>
void copy(To* target, const From* source, const long* size, const long* to, const long* from, int threads) {
    const long rows = size[0] * size[1] * size[2] * size[3], width = size[4];
    const long together = std::max<long>(1, kItem / std::max<long>(width, 1));  // rows of an item
    for_each(ceil_div(rows, together), threads, [&](long item) {
        for (long row = item * together; row < std::min(rows, (item + 1) * together); ++row) {
            To* t = target;
            const From* f = source;
            long rest = row;
            for (int d = 3; d >= 0; --d) {
                t += rest % size[d] * to[d];
                f += rest % size[d] * from[d];
                rest /= size[d];
            }
            if constexpr (std::is_same_v<To, From>)
                if (to[4] == 1 && from[4] == 1) {
                    std::memmove(t, f, width * sizeof(To));
                    continue;
                }
            for (long i = 0; i < width; ++i) put(t + i * to[4], widened(f[i * from[4]]));
        }
    });
}

}  // namespace
}  // namespace fastddpm

// target[..] = source[..], of five dimensions, each with its strides; floats, or with 2 bytes bfloat16, or both int64.
extern "C" void fastddpm_copy(
    void* target, const void* source, long n0, long n1, long n2, long n3, long n4, long t0, long t1, long t2, long t3,
    long t4, long s0, long s1, long s2, long s3, long s4, int target_bytes, int source_bytes, int threads) {
    using namespace fastddpm;
    const long size[] = {n0, n1, n2, n3, n4}, to[] = {t0, t1, t2, t3, t4}, from[] = {s0, s1, s2, s3, s4};
    if (target_bytes == 8)
        return copy(static_cast<int64_t*>(target), static_cast<const int64_t*>(source), size, to, from, threads);
    with_element(target_bytes == 2, [&](auto t) {
        with_element(source_bytes == 2, [&](auto s) {
            copy(
                static_cast<decltype(t)*>(target), static_cast<const decltype(s)*>(source), size, to, from, threads);
        });
    });
}
FASTDDPM_INSTRUCTION(fastddpm_copy)

// target[..] = a[..] + factor * b[..], of five dimensions whose strides `layout` has after their sizes: floats, or bfloat16.
extern "C" void fastddpm_add(
    void* target, const void* a, const void* b, const long* layout, float factor, int bfloat16, int threads) {
    using namespace fastddpm;
    const long *size = layout, *strides = layout + 5;
    const long to = strides[4], from_a = strides[9], from_b = strides[14];
    with_element(bfloat16, [&](auto element) {
        using T = decltype(element);
        const auto row = [=](T* target, const T* a, const T* b, long count) {
            if (to == 1 && from_a == 1 && from_b == 1)
                for (long i = 0; i < count; i += kLanes)
                    store_some(target + i, load_some(a + i, count - i) + factor * load_some(b + i, count - i), count - i);
            else
                for (long i = 0; i < count; ++i)
                    put(target + i * to, widened(a[i * from_a]) + factor * widened(b[i * from_b]));
        };
        rows_of_three(
            static_cast<T*>(target), static_cast<const T*>(a), static_cast<const T*>(b), size, strides, threads, row);
    });
}
FASTDDPM_INSTRUCTION(fastddpm_add)

// out [n, width] = table[index[i]], floats.
extern "C" void fastddpm_look_up(float* out, const float* table, const int64_t* index, long n, long width) {
    for (long i = 0; i < n; ++i) std::memcpy(out + i * width, table + index[i] * width, width * sizeof(float));
}
FASTDDPM_INSTRUCTION(fastddpm_look_up)

// out[i] = x[i] + alpha * other[i * stride]; `other` null is 1.
extern "C" void fastddpm_add_int64(
    int64_t* out, const int64_t* x, const int64_t* other, long n, long stride, long alpha) {
    for (long i = 0; i < n; ++i) out[i] = x[i] + alpha * (other ? other[i * stride] : 1);
}
FASTDDPM_INSTRUCTION(fastddpm_add_int64)
