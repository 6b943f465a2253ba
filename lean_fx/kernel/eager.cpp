// The walk and its gradient as functions of C, for lean_fx/kernel/eager.py. They return 0, or 1
// where there is no memory. All arrays are contiguous.

#include <algorithm>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "walk.h"

namespace {

using lean::Options;
using lean::Shape;

constexpr int64_t LEAST = 1 << 17;  // values for each thread: to start one costs some 20 us

// As Call in eager.py.
struct Call {
  int64_t before, behind, preserved, reducible;
  int64_t interleaved, nonnegative, scale, threads;
  double damping, norm_floor;

  Shape shape() const { return {before, behind, preserved, reducible, false}; }
  Options options() const {
    Options made;
    made.scale = static_cast<lean::Scale>(scale);
    made.interleaved = interleaved != 0;
    made.nonnegative = nonnegative != 0;
    made.damping = damping;
    made.norm_floor = norm_floor;
    return made;
  }
  int64_t parts() const {
    const int64_t values = before * behind * preserved * reducible;
    return std::max<int64_t>(1, std::min(threads, values / LEAST));
  }
};

// Calls work(part, first, last) for parts of so many blocks, each on a thread of its own.
template <typename Work>
void in_parallel(int64_t blocks, int64_t parts, const Work& work) {
  std::vector<std::thread> started;
  int64_t part = 0;
  try {
    started.reserve(static_cast<size_t>(parts));
    for (; part + 1 < parts; ++part)
      started.emplace_back(work, part, blocks * part / parts, blocks * (part + 1) / parts);
  } catch (const std::system_error&) {  // no more threads: the rest is done here
  } catch (const std::bad_alloc&) {
  }
  for (; part < parts; ++part) work(part, blocks * part / parts, blocks * (part + 1) / parts);
  for (std::thread& thread : started) thread.join();
}

template <typename T>
std::unique_ptr<T[]> zeros(int64_t count) {
  return std::unique_ptr<T[]>(new (std::nothrow) T[static_cast<size_t>(count)]());
}

// The gradients of the blocks first to last: that of x, and what they add to the seed's.
template <typename T>
void gradient_blocks(const Shape& shape, const Options& options, const T* x, const T* seed,
                     const T* grad, T* grad_x, double* grad_seed, T* rows, int64_t first,
                     int64_t last) {
  const lean::GradientRows<T> own(shape, rows);
  Options plain = options;
  plain.scale = lean::Scale::sum;
  plain.for_gradient = true;
  for (int64_t index = first; index < last; ++index) {
    const lean::Block block(shape, index, shape.gradient_rows(options.nonnegative));
    block.read(x, shape.channels(), rows);
    block.read(grad, shape.preserved, own.g.start);
    lean::walk(shape, plain, seed, block, rows);
    lean::gradient(shape, options, seed, block, rows);
    block.write(own.grad_x.start, shape.channels(), grad_x);
    for (int64_t i = 0; i < shape.preserved; ++i) {
      const T* const lanes = (own.gv + i).start;
      for (int64_t lane = 0; lane < block.count; ++lane) grad_seed[i] += lanes[block.lane_at(lane)];
    }
  }
}

template <typename T>
int walk(const Call& call, const T* x, const T* seed, T* out) {
  const Shape shape = call.shape();
  const Options options = call.options();
  const int64_t parts = call.parts(), rows = shape.walk_rows() * lean::LANES;
  const std::unique_ptr<T[]> scratch = zeros<T>(rows * parts);
  if (!scratch) return 1;
  in_parallel(shape.blocks(), parts, [&](int64_t part, int64_t first, int64_t last) {
    lean::walk_blocks(shape, options, x, seed, out, scratch.get() + part * rows, first, last);
  });
  return 0;
}

template <typename T>
int gradient(const Call& call, const T* x, const T* seed, const T* grad, T* grad_x, T* grad_seed) {
  const Shape shape = call.shape();
  const Options options = call.options();
  const int64_t parts = call.parts(), rows = shape.gradient_rows(options.nonnegative) * lean::LANES;
  const int64_t I = shape.preserved;
  const std::unique_ptr<T[]> scratch = zeros<T>(rows * parts);
  const std::unique_ptr<double[]> sums = zeros<double>(I * parts);
  if (!scratch || !sums) return 1;
  in_parallel(shape.blocks(), parts, [&](int64_t part, int64_t first, int64_t last) {
    gradient_blocks(shape, options, x, seed, grad, grad_x, sums.get() + part * I,
                    scratch.get() + part * rows, first, last);
  });
  for (int64_t i = 0; i < I; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[static_cast<size_t>(part * I + i)];
    grad_seed[i] = static_cast<T>(sum);
  }
  return 0;
}

}  // namespace

LEAN_EXPORT int lean_walk_float32(const Call* call, const float* x, const float* seed, float* out) {
  return walk(*call, x, seed, out);
}
LEAN_EXPORT int lean_walk_float64(const Call* call, const double* x, const double* seed,
                                  double* out) {
  return walk(*call, x, seed, out);
}
LEAN_EXPORT int lean_gradient_float32(const Call* call, const float* x, const float* seed,
                                      const float* grad, float* grad_x, float* grad_seed) {
  return gradient(*call, x, seed, grad, grad_x, grad_seed);
}
LEAN_EXPORT int lean_gradient_float64(const Call* call, const double* x, const double* seed,
                                      const double* grad, double* grad_x, double* grad_seed) {
  return gradient(*call, x, seed, grad, grad_x, grad_seed);
}
