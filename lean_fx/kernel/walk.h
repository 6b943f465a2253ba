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
};

struct Shape {
  int64_t before;     // positions in front of the channels: x is [before, preserved * reducible,
  int64_t behind;     // behind]
  int64_t preserved;  // I
  int64_t reducible;  // K
  bool matrix;        // whether the seed has a value for each channel
  int64_t channels() const { return preserved * reducible; }
  int64_t blocks() const { return (before * behind + LANES - 1) / LANES; }
  // The rows of a block that a walk works in, and that its gradient does.
  int64_t walk_rows() const { return channels() + 2 * preserved + 2 * reducible + 1; }
  int64_t gradient_rows() const {
    return walk_rows() + 4 * preserved + 2 * reducible + channels();
  }
};

// The rows of a block that a walk works in; y lies behind x.
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
  Rows<T> g, gy, gv, gd, gu, gt, grad_x;
  GradientRows(const Shape& shape, T* start)
      : g{start + shape.walk_rows() * LANES},
        gy{g + shape.preserved},
        gv{gy + shape.preserved},
        gd{gv + shape.preserved},
        gu{gd + shape.preserved},
        gt{gu + shape.reducible},
        grad_x{gt + shape.reducible} {}
};

// Walks over the first count positions of a block whose x is in its rows.
template <typename T>
void walk(const Shape& shape, const Options& options, const T* seed, T* rows, int64_t count);

// The gradient, once they have been walked with the scale of a sum.
template <typename T>
void gradient(const Shape& shape, const Options& options, const T* seed, T* rows, int64_t count);

// The positions of a block, and how their channels are copied to rows of LANES and back.
struct Block {
  int64_t start, count, behind;
  bool in_a_row;  // no position lies in another image than the first

  Block(const Shape& shape, int64_t index) : start(index * LANES), behind(shape.behind) {
    const int64_t left = shape.before * behind - start;
    count = left < LANES ? left : LANES;
    in_a_row = start % behind + count <= behind;
  }
  // Where a position begins in an array of so many channels.
  LEAN_INLINE int64_t at(int64_t lane, int64_t channels) const {
    const int64_t position = start + lane;
    return position / behind * channels * behind + position % behind;
  }
  // How many positions from this one on lie in the same image.
  LEAN_INLINE int64_t run_from(int64_t lane) const {
    const int64_t in_image = behind - (start + lane) % behind, left = count - lane;
    return left < in_image ? left : in_image;
  }
  template <typename T, typename W>
  LEAN_INLINE void read(const T* __restrict x, int64_t channels, W* __restrict rows) const {
    if (in_a_row && count == LANES) {
      const T* from = x + at(0, channels);
      for (int64_t c = 0; c < channels; ++c, from += behind) {
        __builtin_prefetch(from + 2 * LANES);  // the hardware follows fewer streams
        for (int lane = 0; lane < LANES; ++lane)
          rows[c * LANES + lane] = static_cast<W>(from[lane]);
      }
    } else {
      for (int64_t lane = 0, run; lane < count; lane += run) {
        run = run_from(lane);
        const T* from = x + at(lane, channels);
        for (int64_t c = 0; c < channels; ++c, from += behind)
          for (int64_t next = 0; next < run; ++next)
            rows[c * LANES + lane + next] = static_cast<W>(from[next]);
      }
    }
  }
  template <typename T, typename W>
  LEAN_INLINE void write(const W* __restrict rows, int64_t channels, T* __restrict out) const {
    if (in_a_row && count == LANES) {
      T* to = out + at(0, channels);
      for (int64_t c = 0; c < channels; ++c, to += behind)
        for (int lane = 0; lane < LANES; ++lane)
          to[lane] = static_cast<T>(rows[c * LANES + lane]);
    } else {
      for (int64_t lane = 0, run; lane < count; lane += run) {
        run = run_from(lane);
        T* to = out + at(lane, channels);
        for (int64_t c = 0; c < channels; ++c, to += behind)
          for (int64_t next = 0; next < run; ++next)
            to[next] = static_cast<T>(rows[c * LANES + lane + next]);
      }
    }
  }
};

// Walks over the blocks first to last of x; T is what is stored, W what it is computed in.
template <typename T, typename W>
void walk_blocks(const Shape& shape, const Options& options, const T* x, const W* seed, T* out,
                 W* rows, int64_t first, int64_t last) {
  for (int64_t index = first; index < last; ++index) {
    const Block block(shape, index);
    block.read(x, shape.channels(), rows);
    walk(shape, options, seed, rows, block.count);
    block.write(WalkRows<W>(shape, rows).y.start, shape.preserved, out);
  }
}

}  // namespace lean
