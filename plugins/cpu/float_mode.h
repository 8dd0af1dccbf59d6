// SPDX-License-Identifier: Apache-2.0
// Routing has fixed bits: it needs subnormal numbers and round-to-nearest, whatever the calling thread has
// set (torch.set_flush_denormal, -ffast-math in somebody's library, fesetround). Traps are masked for the
// same time.
#ifndef XSHARE_CPU_FLOAT_MODE_H
#define XSHARE_CPU_FLOAT_MODE_H

#include <stdint.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#error "say here how this CPU's floating-point mode is read and set"
#endif

namespace xshare {

#if defined(__SSE2__)

typedef uint32_t FloatMode;
inline FloatMode float_mode() { return _mm_getcsr(); }
inline void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }
inline bool is_default(FloatMode mode) { return (mode & ~0x3fu) == 0x1f80; }  // but for the flags of the past
constexpr FloatMode kDefaultFloatMode = 0x1f80;

#elif defined(__aarch64__)

typedef uint64_t FloatMode;
inline FloatMode float_mode() {
    FloatMode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
inline void set_float_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
inline bool is_default(FloatMode mode) { return mode == 0; }
constexpr FloatMode kDefaultFloatMode = 0;

#endif

// The default mode for as long as it lives. The compiler does not see that arithmetic depends on it: what is
// to run under it has to be a function of its own that is not inlined.
class DefaultFloatMode {
  public:
    DefaultFloatMode() : before_(float_mode()), is_changed_(!is_default(before_)) {
        if (is_changed_) set_float_mode(kDefaultFloatMode);
    }
    ~DefaultFloatMode() {
        if (is_changed_) set_float_mode(before_);
    }
    DefaultFloatMode(const DefaultFloatMode&) = delete;
    DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

  private:
    const FloatMode before_;
    const bool is_changed_;
};

}  // namespace xshare

#endif  // XSHARE_CPU_FLOAT_MODE_H
