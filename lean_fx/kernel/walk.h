// LEAN's walk over blocks of positions, as lean_fx/reduction/functional.py defines it, and the
// gradient of its default form.

#pragma once

#include "halves.h"
#include "lanes.h"

#if defined(_WIN32)
#define LEAN_EXPORT extern "C" __declspec(dllexport)
#else
#define LEAN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace lean {

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
  bool for_gradient = false;  // whether the walk leaves the affinities to the gradient
};

// Positions of a block, which is read and written at once: a cache line of each channel.
constexpr int LANES = 2 * WIDTH;

struct Shape {
  int64_t before;     // positions in front of the channels: x is [before, preserved * reducible,
  int64_t behind;     // behind]
  int64_t preserved;  // I
  int64_t reducible;  // K
  bool matrix;        // whether the seed has a value for each channel
  int64_t channels() const { return preserved * reducible; }
  int64_t blocks() const { return (before * behind + LANES - 1) / LANES; }
  // The rows of a vector that a walk works in, and that its gradient does.
  int64_t walk_rows() const { return channels() + 2 * preserved + 2 * reducible + 1; }
  int64_t gradient_rows(bool nonnegative) const {
    const int64_t affinities = nonnegative ? 0 : preserved * (preserved + 1) / 2;
    return walk_rows() + 4 * preserved + 2 * reducible + channels() + affinities;
  }
};

// The rows of a vector that a walk works in; y lies behind x.
template <typename T>
struct WalkRows {
  Rows<T> x, y, d, t, u, inverse;
  WalkRows(const Shape& shape, T* start)
      : x{start},
        y{x + shape.channels()},
        d{y + shape.preserved},
        t{d + shape.preserved},
        u{t + shape.reducible},
        inverse{u + shape.reducible} {}
};

// Those that the gradient works in besides: g arrives, grad_x and gv leave.
template <typename T>
struct GradientRows {
  Rows<T> g, gy, gv, gd, gu, gt, grad_x, affinities;
  GradientRows(const Shape& shape, T* start)
      : g{start + shape.walk_rows() * WIDTH},
        gy{g + shape.preserved},
        gv{gy + shape.preserved},
        gd{gv + shape.preserved},
        gu{gd + shape.preserved},
        gt{gu + shape.reducible},
        grad_x{gt + shape.reducible},
        affinities{grad_x + shape.channels()} {}
};

// The positions of a block, and how their channels are copied to the rows of its vectors and back.
struct Block {
  int64_t start, count, behind;
  int64_t apart;  // numbers from the rows of a vector to those of the next
  bool in_a_row;  // no position lies in another image than the first

  Block(const Shape& shape, int64_t index, int64_t rows)
      : start(index * LANES), behind(shape.behind), apart(rows * WIDTH) {
    const int64_t left = shape.before * behind - start;
    count = left < LANES ? left : LANES;
    in_a_row = start % behind + count <= behind;
  }
  // Where a position begins in an array of so many channels.
  LEAN_INLINE int64_t at(int64_t lane, int64_t channels) const {
    const int64_t position = start + lane;
    return position / behind * channels * behind + position % behind;
  }
  // Where a position lies in the rows.
  LEAN_INLINE int64_t lane_at(int64_t lane) const { return lane / WIDTH * apart + lane % WIDTH; }
  template <typename T, typename W>
  LEAN_INLINE void read(const T* __restrict x, int64_t channels, W* __restrict rows) const {
    if (in_a_row && count == LANES) {
      const T* from = x + at(0, channels);
      for (int64_t c = 0; c < channels; ++c, from += behind) {
        __builtin_prefetch(from + 2 * LANES);  // the hardware follows fewer streams
        for (int lane = 0; lane < LANES; ++lane)
          rows[c * WIDTH + lane_at(lane)] = static_cast<W>(from[lane]);
      }
    } else {
      int64_t from[LANES];
      for (int64_t lane = 0; lane < count; ++lane) from[lane] = at(lane, channels);
      for (int64_t c = 0; c < channels; ++c, x += behind)
        for (int64_t lane = 0; lane < count; ++lane)
          rows[c * WIDTH + lane_at(lane)] = static_cast<W>(x[from[lane]]);
    }
  }
  template <typename T, typename W>
  LEAN_INLINE void write(const W* __restrict rows, int64_t channels, T* __restrict out) const {
    if (in_a_row && count == LANES) {
      T* to = out + at(0, channels);
      for (int64_t c = 0; c < channels; ++c, to += behind)
        for (int lane = 0; lane < LANES; ++lane)
          to[lane] = static_cast<T>(rows[c * WIDTH + lane_at(lane)]);
    } else {
      for (int64_t lane = 0; lane < count; ++lane) {
        T* const to = out + at(lane, channels);
        for (int64_t c = 0; c < channels; ++c)
          to[c * behind] = static_cast<T>(rows[c * WIDTH + lane_at(lane)]);
      }
    }
  }
};

// Walks over the positions of a block whose x is in its rows.
template <typename T>
void walk(const Shape& shape, const Options& options, const T* seed, const Block& block, T* rows);

// The gradient, once they have been walked with the scale of a sum.
template <typename T>
void gradient(const Shape& shape, const Options& options, const T* seed, const Block& block,
              T* rows);

// Walks over the blocks first to last of x; T is what is stored, W what it is computed in.
template <typename T, typename W>
void walk_blocks(const Shape& shape, const Options& options, const T* x, const W* seed, T* out,
                 W* rows, int64_t first, int64_t last) {
  for (int64_t index = first; index < last; ++index) {
    const Block block(shape, index, shape.walk_rows());
    block.read(x, shape.channels(), rows);
    walk(shape, options, seed, block, rows);
    block.write(WalkRows<W>(shape, rows).y.start, shape.preserved, out);
  }
}

}  // namespace lean
