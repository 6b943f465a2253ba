// Reductions over blocks of positions: LEAN's walk, as lean_fx/reduction/functional.py defines it,
// the forms of lean_fx/reduction/conditioned.py, and the gradient of the walk's default form.

#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(_WIN32)
#define LEAN_EXPORT extern "C" __declspec(dllexport)
#else
#define LEAN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace lean {

enum class Normalize { column, row, none };
enum class Scale { sum, mean, magnitude };  // in the order of Scale in options.py

struct Options {
  Normalize normalize = Normalize::column;
  Scale scale = Scale::sum;
  bool interleaved = false;
  bool nonnegative = false;
  int64_t iterations = 1;
  double damping = 0;
  double norm_floor = 0;
};

// Positions of a block, which is read and written at once: two cache lines of each channel, as
// many as the hardware fetches together.
constexpr int LANES = 32;

// Rows whose affinities are made at once, at most.
constexpr int MOST_ROWS = 4;

struct Shape {
  int64_t before;     // positions in front of the channels: x is [before, preserved * reducible,
  int64_t behind;     // behind]
  int64_t preserved;  // I
  int64_t reducible;  // K
  bool matrix;        // whether the seed has a value for each channel
  int64_t channels() const { return preserved * reducible; }
  int64_t blocks() const { return (before * behind + LANES - 1) / LANES; }
  // Rows that each vector needs, x first and y behind it: of the forms of conditioned.py, of the
  // walk, and of its gradient.
  int64_t form_rows() const { return channels() + preserved + reducible; }
  int64_t walk_rows() const { return channels() + 2 * (preserved + reducible) + 1; }
  int64_t gradient_rows() const {
    return walk_rows() + 4 * preserved + 2 * reducible + channels();
  }
  // Rows for the affinities of values of any sign and one group's weights; all vectors share them.
  int64_t affinity_rows() const {
    return preserved * (preserved + MOST_ROWS) / 2 + MOST_ROWS * preserved;
  }
};

// Memory for rows, of zeros, where cache lines begin.
constexpr int LINE = 64;

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : start_(new (std::align_val_t{LINE}, std::nothrow) T[static_cast<size_t>(count)]()) {}
  ~Scratch() { ::operator delete[](start_, std::align_val_t{LINE}); }
  Scratch(const Scratch&) = delete;
  T* get() const { return start_; }  // nullptr where there is no memory

 private:
  T* start_;
};

// Forms of a reduction, computed in W.
template <typename W>
struct Walk {
  Options options;
  const W* seed;

  static int64_t rows(const Shape& shape) { return shape.walk_rows(); }
  template <typename L>
  void reduce(const Shape& shape, W* rows) const;
};

template <typename W>
struct Simplex {
  const W* v;

  static int64_t rows(const Shape& shape) { return shape.form_rows(); }
  template <typename L>
  void reduce(const Shape& shape, W* rows) const;
};

template <typename W>
struct Gated {
  const W *weight, *gate;

  static int64_t rows(const Shape& shape) { return shape.form_rows(); }
  template <typename L>
  void reduce(const Shape& shape, W* rows) const;
};

// Reduces the blocks first to last of x, in scratch of form.rows() * LANES numbers; T is what is
// stored.
template <typename T, typename W, template <typename> class Form>
struct Pass {
  Shape shape;
  Form<W> form;
  const T* x;
  T* out;
  W* scratch;
  int64_t first, last;

  void run() const;
  template <typename Set>
  void on() const;  // with an instruction set
};

// The gradient of the default form over the blocks first to last, in scratch of numbers(): that of
// x, and what these blocks add to the seed's.
template <typename T>
struct Gradient {
  Shape shape;
  Options options;
  const T *x, *seed, *grad;
  T* grad_x;
  double* grad_seed;
  T* scratch;
  int64_t first, last;

  static int64_t numbers(const Shape& shape, bool nonnegative) {
    return (shape.gradient_rows() + (nonnegative ? 0 : shape.affinity_rows())) * LANES;
  }
  void run() const;
  template <typename Set>
  void on() const;  // with an instruction set
};

}  // namespace lean
