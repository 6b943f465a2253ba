// Positions side by side, WIDTH of them in a vector.

#pragma once

#include <cstdint>
#include <limits>

#define LEAN_INLINE inline __attribute__((always_inline))

// A function that is compiled for several instruction sets; the best is taken when it is loaded.
#if !defined(__x86_64__) || !defined(__gnu_linux__)
#define LEAN_CLONES
#elif !defined(__clang__) && __GNUC__ >= 12
#define LEAN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LEAN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

namespace lean {

constexpr int WIDTH = 8;  // positions of a vector

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(WIDTH * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vector = typename Lanes<T>::Vector;

template <typename T>
LEAN_INLINE Vector<T> all(T value) {
  return Vector<T>{} + value;
}

template <typename T>
LEAN_INLINE Vector<T> absolute(Vector<T> x) {
  return x < 0 ? -x : x;
}

// value with the sign of x, or 0 where x is.
template <typename T>
LEAN_INLINE Vector<T> signed_as(Vector<T> x, Vector<T> value) {
  return x > 0 ? value : (x < 0 ? -value : Vector<T>{});
}

// A divisor of 0 or more with its zeros and denormals made 1.
template <typename T>
LEAN_INLINE Vector<T> without_zeros(Vector<T> x) {
  return x > std::numeric_limits<T>::min() ? x : x * 0 + 1;
}

// Vectors, each in a row of its own, so many rows apart.
template <typename T>
struct Rows {
  T* start;
  int64_t apart = 1;
  LEAN_INLINE Vector<T>& operator[](int64_t index) const {
    return *reinterpret_cast<Vector<T>*>(start + index * apart * WIDTH);
  }
  LEAN_INLINE Rows operator+(int64_t rows) const { return {start + rows * WIDTH, apart}; }
};

// A matrix of vectors: (i, k) lies in row i * down + k * right.
template <typename T>
struct Matrix {
  T* start;
  int64_t height, width, down, right;
  LEAN_INLINE Rows<T> row(int64_t i) const { return {start + i * down * WIDTH, right}; }
  LEAN_INLINE Matrix below(int64_t i) const {
    return {row(i).start, height - i, width, down, right};
  }
  LEAN_INLINE Matrix transposed() const { return {start, width, height, right, down}; }
};

// The products of HEIGHT rows of A with v. Their sums stay in registers.
template <int HEIGHT, typename T>
LEAN_INLINE void multiply_tile(const Matrix<T>& A, Rows<T> v, Rows<T> out) {
  const int64_t down = A.down * WIDTH;
  Vector<T> sums[HEIGHT] = {};
  for (int64_t k = 0; k < A.width; ++k) {
    const T* const column = A.start + k * A.right * WIDTH;
    const Vector<T> weight = v[k];
    for (int i = 0; i < HEIGHT; ++i)
      sums[i] += *reinterpret_cast<const Vector<T>*>(column + i * down) * weight;
  }
  for (int i = 0; i < HEIGHT; ++i) out[i] = sums[i];
}

// out = A v, in tiles of up to 8 rows of almost equal height.
template <typename T>
LEAN_CLONES __attribute__((noinline)) void multiply(const Matrix<T>& A, Rows<T> v, Rows<T> out) {
  int64_t first = 0;
  for (int64_t tiles = (A.height + 7) / 8; tiles > 0; --tiles) {
    const int64_t height = (A.height - first + tiles - 1) / tiles;
    const Matrix<T> tile = A.below(first);
    switch (height) {
#define LEAN_TILE(HEIGHT)                        \
  case HEIGHT:                                   \
    multiply_tile<HEIGHT>(tile, v, out + first); \
    break;
      LEAN_TILE(1) LEAN_TILE(2) LEAN_TILE(3) LEAN_TILE(4)
      LEAN_TILE(5) LEAN_TILE(6) LEAN_TILE(7) LEAN_TILE(8)
#undef LEAN_TILE
    }
    first += height;
  }
}

}  // namespace lean
