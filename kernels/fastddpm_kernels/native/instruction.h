// Functions of the library as instructions of a program: their arguments are words of 64 bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace fastddpm {

// An argument: a pointer, an integer, or the bits of a float in the lower half.
using Word = int64_t;

template <class T>
T from_word(Word word) {
    T value;
    if constexpr (sizeof(T) == sizeof(Word) || !std::is_integral_v<T>)
        std::memcpy(&value, &word, sizeof(T));
    else
        value = static_cast<T>(word);
    return value;
}

template <class... Arguments, size_t... I>
void call(void (*function)(Arguments...), const Word* words, std::index_sequence<I...>) {
    function(from_word<Arguments>(words[I])...);
}

template <class... Arguments>
void call(void (*function)(Arguments...), const Word* words) {
    call(function, words, std::index_sequence_for<Arguments...>());
}

}  // namespace fastddpm

// Makes `name`, a function of the library that returns nothing, an instruction.
#define FASTDDPM_INSTRUCTION(name) \
    extern "C" void name##_words(const fastddpm::Word* words) { fastddpm::call(name, words); }
