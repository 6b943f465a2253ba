// Positions side by side in a vector, and the instruction sets that vectors are compiled for.

#pragma once

#include <cstdint>
#include <limits>

#include "walk.h"

#define LEAN_INLINE inline __attribute__((always_inline))

#ifndef LEAN_BITS  // of the longest vectors; tests/sanitize.py builds with shorter ones, too
#define LEAN_BITS 512
#endif

namespace lean {

// An instruction set: how long its vectors are, and how a job is run with it. job.on<Set>() and
// what it calls have to be inlined; another function would not be compiled for the set.
#define LEAN_INSTRUCTION_SET(NAME, SIZE, ...)                  \
  struct NAME {                                                \
    static constexpr int BYTES = SIZE;                         \
    template <typename Job>                                    \
    __attribute__((__VA_ARGS__)) static void run(const Job& job) { \
      job.template on<NAME>();                                 \
    }                                                          \
  };
LEAN_INSTRUCTION_SET(Portable, 32, noinline)
#if defined(__x86_64__)
LEAN_INSTRUCTION_SET(Avx2, 32, noinline, target("avx2,fma"))
LEAN_INSTRUCTION_SET(Avx512, 64, noinline, target("avx512f,avx512bw,avx512dq,avx512vl,fma"))
#endif

// Runs a job with the best set of this machine.
template <typename Job>
void run(const Job& job) {
#if defined(__x86_64__)
  if (LEAN_BITS >= 512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Avx512::run(job);
  if (LEAN_BITS >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return Avx2::run(job);
#endif
  Portable::run(job);
}

// Numbers in the vectors of an instruction set.
template <typename T, typename InstructionSet>
struct Lanes {
  typedef T Number;
  typedef InstructionSet Set;
  static constexpr int WIDTH = Set::BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(Set::BYTES), aligned(sizeof(T)), may_alias));
};
template <typename L>
using Vector = typename L::Vector;
template <typename L>
using Number = typename L::Number;

template <typename L>
LEAN_INLINE Vector<L> all(Number<L> value) {
  return Vector<L>{} + value;
}

template <typename L>
LEAN_INLINE Vector<L> absolute(Vector<L> x) {
  return x < 0 ? -x : x;
}

// value with the sign of x, or 0 where x is.
template <typename L>
LEAN_INLINE Vector<L> signed_as(Vector<L> x, Vector<L> value) {
  return x > 0 ? value : (x < 0 ? -value : Vector<L>{});
}

// A divisor of 0 or more with its zeros and denormals made 1.
template <typename L>
LEAN_INLINE Vector<L> without_zeros(Vector<L> x) {
  return x > std::numeric_limits<Number<L>>::min() ? x : x * 0 + 1;
}

// Vectors, each in a row of its own, so many rows apart.
template <typename L>
struct Rows {
  Number<L>* start;
  int64_t apart = 1;
  LEAN_INLINE Vector<L>& operator[](int64_t index) const {
    return *reinterpret_cast<Vector<L>*>(start + index * apart * L::WIDTH);
  }
  LEAN_INLINE Rows operator+(int64_t rows) const { return {start + rows * L::WIDTH, apart}; }
};

// A matrix of vectors: (i, k) lies in row i * down + k * right.
template <typename L>
struct Matrix {
  Number<L>* start;
  int64_t height, width, down, right;
  LEAN_INLINE Rows<L> row(int64_t i) const { return {start + i * down * L::WIDTH, right}; }
  LEAN_INLINE Matrix below(int64_t i) const {
    return {row(i).start, height - i, width, down, right};
  }
  LEAN_INLINE Matrix transposed() const { return {start, width, height, right, down}; }
};

// out = A v.
template <typename L>
struct Product {
  Matrix<L> A;
  Rows<L> v, out;

  // Of HEIGHT rows of A. Their sums stay in registers.
  template <int HEIGHT>
  LEAN_INLINE void tile(int64_t first) const {
    const int64_t down = A.down * L::WIDTH;
    const Rows<L> rows = A.row(first);
    Vector<L> sums[HEIGHT] = {};
    for (int64_t k = 0; k < A.width; ++k) {
      const Number<L>* const column = rows.start + k * A.right * L::WIDTH;
      const Vector<L> weight = v[k];
      for (int i = 0; i < HEIGHT; ++i)
        sums[i] += *reinterpret_cast<const Vector<L>*>(column + i * down) * weight;
    }
    for (int i = 0; i < HEIGHT; ++i) out[first + i] = sums[i];
  }

  // In tiles of up to 8 rows of almost equal height.
  template <typename>
  LEAN_INLINE void on() const {
    int64_t first = 0;
    for (int64_t tiles = (A.height + 7) / 8; tiles > 0; --tiles) {
      const int64_t height = (A.height - first + tiles - 1) / tiles;
      switch (height) {
#define LEAN_TILE(HEIGHT)  \
  case HEIGHT:             \
    tile<HEIGHT>(first);   \
    break;
        LEAN_TILE(1) LEAN_TILE(2) LEAN_TILE(3) LEAN_TILE(4)
        LEAN_TILE(5) LEAN_TILE(6) LEAN_TILE(7) LEAN_TILE(8)
#undef LEAN_TILE
      }
      first += height;
    }
  }
};

// Rows that are multiplied at once with others: as many as the sums of a tile leave registers for.
template <typename L>
constexpr int GROUP = L::Set::BYTES == 64 ? MOST : 2;

// out(c, j) = sum_k A(j, k) B(c, k), where B has GROUP rows.
template <typename L>
struct GroupProduct {
  Matrix<L> A, B, out;

  template <int HEIGHT>
  LEAN_INLINE void tile(int64_t first) const {
    const Matrix<L> rows = A.below(first);
    Vector<L> sums[HEIGHT][GROUP<L>] = {};
    for (int64_t k = 0; k < A.width; ++k) {
      for (int i = 0; i < HEIGHT; ++i) {
        const Vector<L> x = rows.row(i)[k];
        for (int c = 0; c < GROUP<L>; ++c) sums[i][c] += x * B.row(c)[k];
      }
    }
    for (int c = 0; c < GROUP<L>; ++c)
      for (int i = 0; i < HEIGHT; ++i) out.row(c)[first + i] = sums[i][c];
  }

  template <typename>
  LEAN_INLINE void on() const {
    int64_t first = 0;
    for (; first + 4 <= A.height; first += 4) tile<4>(first);
    switch (A.height - first) {
      case 3: tile<3>(first); break;
      case 2: tile<2>(first); break;
      case 1: tile<1>(first); break;
    }
  }
};

// out = A v, in a function of its own, as it is long and has many callers.
template <typename L>
LEAN_INLINE void multiply(const Matrix<L>& A, Rows<L> v, Rows<L> out) {
  L::Set::run(Product<L>{A, v, out});
}

// Likewise out(c, j) = sum_k A(j, k) B(c, k), of any number of rows of B up to GROUP.
template <typename L>
LEAN_INLINE void multiply(const Matrix<L>& A, const Matrix<L>& B, const Matrix<L>& out) {
  if (B.height == GROUP<L>) {
    L::Set::run(GroupProduct<L>{A, B, out});
  } else {
    for (int64_t c = 0; c < B.height; ++c) multiply(A, B.row(c), out.row(c));
  }
}

}  // namespace lean
