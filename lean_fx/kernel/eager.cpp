// The walk and its gradient as functions of C, for lean_fx/reduction/library.py. They return 0, or 1
// where there is no memory. All arrays are contiguous.

#include <algorithm>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "walk.h"

namespace {

using lean::Options;
using lean::Shape;

constexpr int64_t LEAST = 1 << 17;  // values for each thread: to start one costs some 20 us

// As _Call in lean_fx/reduction/library.py.
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
int walk(const Call& call, const T* x, const T* seed, T* out) {
  const Shape shape = call.shape();
  const Options options = call.options();
  const int64_t parts = call.parts(), numbers = shape.walk_rows() * lean::LANES;
  const lean::Scratch<T> scratch(numbers * parts);
  if (scratch.get() == nullptr) return 1;
  in_parallel(shape.blocks(), parts, [&](int64_t part, int64_t first, int64_t last) {
    T* const own = scratch.get() + part * numbers;
    lean::Pass<T, T, lean::Walk>{shape, {options, seed}, x, out, own, first, last}.run();
  });
  return 0;
}

template <typename T>
int gradient(const Call& call, const T* x, const T* seed, const T* grad, T* grad_x, T* grad_seed) {
  const Shape shape = call.shape();
  const Options options = call.options();
  const int64_t parts = call.parts(), I = shape.preserved;
  const int64_t numbers = lean::Gradient<T>::numbers(shape, options.nonnegative);
  const lean::Scratch<T> scratch(numbers * parts);
  const lean::Scratch<double> sums(I * parts);
  if (scratch.get() == nullptr || sums.get() == nullptr) return 1;
  in_parallel(shape.blocks(), parts, [&](int64_t part, int64_t first, int64_t last) {
    T* const own = scratch.get() + part * numbers;
    double* const own_sums = sums.get() + part * I;
    lean::Gradient<T>{shape, options, x, seed, grad, grad_x, own_sums, own, first, last}.run();
  });
  for (int64_t i = 0; i < I; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums.get()[part * I + i];
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
