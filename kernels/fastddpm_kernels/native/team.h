// Threads that share the items of a call.
#pragma once

namespace fastddpm {

// Item `index` of a body.
using Item = void (*)(const void* body, long index);

// An OpenMP runtime's entry that GNU's, LLVM's and Intel's all have.
using ParallelEntry = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Returns the runtime whose threads torch uses, or null. They spin between two operations of torch, waiting for the
// next one. So an op that is called in between runs on the same threads: two pools would compete for the cores.
extern ParallelEntry torchs_threads;

// All items below `count`, on the calling thread and up to `threads` - 1 others: of its team if it has engaged one, else
// torch's.
void share(long count, int threads, Item item, const void* body);

// Has a team of the library's own for all calls of `share` by this thread.
class Engagement {
  public:
    explicit Engagement(int threads);
    ~Engagement();
    Engagement(const Engagement&) = delete;
    Engagement& operator=(const Engagement&) = delete;

  private:
    bool engaged_;
};

}  // namespace fastddpm
