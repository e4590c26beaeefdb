#include "runtime.h"

#include "simd.h"

namespace fastddpm {
ParallelEntry parallel_entry = nullptr;
}

// `parallel` is GOMP_parallel of the OpenMP runtime to use, or null for one thread. Returns the width of a panel.
extern "C" int fastddpm_start(void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
    fastddpm::parallel_entry = parallel;
    return fastddpm::kPanel;
}
