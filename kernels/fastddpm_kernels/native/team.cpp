// A team is the thread that calls and helpers of its own, which sleep between calls. The items of a job are divided into
// a range for each thread, so that in the next step the same thread finds its part in its cache; who is done with its
// own range takes from those of others. A job is over when its items are done, not when all helpers have come: one that
// the system does not run, since another process has its core, holds up nothing but the item that it is at.
//
// A waiting thread spins for some microseconds and then sleeps: other processes and waiting helpers need its core.
//
// torch's own pool does none of this, but torch's operations wait for it: see `torchs_threads`.

#include "native/team.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <linux/futex.h>
#include <mutex>
#include <new>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fastddpm {
namespace {

constexpr int kMost = 256;              // threads of a team
constexpr long kSpin = 50'000;          // nanoseconds before who waits sleeps
constexpr int kPausesBetweenLooks = 32;  // at the clock

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

inline long now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000L + time.tv_nsec;
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// Returns once `word` is not `value`; `sleepers` counts who must be woken after it has changed.
uint32_t wait_while(std::atomic<uint32_t>& word, uint32_t value, std::atomic<int>& sleepers) {
    uint32_t seen = word.load(std::memory_order_acquire);
    for (const long start = now(); seen == value && now() - start < kSpin;)
        for (int i = 0; i < kPausesBetweenLooks && seen == value; ++i) {
            pause();
            seen = word.load(std::memory_order_acquire);
        }
    if (seen != value) return seen;
    sleepers.fetch_add(1);
    while ((seen = word.load()) == value) sleep_while(word, value);
    sleepers.fetch_sub(1);
    return seen;
}

// Items that are left of a thread's part: the first and the one behind the last.
struct alignas(64) Range {
    std::atomic<uint64_t> items{0};

    static uint64_t pack(uint64_t first, uint64_t last) { return first << 32 | last; }

    // Takes the first item, or for another thread the last one; -1 if there is none. Whoever has an item may read the
    // job, which does not change before the item is done.
    long take(bool own) {
        uint64_t seen = items.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t first = seen >> 32, last = seen & UINT32_MAX;
            if (first >= last) return -1;
            const uint64_t left = own ? pack(first + 1, last) : pack(first, last - 1);
            if (items.compare_exchange_weak(seen, left, std::memory_order_acquire, std::memory_order_relaxed))
                return static_cast<long>(own ? first : last - 1);
        }
    }
};

class Team {
  public:
    Team* next = nullptr;  // of those that are free

    Team() { sched_getaffinity(0, sizeof(affinity_), &affinity_); }

    // Gets helpers for as many threads, or as many as the system gives, where the calling thread may run.
    void prepare(int threads) {
        cpu_set_t affinity;
        CPU_ZERO(&affinity);
        if (sched_getaffinity(0, sizeof(affinity), &affinity) == 0 && !CPU_EQUAL(&affinity, &affinity_)) {
            affinity_ = affinity;
            for (int i = 1; i <= helpers_; ++i) pthread_setaffinity_np(threads_[i], sizeof(affinity), &affinity);
        }
        while (helpers_ + 1 < std::min(threads, kMost) && add_helper()) {
        }
    }

    void run(long count, int threads, Item item, const void* body) {
        const int parts = static_cast<int>(std::min<long>({threads, helpers_ + 1L, count}));
        item_ = item;
        body_ = body;
        count_ = static_cast<uint32_t>(count);
        done_.store(0, std::memory_order_relaxed);
        parts_.store(parts, std::memory_order_relaxed);
        for (int i = 0; i < parts; ++i)
            ranges_[i].items.store(Range::pack(count * i / parts, count * (i + 1) / parts), std::memory_order_release);
        if (parts > 1) {
            job_.fetch_add(1);
            if (sleeping_helpers_.load() > 0) wake_all(job_);
        }
        work(0);
        for (uint32_t done; (done = done_.load(std::memory_order_acquire)) != count_;)
            wait_while(done_, done, sleeping_callers_);
    }

