// Sums by which changed memory shows: of its 32-bit words, in 64 bits, so that signs that change are not carried out of
// them; those at even places and at odd ones are weighted apart. Their order does not matter. As fast as memory is read.

#include <cstdint>
#include <cstring>

#include "native/runtime.h"

namespace fastddpm {
namespace {

constexpr long kBlock = 1 << 20;  // bytes of an item

uint64_t sum_words(const char* data, long bytes) {
    constexpr int kWords = 32;  // side by side in vectors
    uint64_t even[kWords] = {}, odd[kWords] = {};
    long at = 0;
    for (; at + static_cast<long>(sizeof(even)) <= bytes; at += sizeof(even)) {
        uint64_t words[kWords];
        std::memcpy(words, data + at, sizeof(words));
        for (int i = 0; i < kWords; ++i) {
            even[i] += words[i] & 0xffffffff;
            odd[i] += words[i] >> 32;
        }
    }
    for (; at < bytes; at += sizeof(uint64_t)) {
        uint64_t word = 0;
        std::memcpy(&word, data + at, std::min<long>(sizeof(word), bytes - at));
        even[0] += word & 0xffffffff;
        odd[0] += word >> 32;
    }
    uint64_t total = 0;
    for (int i = 0; i < kWords; ++i) total += even[i] + 0x9e3779b97f4a7c15 * odd[i];
    return total;
}

}  // namespace
}  // namespace fastddpm

// sums[i] of `bytes[i]` bytes from places[i] on.
extern "C" void fastddpm_checksums(
    uint64_t* sums, const char* const* places, const int64_t* bytes, long count, int threads) {
    using namespace fastddpm;
    long blocks = 0;
    for (long i = 0; i < count; ++i) {
        sums[i] = 0;
        blocks += ceil_div(bytes[i], kBlock);
    }
    struct Block {
        long tensor, begin;
    };
    Block* items = scratch<Block>(Slot::kShared, blocks);
    long next = 0;
    for (long i = 0; i < count; ++i)
        for (long begin = 0; begin < bytes[i]; begin += kBlock) items[next++] = {i, begin};
    for_each(blocks, threads, [&](long item) {
        const Block block = items[item];
        const long size = std::min(kBlock, static_cast<long>(bytes[block.tensor]) - block.begin);
        __atomic_fetch_add(&sums[block.tensor], sum_words(places[block.tensor] + block.begin, size), __ATOMIC_RELAXED);
    });
}
