// Runs instructions in sequence, any number of times, in one call and on one team of threads.

#include <ctime>
#include <new>
#include <vector>

#include "native/instruction.h"
#include "native/runtime.h"

namespace fastddpm {
namespace {

struct Instruction {
    void (*run)(const Word*);
    std::vector<Word> words;
    long threads_at;  // which word is the number of threads, or -1
};

using Program = std::vector<Instruction>;

double seconds() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace
}  // namespace fastddpm

extern "C" void* fastddpm_program_new() { return new (std::nothrow) fastddpm::Program; }

extern "C" void fastddpm_program_delete(void* program) { delete static_cast<fastddpm::Program*>(program); }

// `run` is the address of a `.._words` function.
extern "C" void fastddpm_program_append(
    void* program, void (*run)(const fastddpm::Word*), const fastddpm::Word* words, long count, long threads_at) {
    static_cast<fastddpm::Program*>(program)->push_back({run, {words, words + count}, threads_at});
}

// Runs the instructions from `begin` to `end` `times` times, with `alone` on threads of the library's own. Adds the seconds that each takes to `taken`, if not null.
extern "C" void fastddpm_program_advance(
    void* program, long begin, long end, long times, int threads, int alone, double* taken) {
    using namespace fastddpm;
    Program& instructions = *static_cast<Program*>(program);
    for (long i = begin; i < end; ++i)
        if (instructions[i].threads_at >= 0) instructions[i].words[instructions[i].threads_at] = threads;
    const Engagement engagement(alone ? threads : 1);
    for (long time = 0; time < times; ++time)
        for (long i = begin; i < end; ++i) {
            const double start = taken ? seconds() : 0;
            instructions[i].run(instructions[i].words.data());
            if (taken) taken[i] += seconds() - start;
        }
}
