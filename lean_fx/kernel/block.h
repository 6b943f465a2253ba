// The positions of a block, and how their channels are copied to the rows of its vectors and back.

#pragma once

#include "lanes.h"
#include "transpose.h"
#include "walk.h"

namespace lean {

template <typename L>
struct Block {
  int64_t start, count, behind;
  int64_t apart;  // numbers from the rows of a vector to those of the next

  LEAN_INLINE Block(const Shape& shape, int64_t index, int64_t rows)
      : start(index * LANES), behind(shape.behind), apart(rows * L::WIDTH) {
    const int64_t left = shape.before * behind - start;
    count = left < LANES ? left : LANES;
  }

  LEAN_INLINE int64_t vectors() const { return (count + L::WIDTH - 1) / L::WIDTH; }

  // Where a position lies in the rows.
  LEAN_INLINE int64_t lane_at(int64_t lane) const {
    return lane / L::WIDTH * apart + lane % L::WIDTH;
  }

  template <typename T, typename W>
  LEAN_INLINE void read(const T* x, int64_t channels, W* rows) const {
    copy<Read>(x, channels, rows);
  }
  template <typename T, typename W>
  LEAN_INLINE void write(W* rows, int64_t channels, T* out) const {
    copy<Write>(out, channels, rows);
  }

 private:
  struct Read {
    static constexpr bool WRITES = false;
    // To the second cache: the places of many channels in the first one may be the same.
    static LEAN_INLINE void fetch(const void* stored) { __builtin_prefetch(stored, 0, 2); }
    template <typename T, typename W>
    static LEAN_INLINE void number(const T& stored, W& row) {
      row = static_cast<W>(stored);
    }
  };
  struct Write {
    static constexpr bool WRITES = true;
    static LEAN_INLINE void fetch(const void* stored) { __builtin_prefetch(stored, 1); }
    template <typename T, typename W>
    static LEAN_INLINE void number(T& stored, const W& row) {
      stored = static_cast<T>(row);
    }
  };

  // Where a position begins in an array of so many channels.
  LEAN_INLINE int64_t at(int64_t lane, int64_t channels) const {
    const int64_t position = start + lane;
    return position / behind * channels * behind + position % behind;
  }
  // Whether so many positions are there and lie side by side in an array.
  LEAN_INLINE bool in_a_row(int64_t lane, int64_t length) const {
    return lane + length <= count && (start + lane) % behind + length <= behind;
  }

  template <typename Copy, typename T, typename W>
  LEAN_INLINE void copy(T* stored, int64_t channels, W* rows) const {
    if (in_a_row(0, LANES)) {
      copy_whole<Copy>(stored + at(0, channels), channels, rows);
      return;
    }
    for (int64_t lane = 0; lane < count; lane += L::WIDTH, rows += apart) {
      if (in_a_row(lane, L::WIDTH)) {
        copy_vector<Copy>(stored + at(lane, channels), channels, rows);
      } else if (behind == 1 && lane + L::WIDTH <= count) {
        copy_squares<Copy>(stored + at(lane, channels), channels, rows);
      } else {
        copy_numbers<Copy>(stored, lane, channels, rows);
      }
    }
  }

  // Meanwhile the next block is fetched: the hardware follows fewer streams than channels.
  template <typename Copy, typename T, typename W>
  LEAN_INLINE void copy_whole(T* __restrict stored, int64_t channels, W* __restrict rows) const {
    for (int64_t c = 0; c < channels; ++c, stored += behind, rows += L::WIDTH) {
      for (int line = 0; line < LANES; line += LINE / sizeof(T))
        Copy::fetch(stored + LANES + line);
      for (int vector = 0; vector < LANES / L::WIDTH; ++vector)
        for (int lane = 0; lane < L::WIDTH; ++lane)
          Copy::number(stored[vector * L::WIDTH + lane], rows[vector * apart + lane]);
    }
  }

  template <typename Copy, typename T, typename W>
  LEAN_INLINE void copy_vector(T* __restrict stored, int64_t channels, W* __restrict rows) const {
    for (int64_t c = 0; c < channels; ++c, stored += behind, rows += L::WIDTH) {
      Copy::fetch(stored + LANES);
      for (int lane = 0; lane < L::WIDTH; ++lane) Copy::number(stored[lane], rows[lane]);
    }
  }

  // Of positions whose channels lie side by side.
  template <typename Copy, typename T, typename W>
  LEAN_INLINE void copy_squares(T* __restrict stored, int64_t channels, W* __restrict rows) const {
    constexpr int N = L::WIDTH;
    int64_t c = 0;
    for (; c + N <= channels; c += N, rows += N * N) {
      Vector<L> square[N];
      W* const numbers = reinterpret_cast<W*>(square);
      if (Copy::WRITES) {
        for (int i = 0; i < N; ++i) square[i] = *reinterpret_cast<Vector<L>*>(rows + i * N);
        transpose<L>(square);
      }
      for (int lane = 0; lane < N; ++lane) {
        if (Copy::WRITES) Copy::fetch(stored + (lane + N) * channels + c);
        for (int i = 0; i < N; ++i)
          Copy::number(stored[lane * channels + c + i], numbers[lane * N + i]);
      }
      if (!Copy::WRITES) {
        transpose<L>(square);
        for (int i = 0; i < N; ++i) *reinterpret_cast<Vector<L>*>(rows + i * N) = square[i];
      }
    }
    for (; c < channels; ++c, rows += N)
      for (int lane = 0; lane < N; ++lane) Copy::number(stored[lane * channels + c], rows[lane]);
  }

  template <typename Copy, typename T, typename W>
  LEAN_INLINE void copy_numbers(T* __restrict stored, int64_t first, int64_t channels,
                                W* __restrict rows) const {
    const int64_t length = count - first < L::WIDTH ? count - first : L::WIDTH;
    int64_t starts[L::WIDTH];
    for (int64_t lane = 0; lane < length; ++lane) starts[lane] = at(first + lane, channels);
    for (int64_t c = 0; c < channels; ++c, stored += behind, rows += L::WIDTH)
      for (int64_t lane = 0; lane < length; ++lane) Copy::number(stored[starts[lane]], rows[lane]);
  }
};

}  // namespace lean
