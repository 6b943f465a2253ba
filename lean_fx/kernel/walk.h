// LEAN's walk over blocks of positions, as lean_fx/reduction/functional.py defines it.
//
// A position's channels are a matrix X of I preserved by K reducible channels. LANES positions are
// copied side by side, a row for each channel, and walked in vectors of WIDTH positions. All that a
// walk computes is products of X or its transpose with a vector, a tile of sums at a time.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace lean {

constexpr int LANES = 16;  // positions of a block: a cache line of each channel
constexpr int WIDTH = 8;   // positions of a vector

enum class Normalize { column, row, none };
enum class Scale { sum, mean, magnitude };

struct Options {
  Normalize normalize = Normalize::column;
  Scale scale = Scale::sum;
  bool interleaved = false;
  bool nonnegative = false;
  int64_t iterations = 1;
  double damping = 0;
  double norm_floor = 0;
};

struct Shape {
  int64_t before;     // positions in front of the channels: x is [before, preserved * reducible,
  int64_t behind;     // behind]
  int64_t preserved;  // I
  int64_t reducible;  // K
  bool matrix;        // whether the seed has a value for each channel
  int64_t channels() const { return preserved * reducible; }
  int64_t blocks() const { return (before * behind + LANES - 1) / LANES; }
  // What a walk needs to work in: X, y, d, t and u of a block.
  int64_t scratch() const { return (channels() + 2 * preserved + 2 * reducible) * LANES; }
};

