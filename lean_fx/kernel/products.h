// Products of matrices of vectors, position by position.

#pragma once

#include "lanes.h"
#include "walk.h"

namespace lean {

// Takes sum_k A(j, k) B(c, k), where B has so many rows, to a sink, tile by tile.
template <typename L, int ROWS, typename Sink>
struct Product {
  static constexpr int TALLEST = ROWS == 1 ? 8 : 4;  // tile that the registers hold
  Matrix<L> A, B;
  Sink sink;

  template <typename>
  LEAN_INLINE void on() const {
    int64_t first = 0;
    for (int64_t tiles = (A.height + TALLEST - 1) / TALLEST; tiles > 0; --tiles) {
      const int64_t height = (A.height - first + tiles - 1) / tiles;  // they are almost equal
      tile_of<TALLEST>(height, first);
      first += height;
    }
  }

 private:
  template <int HEIGHT>
  LEAN_INLINE void tile_of(int64_t height, int64_t first) const {
    if (height == HEIGHT) {
      tile<HEIGHT>(first);
    } else if constexpr (HEIGHT > 1) {
      tile_of<HEIGHT - 1>(height, first);
    }
  }

  // Of HEIGHT rows of A. Their sums stay in registers.
  template <int HEIGHT>
  LEAN_INLINE void tile(int64_t first) const {
    const Matrix<L> rows = A.below(first);
    Vector<L> sums[HEIGHT][ROWS] = {};
    for (int64_t k = 0; k < A.width; ++k) {
      for (int i = 0; i < HEIGHT; ++i) {
        const Vector<L> x = rows.row(i)[k];
        for (int c = 0; c < ROWS; ++c) sums[i][c] += x * B.row(c)[k];
      }
    }
    sink.take(first, sums);
  }
};

template <typename L>
struct Stored {
  Rows<L> out;
  template <int HEIGHT>
  LEAN_INLINE void take(int64_t first, const Vector<L> (&sums)[HEIGHT][1]) const {
    for (int i = 0; i < HEIGHT; ++i) out[first + i] = sums[i][0];
  }
};

// out = A v. A product is a function of its own, as it is long and has many callers.
template <typename L>
LEAN_INLINE void multiply(const Matrix<L>& A, Rows<L> v, Rows<L> out) {
  const Matrix<L> row = {v.start, 1, A.width, 0, v.apart};
  L::Set::run(Product<L, 1, Stored<L>>{A, row, {out}});
}

}  // namespace lean
