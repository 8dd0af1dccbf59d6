// SPDX-License-Identifier: Apache-2.0
// Random numbers and buffers for the fuzz programs.
#ifndef XSHARE_NATIVE_TESTS_FUZZ_H
#define XSHARE_NATIVE_TESTS_FUZZ_H

#include <stdint.h>

#include <memory>
#include <random>

namespace fuzz {

inline std::mt19937_64 generator;

inline uint32_t bits() { return static_cast<uint32_t>(generator()); }
inline bool one_in(uint32_t n) { return bits() % n == 0; }
inline int32_t between(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(bits() % static_cast<uint32_t>(high - low + 1));
}

inline int32_t extreme() {
    const int32_t values[] = {INT32_MIN,     INT32_MIN + 1, -1,       0, 1, 2, 511, 512, 513, 1 << 20,
                              (1 << 20) + 1, INT32_MAX - 1, INT32_MAX};
    return values[bits() % (sizeof values / sizeof *values)];
}

inline void fill_random(void* data, size_t size) {
    unsigned char* bytes = static_cast<unsigned char*>(data);
    for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<unsigned char>(bits());
}

// A heap block of exactly `size` bytes, now and then one byte off its alignment.
class Block {
  public:
    Block(size_t size, bool misaligned)
        : data_(new unsigned char[size + misaligned]), start_(data_.get() + misaligned) {
        fill_random(start_, size);
    }
    void* get() const { return start_; }

  private:
    std::unique_ptr<unsigned char[]> data_;
    unsigned char* start_;
};

}  // namespace fuzz

#endif  // XSHARE_NATIVE_TESTS_FUZZ_H
