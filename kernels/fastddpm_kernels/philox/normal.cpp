// Writes the noise of samples.

#include "philox/normal.h"

#include "native/instruction.h"
#include "native/runtime.h"

// out [n, numel] of the keys [n, 2].
extern "C" void fastddpm_normal(
    float* out, const int64_t* keys, const int64_t* step, long stream, long n, long numel, int threads) {
    using namespace fastddpm;
    constexpr long kChunk = 64 * kNormals;
    const long chunks = ceil_div(numel, kChunk);
    for_each(n * chunks, threads, [&](long item) {
        const long sample = item / chunks, first = item % chunks * kChunk, count = std::min(kChunk, numel - first);
        float* z = scratch<float>(Slot::kOutput, kChunk);
        normals(keys + 2 * sample, *step, stream, first, count, z);
        std::memcpy(out + sample * numel + first, z, count * sizeof(float));
    });
}
FASTDDPM_INSTRUCTION(fastddpm_normal)
