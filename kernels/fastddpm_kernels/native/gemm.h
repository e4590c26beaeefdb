// The inner loop of every convolution: a tile of rows of x times one panel of packed weights, sums in registers. Rows and
// weights are words of an arithmetic, `depth` many deep.
#pragma once

#include "native/arithmetic.h"

#include <algorithm>
#include <type_traits>

namespace fastddpm {

// Products are summed in blocks, and then the blocks, which loses less precision than one long sum.
constexpr long kDepth = 128;

// sums[r][j] += sum_k rows(r)[k] * panel[k][j], for the first C of a panel's vectors. `Rows` says where row r begins.
template <class A, int R, int C, class Rows>
inline __attribute__((always_inline)) void multiply_add(
    Vec (&sums)[R][C], const Rows& rows, long depth, const typename A::Weight* panel) {
    for (long k = 0; k < depth; ++k, panel += kPanel) {
        Vec weights[C];
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) weights[j] = load(panel + j * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const float word = load_word(rows(r) + k);
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) sums[r][j] = A::multiply_add(sums[r][j], weights[j], word);
        }
    }
}

// total[r][j] += the same, in blocks. Between them the total is in memory: the registers are for the sums.
template <class A, int R, int C, class Rows>
inline __attribute__((always_inline)) void multiply_add_blocks(
    Vec (&total)[R][C], const Rows& rows, long depth, const typename A::Weight* panel) {
    for (long start = 0; start < depth; start += kDepth) {
        Vec sums[R][C] = {};
        multiply_add<A>(
            sums, [&](int r) { return rows(r) + start; }, std::min(kDepth, depth - start), panel + start * kPanel);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) total[r][j] += sums[r][j];
        asm volatile("" : "+m"(total));
    }
}

// c[R][kPanel] = a[R][depth] x panel[depth][kPanel], the blocks added in c; of a row the first C vectors.
template <class A, int R, int C = kColumns>
void multiply_tile(
    const float* a, long a_stride, const typename A::Weight* panel, long depth, float* c, long c_stride) {
    for (long start = 0; start < depth; start += kDepth) {
        Vec sums[R][C] = {};
        multiply_add<A>(
            sums, [=](int r) { return a + r * a_stride + start; }, std::min(kDepth, depth - start),
            panel + start * kPanel);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) {
                float* place = c + r * c_stride + j * kLanes;
                store(place, start ? load(place) + sums[r][j] : sums[r][j]);
            }
    }
}

// Calls f(std::integral_constant<int, rows>) for a number of rows, at most R, that is known only now.
template <int R, class F>
inline void with_rows(int rows, const F& f) {
    if constexpr (R > 0) {
        if (rows == R)
            f(std::integral_constant<int, R>{});
        else
            with_rows<R - 1>(rows, f);
    }
}

// Calls f(first, std::integral_constant<int, rows>) for tiles of about equal height that make up `count` rows.
template <class F>
inline void for_row_tiles(long count, const F& f) {
    const long tiles = (count + kRows - 1) / kRows;
    for (long i = 0; i < tiles; ++i) {
        const long first = count * i / tiles, last = count * (i + 1) / tiles;
        with_rows<kRows>(static_cast<int>(last - first), [&](auto rows) { f(first, rows); });
    }
}

// Calls f(std::integral_constant<int, columns>) for the vectors of a panel of which `channels` are left.
template <class F>
inline void with_columns(long channels, const F& f) {
    if (channels <= kLanes)
        f(std::integral_constant<int, 1>{});
    else
        f(std::integral_constant<int, kColumns>{});
}

}  // namespace fastddpm
