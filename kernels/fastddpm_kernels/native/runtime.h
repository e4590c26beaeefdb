// Threads and scratch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>

namespace fastddpm {

// The OpenMP runtime that torch has loaded, by the entry that GNU's, LLVM's and Intel's all have. Using it, and not
// linking one, keeps a second pool of threads from spinning against torch's.
using ParallelEntry = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern ParallelEntry parallel_entry;

// body(i) for every i below count, on up to `threads` threads, each taking the next item when it is done with one.
template <class Body>
void for_each(long count, int threads, const Body& body) {
    if (threads <= 1 || count <= 1 || parallel_entry == nullptr) {
        for (long i = 0; i < count; ++i) body(i);
        return;
    }
    struct Work {
        std::atomic<long> next;
        long count;
        const Body& body;
    } work{{0}, count, body};
    parallel_entry(
        [](void* data) {
            Work& work = *static_cast<Work*>(data);
            for (long i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) work.body(i);
        },
        &work, static_cast<unsigned>(std::min<long>(threads, count)), 0);
}

// Memory of this thread, grown as needed and kept; what was in it is lost. Slots are independent of each other.
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
