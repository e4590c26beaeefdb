// Runs one instruction on memory that a file has, and writes that memory back.
//
//     aarch64_run library.so FUNCTION memory.bin WORDS..
//
// A word is an integer, or p and an offset into the memory.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int count, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    auto* run = reinterpret_cast<void (*)(const int64_t*)>(dlsym(library, arguments[2]));
    std::FILE* file = std::fopen(arguments[3], "r+b");
    if (run == nullptr || file == nullptr) return 2;
    std::fseek(file, 0, SEEK_END);
    const long size = std::ftell(file);
    std::rewind(file);
    char* memory = static_cast<char*>(std::aligned_alloc(4096, (size + 4095) / 4096 * 4096));
    if (std::fread(memory, 1, size, file) != static_cast<size_t>(size)) return 3;
    std::vector<int64_t> words;
    for (int i = 4; i < count; ++i)
        words.push_back(
            arguments[i][0] == 'p' ? reinterpret_cast<int64_t>(memory + std::atoll(arguments[i] + 1))
                                   : std::atoll(arguments[i]));
    run(words.data());
    std::rewind(file);
    return std::fwrite(memory, 1, size, file) == static_cast<size_t>(size) && std::fclose(file) == 0 ? 0 : 4;
}
