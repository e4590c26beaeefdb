// The inner loop of every convolution: a tile of rows of x times one panel of packed weights, sums in registers. Rows and
// weights are words of an arithmetic, `depth` many deep.
#pragma once

#include "native/arithmetic.h"

#include <algorithm>
#include <type_traits>

namespace fastddpm {

// Products are summed in blocks, and then the blocks, which loses less precision than one long sum.
constexpr long kDepth = 128;
constexpr long kLine = 64;  // bytes of a cache's line

// sums[r][j] += sum_k rows(r)[k] * panel[k][j], for the first C of a panel's vectors. `Rows` says where row r begins. The
// weights `ahead` of these are asked for meanwhile: a CPU does not guess what lies behind a page or in another panel.
template <class A, int R, int C, class Rows>
inline __attribute__((always_inline)) void multiply_add(
    Vec (&sums)[R][C], const Rows& rows, long depth, const typename A::Weight* panel, long ahead = 0) {
    constexpr long kVector = kLanes * sizeof(*panel);
    for (long k = 0; k < depth; ++k, panel += kPanel) {
        Vec weights[C];
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) {
            weights[j] = load(panel + j * kLanes);
            if (j * kVector % kLine == 0) __builtin_prefetch(panel + ahead + j * kLanes, 0, 2);
        }
#pragma GCC unroll 28
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
    Vec (&total)[R][C], const Rows& rows, long depth, const typename A::Weight* panel, long ahead = 0) {
    for (long start = 0; start < depth; start += kDepth) {
        Vec sums[R][C] = {};
        multiply_add<A>(
            sums, [&](int r) { return rows(r) + start; }, std::min(kDepth, depth - start), panel + start * kPanel, ahead);
#pragma GCC unroll 28
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) total[r][j] += sums[r][j];
        asm volatile("" : "+m"(total));
    }
}

// c[R][kPanel] = a[R][depth] x panel[depth][kPanel], the blocks added in c; of a row the first C vectors. `more`: added to
// what is in c.
template <class A, int R, int C = kColumns>
void multiply_tile(
    const float* a, long a_stride, const typename A::Weight* panel, long depth, float* c, long c_stride, long ahead = 0,
    bool more = false) {
    for (long start = 0; start < depth; start += kDepth) {
        Vec sums[R][C] = {};
        multiply_add<A>(
            sums, [=](int r) { return a + r * a_stride + start; }, std::min(kDepth, depth - start),
            panel + start * kPanel, ahead);
#pragma GCC unroll 28
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) {
                float* place = c + r * c_stride + j * kLanes;
                store(place, start || more ? load(place) + sums[r][j] : sums[r][j]);
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

// Parts of a panel that threads may share out: where it has two vectors, each alone reaches the rate of both.
constexpr int kHalves = kColumns == 2 ? 2 : 1;

// Calls f(first, std::integral_constant<int, rows>), as `for_row_tiles`, for tiles of a single vector of columns: those are
// twice as high. So the weights of up to 2 kRows rows are read once. A tile may be higher than its rows.
template <class F>
inline void for_high_tiles(long count, const F& f) {
    if (kHalves == 1 || count <= kRows || count > 2 * kRows) return for_row_tiles(count, f);
    constexpr int kHigh = (2 * kRows + 3) / 4;  // in fours
    with_rows<kHigh>(static_cast<int>((count + 3) / 4), [&](auto fours) {
        if constexpr (4 * decltype(fours)::value > kRows && 4 * decltype(fours)::value <= 2 * kRows + 3)
            f(0, std::integral_constant<int, 4 * decltype(fours)::value>{});
    });
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
