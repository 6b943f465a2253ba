// LEAN's walk over blocks of positions, as lean_fx/reduction/functional.py defines it.
//
// A position's channels are a matrix X of I preserved by K reducible channels. LANES positions are
// copied side by side, a row for each channel, and walked in vectors of WIDTH: t and u, of K vectors
// each, stay in registers where the compiler knows K.

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
  // What a walk needs to work in: X, y and d of a block, and t and u where K is not known.
  int64_t scratch() const { return (channels() + 2 * preserved + 2 * reducible) * LANES; }
};

#define LEAN_INLINE inline __attribute__((always_inline))

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

template <typename T, typename A, typename B>
LEAN_INLINE Vector<T> dot(A a, B& b, int64_t count) {
  Vector<T> sum = a[0] * b[0];
  for (int64_t k = 1; k < count; ++k) sum += a[k] * b[k];
  return sum;
}

// d[i] = sum_j |sum_k X[i,k] X[j,k]|
template <typename T>
LEAN_INLINE void affinity_sums(Rows<T> X, Rows<T> d, int64_t I, int64_t K) {
  for (int64_t i = 0; i < I; ++i) d[i] = Vector<T>{};
  for (int64_t i = 0; i < I; ++i) {
    const Rows<T> row = X + i * K;
    Vector<T> own = d[i] + dot<T>(row, row, K);
    for (int64_t j = i + 1; j < I; ++j) {
      const Vector<T> g = absolute<T>(dot<T>(X + j * K, row, K));
      own += g;
      d[j] += g;
    }
    d[i] = own;
  }
}

// K vectors: in registers where K is known, else in memory.
template <typename T, int CONSTANT>
struct Held {
  Vector<T> vectors[CONSTANT];
  LEAN_INLINE void put(Rows<T>) {}
  LEAN_INLINE Vector<T>& operator[](int64_t k) { return vectors[k]; }
};
template <typename T>
struct Held<T, 0> {
  Rows<T> rows;
  LEAN_INLINE void put(Rows<T> where) { rows = where; }
  LEAN_INLINE Vector<T>& operator[](int64_t k) { return rows[k]; }
};

// The walk of one vector of positions. CONSTANT is K where the compiler is to know it, else 0.
template <typename T, int CONSTANT>
LEAN_INLINE void walk_vector(const Shape& shape, const Options& options, const T* seed,
                            T* __restrict scratch) {
  const int64_t I = shape.preserved, K = CONSTANT ? CONSTANT : shape.reducible;
  const Rows<T> X{scratch}, y = X + I * K, d = y + I;
  Held<T, CONSTANT> t{}, u{};
  t.put(d + I);
  u.put(d + I + K);
  const bool normalized = options.normalize != Normalize::none;
  const bool column = options.normalize == Normalize::column;

  if (normalized && options.nonnegative) {
    for (int64_t k = 0; k < K; ++k) t[k] = X[k];
    for (int64_t i = 1; i < I; ++i)
      for (int64_t k = 0; k < K; ++k) t[k] += X[i * K + k];
  }
  // The default walk reads X once for both d and u.
  const bool at_once = column && options.nonnegative && options.damping == 0 && !shape.matrix;
  if (normalized && !at_once) {
    if (options.nonnegative) {
      for (int64_t i = 0; i < I; ++i) d[i] = dot<T>(X + i * K, t, K);
    } else {
      affinity_sums<T>(X, d, I, K);
    }
    if (options.damping != 0) {
      Vector<T> sum = d[0];
      for (int64_t i = 1; i < I; ++i) sum += d[i];
      sum *= static_cast<T>(options.damping / static_cast<double>(I));
      for (int64_t i = 0; i < I; ++i) d[i] += sum;
    }
    for (int64_t i = 0; i < I; ++i) d[i] = without_zeros<T>(d[i]);
  }
  for (int64_t step = 0; step < options.iterations; ++step) {
    for (int64_t k = 0; k < K; ++k) u[k] = Vector<T>{};
    for (int64_t i = 0; i < I; ++i) {
      const Rows<T> row = X + i * K;
      if (at_once && step == 0) d[i] = without_zeros<T>(dot<T>(row, t, K));
      if (shape.matrix && step == 0) {
        for (int64_t k = 0; k < K; ++k) {
          const Vector<T> v = Vector<T>{} + seed[i * K + k];
          u[k] += row[k] * (column ? v / d[i] : v);
        }
      } else {
        const Vector<T> v = step == 0 ? Vector<T>{} + seed[i] : y[i];
        const Vector<T> weight = column ? v / d[i] : v;
        for (int64_t k = 0; k < K; ++k) u[k] += row[k] * weight;
      }
    }
    Vector<T> norm = Vector<T>{} + static_cast<T>(options.norm_floor);
    for (int64_t i = 0; i < I; ++i) {
      y[i] = dot<T>(X + i * K, u, K);
      if (options.normalize == Normalize::row) y[i] /= d[i];
      norm += absolute<T>(y[i]);
    }
    const Vector<T> inverse = 1 / without_zeros<T>(norm);
    for (int64_t i = 0; i < I; ++i) y[i] *= inverse;
  }
  if (options.scale == Scale::sum) return;
  Vector<T> factor = Vector<T>{} + static_cast<T>(I);
  if (options.scale == Scale::magnitude) {
    Vector<T> sum = absolute<T>(X[0]);
    for (int64_t c = 1; c < I * K; ++c) sum += absolute<T>(X[c]);
    factor *= sum / static_cast<T>(I * K);
  }
  for (int64_t i = 0; i < I; ++i) y[i] *= factor;
}

