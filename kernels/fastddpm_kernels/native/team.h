// Threads that share the items of a call.
#pragma once

namespace fastddpm {

// Item `index` of a body.
using Item = void (*)(const void* body, long index);

// All items below `count`, on the calling thread and up to `threads` - 1 others.
void share(long count, int threads, Item item, const void* body);

// Keeps one team for all calls of `share` by this thread.
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
