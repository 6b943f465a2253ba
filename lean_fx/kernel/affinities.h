// Sums of the affinities of the rows of X, G[i,j] = <X_i, X_j> = G[j,i], and their gradient.

#pragma once

#include "products.h"

namespace lean {

// A group of rows, as many as leave registers for a tile, is multiplied by itself and by all rows
// behind it. Within the group each affinity is made twice, once for each of its rows; behind the
// group it is made once, and added to both. Rows left over at the end are multiplied one by one,
// each by all of those left.
template <typename L>
constexpr int GROUP = L::Set::BYTES == 64 ? MOST_ROWS : 2;

// Where the affinities of a group are kept, from its first row i on: row after row behind those of
// the groups before. Where none are kept, every row is the null pointer.
template <typename L>
LEAN_INLINE Matrix<L> affinities_from(int64_t i, int64_t I, Rows<L> affinities) {
  const int64_t width = I - i, height = width < GROUP<L> ? width : GROUP<L>;
  if (affinities.start == nullptr) return {nullptr, height, width, 0, 1};
  return {(affinities + i * (I + I - i + GROUP<L>) / 2).start, height, width, width, 1};
}

// Adds |G[i,j]| to the sums of its rows, and keeps G[i,j] for a gradient.
template <typename L>
struct Summed {
  Rows<L> d;          // from the first row j on
  int64_t own;        // where the rows i begin there
  int64_t group_end;  // where the rows j begin that get their share too
  Matrix<L> affinities;
  bool kept;

  template <int HEIGHT, int ROWS>
  LEAN_INLINE void take(int64_t first, const Vector<L> (&sums)[HEIGHT][ROWS]) const {
    if (kept)
      for (int c = 0; c < ROWS; ++c)
        for (int i = 0; i < HEIGHT; ++i) affinities.row(c)[first + i] = sums[i][c];
    Vector<L> of_own[ROWS] = {};
    for (int i = 0; i < HEIGHT; ++i) {
      Vector<L> of_other = Vector<L>{};
      for (int c = 0; c < ROWS; ++c) {
        const Vector<L> affinity = absolute<L>(sums[i][c]);
        of_own[c] += affinity;
        of_other += affinity;
      }
      if (first + i >= group_end) d[first + i] += of_other;
    }
    for (int c = 0; c < ROWS; ++c) d[own + c] += of_own[c];
  }
};

// Adds products to the rows of a matrix.
template <typename L>
struct Added {
  Matrix<L> out;
  template <int HEIGHT, int ROWS>
  LEAN_INLINE void take(int64_t first, const Vector<L> (&sums)[HEIGHT][ROWS]) const {
    for (int c = 0; c < ROWS; ++c)
      for (int i = 0; i < HEIGHT; ++i) out.row(c)[first + i] += sums[i][c];
  }
};

// d[i] = sum_j |G[i,j]|. Keeps the affinities if there is a place for them.
template <typename L>
LEAN_INLINE void affinity_sums(const Matrix<L>& X, Rows<L> d, Rows<L> affinities) {
  constexpr int ROWS = GROUP<L>;
  const bool kept = affinities.start != nullptr;
  for (int64_t i = 0; i < X.height; ++i) d[i] = Vector<L>{};
  for (int64_t first = 0; first < X.height; first += ROWS) {
    const Matrix<L> rows = X.below(first), G = affinities_from(first, X.height, affinities);
    if (G.height == ROWS) {
      L::Set::run(Product<L, ROWS, Summed<L>>{rows, rows, {d + first, 0, ROWS, G, kept}});
      continue;
    }
    for (int64_t c = 0; c < G.height; ++c)
      L::Set::run(
          Product<L, 1, Summed<L>>{rows, rows.below(c), {d + first, c, G.width, G.below(c), kept}});
  }
}

// grad_X[i] += sum_j w[i,j] X[j], w[i,j] = sign(G[i,j]) (gd[i] + gd[j]) = w[j,i], which takes the
// place of G[i,j].
template <typename L>
LEAN_INLINE void add_through_affinities(const Matrix<L>& X, Rows<L> gd, Rows<L> affinities,
                                        const Matrix<L>& grad_X) {
  const int64_t I = X.height;
  const Rows<L> weights = affinities + I * (I + MOST_ROWS) / 2;
  for (int64_t first = 0; first < I; first += GROUP<L>) {
    const Matrix<L> G = affinities_from(first, I, affinities);
    const Matrix<L> own = {weights.start, G.height, I, I, 1};
    for (int64_t before = 0; before < first; before += GROUP<L>) {
      const Matrix<L> known = affinities_from(before, I, affinities);
      for (int64_t i = 0; i < G.height; ++i)
        for (int64_t j = 0; j < GROUP<L>; ++j)
          own.row(i)[before + j] = known.row(j)[first - before + i];
    }
    for (int64_t i = 0; i < G.height; ++i)
      for (int64_t j = 0; j < G.width; ++j)
        G.row(i)[j] = own.row(i)[first + j] =
            signed_as<L>(G.row(i)[j], gd[first + i] + gd[first + j]);
    const Matrix<L> grad = grad_X.below(first);
    if (G.height == GROUP<L>) {
      L::Set::run(Product<L, GROUP<L>, Added<L>>{X.transposed(), own, {grad}});
      continue;
    }
    for (int64_t c = 0; c < G.height; ++c)
      L::Set::run(Product<L, 1, Added<L>>{X.transposed(), own.below(c), {grad.below(c)}});
  }
}

}  // namespace lean
