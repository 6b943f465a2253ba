// Positions side by side in a vector, and rows and matrices of vectors.

#pragma once

#include <cstdint>
#include <limits>

#include "instruction_sets.h"

namespace lean {

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

}  // namespace lean