  private:
    struct Start {
        Team* team;
        int index;
        uint32_t job;
    };

    void work(int self) {
        const int parts = parts_.load(std::memory_order_relaxed);
        uint32_t finished = 0, count = 0;
        for (int i = 0; i < parts; ++i) {
            Range& range = ranges_[(self + i) % parts];
            for (long index; (index = range.take(i == 0)) >= 0; ++finished) {
                count = count_;
                item_(body_, index);
            }
        }
        if (finished == 0) return;
        if (done_.fetch_add(finished) + finished == count && sleeping_callers_.load() > 0) wake_all(done_);
    }

    bool add_helper() {
        // Signals are for the threads that the program knows.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        const int index = helpers_ + 1;
        Start* start = new (std::nothrow) Start{this, index, job_.load()};
        const bool made = start != nullptr && pthread_create(&threads_[index], nullptr, &Team::help, start) == 0;
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        if (made) {
            pthread_detach(threads_[index]);
            helpers_ = index;
        } else {
            delete start;
        }
        return made;
    }

    static void* help(void* data) {
        const Start start = *static_cast<Start*>(data);
        delete static_cast<Start*>(data);
        Team& team = *start.team;
        for (uint32_t seen = start.job;;) {
            seen = wait_while(team.job_, seen, team.sleeping_helpers_);
            if (start.index < team.parts_.load(std::memory_order_relaxed)) team.work(start.index);
        }
        return nullptr;
    }

    // The job, read by whoever has an item.
    Item item_ = nullptr;
    const void* body_ = nullptr;
    uint32_t count_ = 0;
    std::atomic<int> parts_{0};
    alignas(64) std::atomic<uint32_t> job_{0};  // counts them
    std::atomic<int> sleeping_helpers_{0};
    alignas(64) std::atomic<uint32_t> done_{0};  // items
    std::atomic<int> sleeping_callers_{0};
    Range ranges_[kMost];

    int helpers_ = 0;
    pthread_t threads_[kMost] = {};
    cpu_set_t affinity_;
};

// Teams are never freed: there are as many as there were simultaneous calls.
std::mutex free_lock;
Team* free_teams = nullptr;
thread_local Team* engaged = nullptr;

// A forked child has no helpers.
void register_fork() {
    static const int registered = pthread_atfork(
        [] { free_lock.lock(); }, [] { free_lock.unlock(); },
        [] {
            free_teams = nullptr;
            engaged = nullptr;
            free_lock.unlock();
        });
    (void)registered;
}

Team* get_team(int threads) {
    register_fork();
    Team* team;
    {
        const std::lock_guard<std::mutex> guard(free_lock);
        team = free_teams;
        if (team != nullptr) free_teams = team->next;
    }
    if (team == nullptr) team = new (std::nothrow) Team;
    if (team == nullptr) std::abort();
    team->prepare(threads);
    return team;
}

void put_back(Team* team) {
    const std::lock_guard<std::mutex> guard(free_lock);
    team->next = free_teams;
    free_teams = team;
}

}  // namespace

ParallelEntry torchs_threads = nullptr;

void share(long count, int threads, Item item, const void* body) {
    if (engaged != nullptr) return engaged->run(count, threads, item, body);
    if (torchs_threads != nullptr) {
        struct Work {
            std::atomic<long> next;
            long count;
            Item item;
            const void* body;
        } work{{0}, count, item, body};
        torchs_threads(
            [](void* data) {
                Work& work = *static_cast<Work*>(data);
                for (long i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;)
                    work.item(work.body, i);
            },
            &work, static_cast<unsigned>(std::min<long>(threads, count)), 0);
        return;
    }
    Team* team = get_team(threads);
    team->run(count, threads, item, body);
    put_back(team);
}

Engagement::Engagement(int threads) : engaged_(engaged == nullptr && threads > 1) {
    if (engaged_) engaged = get_team(threads);
}

Engagement::~Engagement() {
    if (!engaged_) return;
    put_back(engaged);
    engaged = nullptr;
}

}  // namespace fastddpm
