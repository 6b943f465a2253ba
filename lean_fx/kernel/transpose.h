// The transpose of a square of numbers, as many vectors as a vector has lanes.

#pragma once

#include <utility>

#include "lanes.h"

namespace lean {

#if !defined(__has_builtin)
#define __has_builtin(NAME) 0
#endif

#if __has_builtin(__builtin_shufflevector)

// Swaps the right upper quarter of each square of 2 * SIZE rows with its left lower one.
template <typename L, int SIZE, std::size_t... LANE>
LEAN_INLINE void swap_quarters(Vector<L>* rows, std::index_sequence<LANE...>) {
  constexpr int W = L::WIDTH;
  for (int i = 0; i < W; ++i) {
    if (i & SIZE) continue;
    const Vector<L> a = rows[i], b = rows[i + SIZE];
    rows[i] = __builtin_shufflevector(a, b, (LANE & SIZE ? W + LANE - SIZE : LANE)...);
    rows[i + SIZE] = __builtin_shufflevector(a, b, (LANE & SIZE ? W + LANE : LANE + SIZE)...);
  }
}

template <typename L, int SIZE = L::WIDTH / 2>
LEAN_INLINE void transpose(Vector<L>* rows) {
  swap_quarters<L, SIZE>(rows, std::make_index_sequence<L::WIDTH>());
  if constexpr (SIZE > 1) transpose<L, SIZE / 2>(rows);
}

#else

template <typename L>
LEAN_INLINE void transpose(Vector<L>* rows) {
  for (int i = 0; i < L::WIDTH; ++i) {
    for (int k = 0; k < i; ++k) {
      const Number<L> number = rows[i][k];
      rows[i][k] = rows[k][i];
      rows[k][i] = number;
    }
  }
}

#endif

}  // namespace lean