template <typename T, int CONSTANT>
LEAN_INLINE void walk_all(const Shape& shape, const Options& options, const T* seed, T* scratch,
                          int64_t count) {
  for (int64_t first = 0; first < count; first += WIDTH)
    walk_vector<T, CONSTANT>(shape, options, seed, scratch + first);
}

#if defined(__x86_64__) && defined(__gnu_linux__)
#define LEAN_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define LEAN_CLONES
#endif

LEAN_CLONES static void walk_one(const Shape& shape, const Options& options, const float* seed,
                                 float* scratch, int64_t count) {
  switch (shape.reducible) {
#define LEAN_CASE(K) \
  case K:            \
    return walk_all<float, K>(shape, options, seed, scratch, count);
    LEAN_CASE(2) LEAN_CASE(3) LEAN_CASE(4) LEAN_CASE(5) LEAN_CASE(6) LEAN_CASE(8)
    LEAN_CASE(10) LEAN_CASE(12) LEAN_CASE(15) LEAN_CASE(16)
#undef LEAN_CASE
    default:
      return walk_all<float, 0>(shape, options, seed, scratch, count);
  }
}

LEAN_CLONES static void walk_one(const Shape& shape, const Options& options, const double* seed,
                                 double* scratch, int64_t count) {
  walk_all<double, 0>(shape, options, seed, scratch, count);
}

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

// Walks over the blocks first to last of x; T is what is stored, W what it is computed in.
template <typename T, typename W>
void walk_blocks(const Shape& shape, const Options& options, const T* x, const W* seed,
                             T* out, W* scratch, int64_t first, int64_t last) {
  const int64_t I = shape.preserved, K = shape.reducible, C = I * K, behind = shape.behind;
  const int64_t positions = shape.before * behind;
  W* const y = scratch + C * LANES;
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block * LANES;
    const int64_t count = positions - start < LANES ? positions - start : LANES;
    const int64_t vectors = (count + WIDTH - 1) / WIDTH;
    int64_t read[LANES], written[LANES];  // where the channels of each position begin
    bool plane[LANES / WIDTH];            // whether the positions of a vector lie side by side
    for (int64_t lane = 0; lane < vectors * WIDTH; ++lane) {
      const int64_t at = start + (lane < count ? lane : 0);
      read[lane] = at / behind * C * behind + at % behind;
      written[lane] = at / behind * I * behind + at % behind;
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t end = (v + 1) * WIDTH - 1;
      plane[v] = behind > 1 && end < count && read[end] == read[v * WIDTH] + WIDTH - 1;
    }
    for (int64_t i = 0; i < I; ++i) {
      for (int64_t k = 0; k < K; ++k) {
        const T* const from = x + (options.interleaved ? k * I + i : i * K + k) * behind;
        W* const to = scratch + (i * K + k) * LANES;
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t* const lanes = read + v * WIDTH;
          W* const row = to + v * WIDTH;
          if (plane[v]) {
            for (int lane = 0; lane < WIDTH; ++lane) row[lane] = static_cast<W>(from[lanes[0] + lane]);
          } else {
            for (int lane = 0; lane < WIDTH; ++lane) row[lane] = static_cast<W>(from[lanes[lane]]);
          }
        }
      }
    }
    walk_one(shape, options, seed, scratch, count);
    for (int64_t i = 0; i < I; ++i) {
      T* const to = out + i * behind;
      const W* const from = y + i * LANES;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t* const lanes = written + v * WIDTH;
        if (plane[v]) {
          for (int lane = 0; lane < WIDTH; ++lane)
            to[lanes[0] + lane] = static_cast<T>(from[v * WIDTH + lane]);
        } else {
          for (int lane = 0; lane < WIDTH && v * WIDTH + lane < count; ++lane)
            to[lanes[lane]] = static_cast<T>(from[v * WIDTH + lane]);
        }
      }
    }
  }
}

}  // namespace lean
