// Threads and scratch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "native/team.h"

namespace fastddpm {

// Calls body(i) for every i below count, on up to `threads` threads. Idle threads take items from others.
template <class Body>
void for_each(long count, int threads, const Body& body) {
    if (threads <= 1 || count <= 1) {
        for (long i = 0; i < count; ++i) body(i);
        return;
    }
    share(count, threads, [](const void* data, long i) { (*static_cast<const Body*>(data))(i); }, &body);
}

// A call whose items may have work in common. Each thread does that for itself: cheaper, if it is little, than to wait.
class Call {
  public:
    // Whether the work that is named by `what` is the last that this thread did for an item of this call; now it is.
    bool done(long what) const {
        struct Last {
            uint64_t call = 0;
            long what = 0;
        };
        static thread_local Last last;
        const bool same = last.call == number_ && last.what == what;
        last = {number_, what};
        return same;
    }

  private:
    static uint64_t next() {
        static std::atomic<uint64_t> count{0};
        return count.fetch_add(1, std::memory_order_relaxed) + 1;
    }
    const uint64_t number_ = next();
};

// Returns memory of this thread, grown as needed and kept; its content is lost. Slots are independent of each other.
enum class Slot { kShared, kInput, kOutput, kPointers, kPacked, kCount };
template <class T>
T* scratch(Slot slot, size_t count) {
    struct Block {
        void* data = nullptr;
        size_t bytes = 0;
        ~Block() { std::free(data); }
    };
    static thread_local Block blocks[static_cast<int>(Slot::kCount)];
    Block& block = blocks[static_cast<int>(slot)];
    const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > block.bytes) {
        std::free(block.data);
        block.data = std::aligned_alloc(4096, bytes);
        block.bytes = bytes;
        if (block.data == nullptr) std::abort();
    }
    return static_cast<T*>(block.data);
}

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

}  // namespace fastddpm
