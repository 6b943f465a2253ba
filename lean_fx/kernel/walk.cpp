// The walk and its gradient, over the rows of a block. lean_fx/reduction/walk.py has the formulas.

#include "walk.h"

#include "affinities.h"
#include "pass.h"

namespace lean {
namespace {

// The rows of a vector that a walk works in; y lies behind x.
template <typename L>
struct WalkRows {
  Rows<L> x, y, d, t, u, inverse;
  LEAN_INLINE WalkRows(const Shape& shape, Number<L>* start)
      : x{start},
        y{x + shape.channels()},
        d{y + shape.preserved},
        t{d + shape.preserved},
        u{t + shape.reducible},
        inverse{u + shape.reducible} {}
};

// Those that the gradient works in besides: g arrives, grad_x and gv leave.
template <typename L>
struct GradientRows {
  Rows<L> g, gy, gv, gd, gu, gt, grad_x;
  LEAN_INLINE GradientRows(const Shape& shape, Number<L>* start)
      : g{start + shape.walk_rows() * L::WIDTH},
        gy{g + shape.preserved},
        gv{gy + shape.preserved},
        gd{gv + shape.preserved},
        gu{gd + shape.preserved},
        gt{gu + shape.reducible},
        grad_x{gt + shape.reducible} {}
};

// d += damping mean_i d[i], as in the sums of the walk so in their gradient.
template <typename L>
LEAN_INLINE void damp(Rows<L> d, int64_t I, double damping) {
  if (damping == 0) return;  // infinite sums times 0 are not 0
  Vector<L> sum = d[0];
  for (int64_t i = 1; i < I; ++i) sum += d[i];
  sum *= static_cast<Number<L>>(damping / static_cast<double>(I));
  for (int64_t i = 0; i < I; ++i) d[i] += sum;
}

template <typename L>
LEAN_INLINE Vector<L> mean_magnitude(Rows<L> x, int64_t channels) {
  Vector<L> sum = absolute<L>(x[0]);
  for (int64_t c = 1; c < channels; ++c) sum += absolute<L>(x[c]);
  return sum / static_cast<Number<L>>(channels);
}

template <typename L>
LEAN_INLINE Matrix<L> as_matrix(const Shape& shape, const Options& options, Rows<L> x) {
  const int64_t I = shape.preserved, K = shape.reducible;
  if (options.interleaved) return {x.start, I, K, 1, I};
  return {x.start, I, K, K, 1};
}

template <typename L>
LEAN_INLINE void walk_vector(const Shape& shape, const Options& options, const Number<L>* seed,
                             Number<L>* start, Rows<L> affinities = {nullptr}) {
  const auto [x, y, d, t, u, inverse] = WalkRows<L>(shape, start);
  const int64_t I = shape.preserved, K = shape.reducible;
  const Matrix<L> X = as_matrix(shape, options, x);
  const bool column = options.normalize == Normalize::column;

  if (options.normalize != Normalize::none) {
    if (options.nonnegative) {  // sum_j |<X_i, X_j>| = <X_i, sum_j X_j>
      inverse[0] = all<L>(1);
      multiply(X.transposed(), {inverse.start, 0}, t);
      multiply(X, t, d);
    } else {
      affinity_sums(X, d, affinities);
    }
    damp(d, I, options.damping);
    for (int64_t i = 0; i < I; ++i) d[i] = without_zeros<L>(d[i]);
  }
  for (int64_t step = 0; step < options.iterations; ++step) {
    if (shape.matrix && step == 0) {
      for (int64_t k = 0; k < K; ++k) u[k] = Vector<L>{};
      for (int64_t i = 0; i < I; ++i) {
        for (int64_t k = 0; k < K; ++k) {
          const Vector<L> v = all<L>(seed[i * K + k]);
          u[k] += X.row(i)[k] * (column ? v / d[i] : v);
        }
      }
    } else {
      for (int64_t i = 0; i < I; ++i) {
        const Vector<L> v = step == 0 ? all<L>(seed[i]) : y[i];
        y[i] = column ? v / d[i] : v;
      }
      multiply(X.transposed(), y, u);
    }
    multiply(X, u, y);
    Vector<L> norm = all<L>(static_cast<Number<L>>(options.norm_floor));
    for (int64_t i = 0; i < I; ++i) {
      if (options.normalize == Normalize::row) y[i] /= d[i];
      norm += absolute<L>(y[i]);
    }
    inverse[0] = 1 / without_zeros<L>(norm);
    for (int64_t i = 0; i < I; ++i) y[i] *= inverse[0];
  }
  if (options.scale == Scale::sum) return;
  Vector<L> factor = all<L>(static_cast<Number<L>>(I));
  if (options.scale == Scale::magnitude) factor *= mean_magnitude<L>(x, shape.channels());
  for (int64_t i = 0; i < I; ++i) y[i] *= factor;
}

template <typename L>
LEAN_INLINE void gradient_vector(const Shape& shape, const Options& options, const Number<L>* seed,
                                 Number<L>* start, Rows<L> affinities) {
  const auto [x, y, d, t, u, inverse] = WalkRows<L>(shape, start);
  const auto [g, gy, gv, gd, gu, gt, grad_x] = GradientRows<L>(shape, start);
  const int64_t I = shape.preserved, K = shape.reducible, C = shape.channels();
  const Matrix<L> X = as_matrix(shape, options, x), grad_X = as_matrix(shape, options, grad_x);

  // The output is y times C' and, it may be, times the mean magnitude of X.
  Vector<L> along = Vector<L>{}, to_magnitude = Vector<L>{};
  for (int64_t i = 0; i < I; ++i) along += g[i] * y[i];
  Vector<L> factor = all<L>(options.scale == Scale::sum ? 1 : static_cast<Number<L>>(I));
  if (options.scale == Scale::magnitude) {
    to_magnitude = along * factor / static_cast<Number<L>>(C);
    factor *= mean_magnitude<L>(x, C);
  }
  factor *= inverse[0];
  for (int64_t i = 0; i < I; ++i) gy[i] = (g[i] - signed_as<L>(y[i], along)) * factor;
  multiply(X.transposed(), gy, gu);
  multiply(X, gu, gv);
  for (int64_t i = 0; i < I; ++i) {
    gv[i] /= d[i];
    gd[i] = -gv[i] * seed[i] / d[i];
  }
  damp(gd, I, options.damping);
  if (options.nonnegative) {
    multiply(X.transposed(), gd, gt);
  } else {
    // What comes through d is added below.
    for (int64_t k = 0; k < K; ++k) gt[k] = t[k] = Vector<L>{};
  }
  for (int64_t i = 0; i < I; ++i) {
    const Vector<L> of_u = gy[i], of_gu = seed[i] / d[i], of_t = gd[i];
    const Rows<L> row = X.row(i), grad_row = grad_X.row(i);
    for (int64_t k = 0; k < K; ++k) {
      grad_row[k] = of_u * u[k] + of_gu * gu[k] + of_t * t[k] + gt[k] +
                    signed_as<L>(row[k], to_magnitude);
    }
  }
  if (!options.nonnegative) add_through_affinities(X, gd, affinities, grad_X);
}

}  // namespace

template <typename W>
template <typename L>
LEAN_INLINE void Walk<W>::reduce(const Shape& shape, W* rows) const {
  walk_vector<L>(shape, options, seed, rows);
}

template <typename T>
template <typename Set>
LEAN_INLINE void Gradient<T>::on() const {
  using L = Lanes<T, Set>;
  const GradientRows<L> own(shape, scratch);
  const Rows<L> affinities{scratch + shape.gradient_rows() * LANES};
  Options plain = options;
  plain.scale = Scale::sum;
  for (int64_t index = first; index < last; ++index) {
    const Block<L> block(shape, index, shape.gradient_rows());
    block.read(x, shape.channels(), scratch);
    block.read(grad, shape.preserved, own.g.start);
    for (int64_t vector = 0; vector < block.vectors(); ++vector) {
      T* const rows = scratch + vector * block.apart;
      walk_vector<L>(shape, plain, seed, rows, affinities);
      gradient_vector<L>(shape, options, seed, rows, affinities);
    }
    block.write(own.grad_x.start, shape.channels(), grad_x);
    for (int64_t lane = 0; lane < block.count; ++lane)
      for (int64_t i = 0; i < shape.preserved; ++i)
        grad_seed[i] += (own.gv + i).start[block.lane_at(lane)];
  }
}

template <typename T>
void Gradient<T>::run() const {
  lean::run(*this);
}

template struct Gradient<float>;
template struct Gradient<double>;

}  // namespace lean

LEAN_PASSES(lean::Walk)
