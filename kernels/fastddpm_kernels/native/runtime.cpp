#include "native/runtime.h"

#include "native/simd.h"

// `parallel` is GOMP_parallel of the OpenMP runtime that torch uses, or null. Returns the width of a panel.
extern "C" int fastddpm_start(fastddpm::ParallelEntry parallel) {
    fastddpm::torchs_threads = parallel;
    return fastddpm::kPanel;
}

// Whether weights may be stored in float16.
extern "C" int fastddpm_half() {
#if defined(FASTDDPM_HALF)
    return 1;
#else
    return 0;
#endif
}

// How products of bfloat16 are to be had: 0 not here, 1 by this library, 2 here too, but the CPU has matrix units, which
// oneDNN uses and this library does not.
extern "C" int fastddpm_bfloat16() {
#if defined(__AVX512BF16__) && defined(__AMX_BF16__)
    return 2;
#elif defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}
