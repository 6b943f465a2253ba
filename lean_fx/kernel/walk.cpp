// The walk and its gradient, over the rows of a block. lean_fx/reduction/walk.py has the formulas.

#include "walk.h"

namespace lean {
namespace {

// d[i] = sum_j |sum_k X[i,k] X[j,k]|. Each affinity is made once, for d[i] and d[j]: those of i to
// the j from i on, one row of the triangle behind the other if they are kept.
template <typename T>
LEAN_INLINE void affinity_sums(const Matrix<T>& X, Rows<T> d, Rows<T> affinities, bool kept) {
  for (int64_t i = 0; i < X.height; ++i) d[i] = Vector<T>{};
  for (int64_t i = 0; i < X.height; ++i) {
    multiply(X.below(i), X.row(i), affinities);
    Vector<T> own = d[i] + affinities[0];
    for (int64_t j = i + 1; j < X.height; ++j) {
      const Vector<T> affinity = absolute<T>(affinities[j - i]);
      d[j] += affinity;
      own += affinity;
    }
    d[i] = own;
    if (kept) affinities = affinities + (X.height - i);
  }
}

// d += damping mean_i d[i], as in the sums of the walk so in their gradient.
template <typename T>
LEAN_INLINE void damp(Rows<T> d, int64_t I, double damping) {
  if (damping == 0) return;  // infinite sums times 0 are not 0
  Vector<T> sum = d[0];
  for (int64_t i = 1; i < I; ++i) sum += d[i];
  sum *= static_cast<T>(damping / static_cast<double>(I));
  for (int64_t i = 0; i < I; ++i) d[i] += sum;
}

template <typename T>
LEAN_INLINE Vector<T> mean_magnitude(Rows<T> x, int64_t channels) {
  Vector<T> sum = absolute<T>(x[0]);
  for (int64_t c = 1; c < channels; ++c) sum += absolute<T>(x[c]);
  return sum / static_cast<T>(channels);
}

template <typename T>
LEAN_INLINE Matrix<T> as_matrix(const Shape& shape, const Options& options, Rows<T> x) {
  const int64_t I = shape.preserved, K = shape.reducible;
  if (options.interleaved) return {x.start, I, K, 1, I};
  return {x.start, I, K, K, 1};
}

template <typename T>
LEAN_INLINE void walk_vector(const Shape& shape, const Options& options, const T* seed, T* start) {
  const auto [x, y, d, t, u, inverse] = WalkRows<T>(shape, start);
  const int64_t I = shape.preserved, K = shape.reducible;
  const Matrix<T> X = as_matrix(shape, options, x);
  const bool column = options.normalize == Normalize::column;

  if (options.normalize != Normalize::none) {
    if (options.nonnegative) {  // sum_j |<X_i, X_j>| = <X_i, sum_j X_j>
      inverse[0] = all<T>(1);
      multiply(X.transposed(), {inverse.start, 0}, t);
      multiply(X, t, d);
    } else {
      const bool kept = options.for_gradient;
      affinity_sums(X, d, kept ? GradientRows<T>(shape, start).affinities : y, kept);
    }
    damp(d, I, options.damping);
    for (int64_t i = 0; i < I; ++i) d[i] = without_zeros<T>(d[i]);
  }
  for (int64_t step = 0; step < options.iterations; ++step) {
    if (shape.matrix && step == 0) {
      for (int64_t k = 0; k < K; ++k) u[k] = Vector<T>{};
      for (int64_t i = 0; i < I; ++i) {
        for (int64_t k = 0; k < K; ++k) {
          const Vector<T> v = all<T>(seed[i * K + k]);
          u[k] += X.row(i)[k] * (column ? v / d[i] : v);
        }
      }
    } else {
      for (int64_t i = 0; i < I; ++i) {
        const Vector<T> v = step == 0 ? all<T>(seed[i]) : y[i];
        y[i] = column ? v / d[i] : v;
      }
      multiply(X.transposed(), y, u);
    }
    multiply(X, u, y);
    Vector<T> norm = all<T>(static_cast<T>(options.norm_floor));
    for (int64_t i = 0; i < I; ++i) {
      if (options.normalize == Normalize::row) y[i] /= d[i];
      norm += absolute<T>(y[i]);
    }
    inverse[0] = 1 / without_zeros<T>(norm);
    for (int64_t i = 0; i < I; ++i) y[i] *= inverse[0];
  }
  if (options.scale == Scale::sum) return;
  Vector<T> factor = all<T>(static_cast<T>(I));
  if (options.scale == Scale::magnitude) factor *= mean_magnitude<T>(x, shape.channels());
  for (int64_t i = 0; i < I; ++i) y[i] *= factor;
}

// grad_X[i] += sum_j w[i,j] X[j], w[i,j] = sign(<X_i, X_j>) (gd[i] + gd[j]) = w[j,i], which takes
// the place of the affinity.
template <typename T>
LEAN_INLINE void add_through_affinities(const Matrix<T>& X, Rows<T> gd, Rows<T> affinities,
                                        Rows<T> weights, Rows<T> sums, const Matrix<T>& grad_X) {
  for (int64_t i = 0; i < X.height; ++i) {
    Rows<T> triangle = affinities;
    for (int64_t j = 0; j < i; ++j) {
      weights[j] = triangle[i - j];
      triangle = triangle + (X.height - j);
    }
    for (int64_t j = i; j < X.height; ++j)
      triangle[j - i] = weights[j] = signed_as<T>(triangle[j - i], gd[i] + gd[j]);
    multiply(X.transposed(), weights, sums);
    for (int64_t k = 0; k < X.width; ++k) grad_X.row(i)[k] += sums[k];
  }
}

template <typename T>
LEAN_INLINE void gradient_vector(const Shape& shape, const Options& options, const T* seed,
                                 T* start) {
  const auto [x, y, d, t, u, inverse] = WalkRows<T>(shape, start);
  const auto [g, gy, gv, gd, gu, gt, grad_x, affinities] = GradientRows<T>(shape, start);
  const int64_t I = shape.preserved, K = shape.reducible, C = shape.channels();
  const Matrix<T> X = as_matrix(shape, options, x), grad_X = as_matrix(shape, options, grad_x);

  // The output is y times C' and, it may be, times the mean magnitude of X.
  Vector<T> along = Vector<T>{}, to_magnitude = Vector<T>{};
  for (int64_t i = 0; i < I; ++i) along += g[i] * y[i];
  Vector<T> factor = all<T>(options.scale == Scale::sum ? 1 : static_cast<T>(I));
  if (options.scale == Scale::magnitude) {
    to_magnitude = along * factor / static_cast<T>(C);
    factor *= mean_magnitude<T>(x, C);
  }
  factor *= inverse[0];
  for (int64_t i = 0; i < I; ++i) gy[i] = (g[i] - signed_as<T>(y[i], along)) * factor;
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
    for (int64_t k = 0; k < K; ++k) gt[k] = t[k] = Vector<T>{};
  }
  for (int64_t i = 0; i < I; ++i) {
    const Vector<T> of_u = gy[i], of_gu = seed[i] / d[i], of_t = gd[i];
    const Rows<T> row = X.row(i), grad_row = grad_X.row(i);
    for (int64_t k = 0; k < K; ++k) {
      grad_row[k] = of_u * u[k] + of_gu * gu[k] + of_t * t[k] + gt[k] +
                    signed_as<T>(row[k], to_magnitude);
    }
  }
  if (!options.nonnegative) add_through_affinities(X, gd, affinities, gy, gt, grad_X);
}

template <typename T>
LEAN_CLONES void walk_vectors(const Shape& shape, const Options& options, const T* seed,
                              const Block& block, T* rows) {
  for (int64_t lane = 0; lane < block.count; lane += WIDTH)
    walk_vector(shape, options, seed, rows + block.lane_at(lane));
}

template <typename T>
LEAN_CLONES void gradient_vectors(const Shape& shape, const Options& options, const T* seed,
                                  const Block& block, T* rows) {
  for (int64_t lane = 0; lane < block.count; lane += WIDTH)
    gradient_vector(shape, options, seed, rows + block.lane_at(lane));
}

}  // namespace

template <typename T>
void walk(const Shape& shape, const Options& options, const T* seed, const Block& block, T* rows) {
  walk_vectors(shape, options, seed, block, rows);
}

template <typename T>
void gradient(const Shape& shape, const Options& options, const T* seed, const Block& block,
              T* rows) {
  gradient_vectors(shape, options, seed, block, rows);
}

template void walk(const Shape&, const Options&, const float*, const Block&, float*);
template void walk(const Shape&, const Options&, const double*, const Block&, double*);
template void gradient(const Shape&, const Options&, const float*, const Block&, float*);
template void gradient(const Shape&, const Options&, const double*, const Block&, double*);

}  // namespace lean
