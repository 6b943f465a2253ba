// The instruction sets that the walk is compiled for; the best of a machine is taken when it runs.

#pragma once

#define LEAN_INLINE inline __attribute__((always_inline))

#ifndef LEAN_BITS  // of the longest vectors; tests/sanitize.py builds with shorter ones, too
#define LEAN_BITS 512
#endif

namespace lean {

// An instruction set: how long its vectors are, and how a job is run with it. job.on<Set>() and
// what it calls have to be inlined; another function would not be compiled for the set.
#define LEAN_INSTRUCTION_SET(NAME, SIZE, ...)                      \
  struct NAME {                                                    \
    static constexpr int BYTES = SIZE;                             \
    template <typename Job>                                        \
    __attribute__((__VA_ARGS__)) static void run(const Job& job) { \
      job.template on<NAME>();                                     \
    }                                                              \
  };
LEAN_INSTRUCTION_SET(Portable, 16, noinline)
#if defined(__x86_64__)
LEAN_INSTRUCTION_SET(Avx2, 32, noinline, target("avx2,fma"))
LEAN_INSTRUCTION_SET(Avx512, 64, noinline, target("avx512f,avx512bw,avx512dq,avx512vl,fma"))
#endif

// Runs a job with the best set of this machine.
template <typename Job>
void run(const Job& job) {
#if defined(__x86_64__)
  if constexpr (LEAN_BITS >= 512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Avx512::run(job);
  if constexpr (LEAN_BITS >= 256)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Avx2::run(job);
#endif
  Portable::run(job);
}

}  // namespace lean