#define LEAN_ALWAYS __attribute__((always_inline))
#define LEAN_INLINE inline LEAN_ALWAYS

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(WIDTH * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vector = typename Lanes<T>::Vector;

template <typename T>
LEAN_INLINE Vector<T> absolute(Vector<T> x) {
  return x < 0 ? -x : x;
}

// A divisor of 0 or more with its zeros and denormals made 1.
template <typename T>
LEAN_INLINE Vector<T> without_zeros(Vector<T> x) {
  return x > std::numeric_limits<T>::min() ? x : x * 0 + 1;
}

// The vectors of a block, a row of LANES numbers for each.
template <typename T>
struct Rows {
  T* start;
  LEAN_INLINE Vector<T>& operator[](int64_t row) const {
    return *reinterpret_cast<Vector<T>*>(start + row * LANES);
  }
  LEAN_INLINE Rows operator+(int64_t rows) const { return {start + rows * LANES}; }
};

// A position's channels as a matrix: channel (i, k) lies in row i * down + k * right.
template <typename T>
struct Matrix {
  Rows<T> rows;
  int64_t I, K, down, right;
};

// sum_s A[r * across + s * along] * v[s] for SIZE values of r. The sums stay in registers.
template <int SIZE, typename T, typename V>
LEAN_INLINE void sum_tile(Rows<T> A, int64_t across, int64_t along, int64_t terms, V v,
                          Vector<T>* sums) {
  for (int r = 0; r < SIZE; ++r) sums[r] = Vector<T>{};
  for (int64_t s = 0; s < terms; ++s) {
    const Vector<T> weight = v[s];
    for (int r = 0; r < SIZE; ++r) sums[r] += A[s * along + r * across] * weight;
  }
}

// Calls use(r, sum) for r from first to last, in tiles of up to 8 of almost equal size.
template <typename T, typename V, typename Use>
LEAN_INLINE void for_sums(Rows<T> A, int64_t across, int64_t along, int64_t terms, V v,
                          int64_t first, int64_t last, Use use) {
  for (int64_t tiles = (last - first + 7) / 8; tiles > 0; --tiles) {
    const int64_t size = (last - first + tiles - 1) / tiles;
    const Rows<T> tile = A + first * across;
    Vector<T> sums[8];
    switch (size) {
#define LEAN_TILE(SIZE)                                     \
  case SIZE:                                                \
    sum_tile<SIZE>(tile, across, along, terms, v, sums);    \
    for (int r = 0; r < SIZE; ++r) use(first + r, sums[r]); \
    break;
      LEAN_TILE(1) LEAN_TILE(2) LEAN_TILE(3) LEAN_TILE(4)
      LEAN_TILE(5) LEAN_TILE(6) LEAN_TILE(7) LEAN_TILE(8)
#undef LEAN_TILE
    }
    first += size;
  }
}

template <typename T>
struct Ones {
  LEAN_INLINE Vector<T> operator[](int64_t) const { return Vector<T>{} + 1; }
};

// out = X v
template <typename T, typename V>
LEAN_INLINE void multiply(const Matrix<T>& X, V v, Rows<T> out) {
  for_sums(X.rows, X.down, X.right, X.K, v, 0, X.I,
           [&](int64_t i, const Vector<T>& sum) LEAN_ALWAYS { out[i] = sum; });
}

// out = X^T v
template <typename T, typename V>
LEAN_INLINE void multiply_transposed(const Matrix<T>& X, V v, Rows<T> out) {
  for_sums(X.rows, X.right, X.down, X.I, v, 0, X.K,
           [&](int64_t k, const Vector<T>& sum) LEAN_ALWAYS { out[k] = sum; });
}

// Each so many rows apart.
template <typename T>
struct Spaced {
  Rows<T> rows;
  int64_t apart;
  LEAN_INLINE Vector<T>& operator[](int64_t row) const { return rows[row * apart]; }
};

// d[i] = sum_j |sum_k X[i,k] X[j,k]|
template <typename T>
LEAN_INLINE void affinity_sums(const Matrix<T>& X, Rows<T> d) {
  for (int64_t i = 0; i < X.I; ++i) d[i] = Vector<T>{};
  for (int64_t i = 0; i < X.I; ++i) {
    const Spaced<T> row{X.rows + i * X.down, X.right};
    Vector<T> own = d[i];
    for_sums(X.rows, X.down, X.right, X.K, row, i + 1, X.I,
             [&](int64_t j, const Vector<T>& sum) LEAN_ALWAYS {
               const Vector<T> affinity = absolute<T>(sum);
               d[j] += affinity;
               own += affinity;
             });
    for (int64_t k = 0; k < X.K; ++k) own += row[k] * row[k];
    d[i] = own;
  }
}

// The walk of one vector of positions, whose channels begin at rows.
template <typename T>
LEAN_INLINE void walk_vector(const Shape& shape, const Options& options, const T* seed,
                             T* __restrict start) {
  const int64_t I = shape.preserved, K = shape.reducible;
  const Rows<T> rows{start}, y = rows + I * K, d = y + I, t = d + I, u = t + K;
  const Matrix<T> X{rows, I, K, options.interleaved ? 1 : K, options.interleaved ? I : 1};
  const bool column = options.normalize == Normalize::column;

  if (options.normalize != Normalize::none) {
    if (options.nonnegative) {  // sum_j |<X_i, X_j>| = <X_i, sum_j X_j>
      multiply_transposed(X, Ones<T>{}, t);
      multiply(X, t, d);
    } else {
      affinity_sums(X, d);
    }
    Vector<T> extra = Vector<T>{};
    if (options.damping != 0) {
      for (int64_t i = 0; i < I; ++i) extra += d[i];
      extra *= static_cast<T>(options.damping / static_cast<double>(I));
    }
    for (int64_t i = 0; i < I; ++i) d[i] = without_zeros<T>(d[i] + extra);
  }
  for (int64_t step = 0; step < options.iterations; ++step) {
    if (shape.matrix && step == 0) {
      for (int64_t k = 0; k < K; ++k) u[k] = Vector<T>{};
      for (int64_t i = 0; i < I; ++i) {
        for (int64_t k = 0; k < K; ++k) {
          const Vector<T> v = Vector<T>{} + seed[i * K + k];
          u[k] += rows[i * X.down + k * X.right] * (column ? v / d[i] : v);
        }
      }
    } else {
      for (int64_t i = 0; i < I; ++i) {
        if (step == 0) y[i] = Vector<T>{} + seed[i];
        if (column) y[i] /= d[i];
      }
      multiply_transposed(X, y, u);
    }
    multiply(X, u, y);
    Vector<T> norm = Vector<T>{} + static_cast<T>(options.norm_floor);
    for (int64_t i = 0; i < I; ++i) {
      if (options.normalize == Normalize::row) y[i] /= d[i];
      norm += absolute<T>(y[i]);
    }
    const Vector<T> inverse = 1 / without_zeros<T>(norm);
    for (int64_t i = 0; i < I; ++i) y[i] *= inverse;
  }
  if (options.scale == Scale::sum) return;
  Vector<T> factor = Vector<T>{} + static_cast<T>(I);
  if (options.scale == Scale::magnitude) {
    Vector<T> sum = Vector<T>{};
    for (int64_t c = 0; c < I * K; ++c) sum += absolute<T>(rows[c]);
    factor *= sum / static_cast<T>(I * K);
  }
  for (int64_t i = 0; i < I; ++i) y[i] *= factor;
}

#if defined(__x86_64__) && defined(__gnu_linux__)
#define LEAN_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define LEAN_CLONES
#endif

// Walks over the first count positions of the rows of a block.
#define LEAN_WALK(W)                                                                             \
  LEAN_CLONES static void walk_rows(const Shape& shape, const Options& options, const W* seed,   \
                                    W* rows, int64_t count) {                                    \
    for (int64_t first = 0; first < count; first += WIDTH)                                       \
      walk_vector<W>(shape, options, seed, rows + first);                                        \
  }
LEAN_WALK(float)
LEAN_WALK(double)
#undef LEAN_WALK

// Numbers of 16 bits, computed in float.
struct Half {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    uint32_t wide;
    if (rest >= 0x7c00u) {  // infinite, or no number
      wide = 0x7f800000u | (rest & 0x3ffu) << 13;
    } else if (rest >= 0x400u) {
      wide = (rest << 13) + (112u << 23);
    } else {  // a denormal is so many times 2^-24
      const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
      return sign ? -value : value;
    }
    wide |= sign;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  Half() = default;
  explicit Half(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const uint32_t sign = wide >> 16 & 0x8000u;
    wide &= 0x7fffffffu;
    if (wide > 0x7f800000u) {
      bits = static_cast<uint16_t>(sign | 0x7e00u);
    } else if (wide >= 0x477ff000u) {  // rounds to more than 65504
      bits = static_cast<uint16_t>(sign | 0x7c00u);
    } else if (wide >= 0x38800000u) {
      const uint32_t odd = wide >> 13 & 1u;
      bits = static_cast<uint16_t>(sign | ((wide - (112u << 23) + 0xfffu + odd) >> 13));
    } else {  // adding 0.5 rounds to a multiple of 2^-24, in the last bits
      float magnitude;
      std::memcpy(&magnitude, &wide, sizeof magnitude);
      magnitude += 0.5f;
      std::memcpy(&wide, &magnitude, sizeof wide);
      bits = static_cast<uint16_t>(sign | (wide - 0x3f000000u));
    }
  }
};

struct Brain {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  Brain() = default;
  explicit Brain(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    if ((wide & 0x7fffffffu) > 0x7f800000u) {
      bits = 0x7fc0u;
    } else {
      bits = static_cast<uint16_t>((wide + 0x7fffu + (wide >> 16 & 1u)) >> 16);
    }
  }
};

// Walks over a block of positions; T is what is stored, W what it is computed in.
template <typename T, typename W>
LEAN_INLINE void walk_block(const Shape& shape, const Options& options, const T* __restrict x,
                            const W* seed, T* __restrict out, W* __restrict scratch,
                            int64_t block) {
  const int64_t C = shape.channels(), I = shape.preserved, behind = shape.behind;
  const int64_t start = block * LANES, left = shape.before * behind - start;
  const int64_t count = left < LANES ? left : LANES;
  const bool in_a_row = start % behind + count <= behind;
  W* const y = scratch + C * LANES;
  // Where a position begins in an array of so many channels.
  const auto at = [&](int64_t lane, int64_t channels) LEAN_ALWAYS {
    const int64_t position = start + lane;
    return position / behind * channels * behind + position % behind;
  };

  if (in_a_row && count == LANES) {
    const T* from = x + at(0, C);
    for (int64_t c = 0; c < C; ++c, from += behind) {
      __builtin_prefetch(from + 2 * LANES);  // the hardware follows fewer streams than C
      for (int lane = 0; lane < LANES; ++lane)
        scratch[c * LANES + lane] = static_cast<W>(from[lane]);
    }
  } else if (in_a_row && behind > 1) {
    const T* from = x + at(0, C);
    for (int64_t c = 0; c < C; ++c, from += behind)
      for (int lane = 0; lane < count; ++lane)
        scratch[c * LANES + lane] = static_cast<W>(from[lane]);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) {
      const T* const from = x + at(lane, C);
      for (int64_t c = 0; c < C; ++c) scratch[c * LANES + lane] = static_cast<W>(from[c * behind]);
    }
  }
  walk_rows(shape, options, seed, scratch, count);
  if (in_a_row && count == LANES) {
    T* to = out + at(0, I);
    for (int64_t i = 0; i < I; ++i, to += behind)
      for (int lane = 0; lane < LANES; ++lane) to[lane] = static_cast<T>(y[i * LANES + lane]);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) {
      T* const to = out + at(lane, I);
      for (int64_t i = 0; i < I; ++i) to[i * behind] = static_cast<T>(y[i * LANES + lane]);
    }
  }
}

// Walks over the blocks first to last.
#define LEAN_WALK(T, W)                                                                       \
  LEAN_CLONES static void walk_blocks(const Shape& shape, const Options& options, const T* x, \
                                      const W* seed, T* out, W* scratch, int64_t first,       \
                                      int64_t last) {                                         \
    for (int64_t block = first; block < last; ++block)                                        \
      walk_block<T, W>(shape, options, x, seed, out, scratch, block);                         \
  }
LEAN_WALK(float, float)
LEAN_WALK(double, double)
LEAN_WALK(Half, float)
LEAN_WALK(Brain, float)
#undef LEAN_WALK

}  // namespace lean
