// The forms of lean_fx/reduction/conditioned.py, over the rows of a block.

#include <cmath>

#include "pass.h"
#include "products.h"

namespace lean {
namespace {

template <typename L>
struct FormRows {
  Rows<L> x, y, u;
  LEAN_INLINE FormRows(const Shape& shape, Number<L>* start)
      : x{start}, y{x + shape.channels()}, u{y + shape.preserved} {}
  LEAN_INLINE Matrix<L> matrix(const Shape& shape) const {
    return {x.start, shape.preserved, shape.reducible, shape.reducible, 1};
  }
};

// In float by Eigen's rational approximation, of some units in the last place.
template <typename L>
LEAN_INLINE Vector<L> hyperbolic_tangent(Vector<L> x) {
  if constexpr (sizeof(Number<L>) == sizeof(float)) {
    x = x > 9 ? all<L>(9) : (x < -9 ? all<L>(-9) : x);
    const Vector<L> s = x * x;
    Vector<L> above = all<L>(-2.76076847742355e-16f);
    for (const float next : {2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                             1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f})
      above = above * s + next;
    Vector<L> below = all<L>(1.19825839466702e-06f);
    for (const float next : {1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f})
      below = below * s + next;
    return x * above / below;
  } else {
    Vector<L> found;
    for (int lane = 0; lane < L::WIDTH; ++lane) found[lane] = std::tanh(x[lane]);
    return found;
  }
}

constexpr int TILE = 4;  // channels at once, so that no sum waits for itself

// u[k] = sum_i X[i,k] gate[i,k] for N values of k; adds their sum |X| to magnitude.
template <typename L, int N>
LEAN_INLINE void gate_products(const Matrix<L>& X, const Number<L>* gate, int64_t k, Rows<L> u,
                               Vector<L>& magnitude) {
  Vector<L> sums[N] = {}, magnitudes[N] = {};
  for (int64_t i = 0; i < X.height; ++i) {
    for (int c = 0; c < N; ++c) {
      const Vector<L> x = X.row(i)[k + c];
      sums[c] += x * gate[i * X.width + k + c];
      magnitudes[c] += absolute<L>(x);
    }
  }
  for (int c = 0; c < N; ++c) {
    u[k + c] = sums[c];
    magnitude += magnitudes[c];
  }
}

// y[i] = sum_k X[i,k] u[k] weight[i,k] for N values of i.
template <typename L, int N>
LEAN_INLINE void weighted_sums(const Matrix<L>& X, const Number<L>* weight, int64_t i, Rows<L> u,
                               Rows<L> y) {
  Vector<L> sums[N] = {};
  for (int64_t k = 0; k < X.width; ++k)
    for (int c = 0; c < N; ++c)
      sums[c] += X.row(i + c)[k] * u[k] * weight[(i + c) * X.width + k];
  for (int c = 0; c < N; ++c) y[i + c] = sums[c];
}

}  // namespace

template <typename W>
template <typename L>
LEAN_INLINE void Simplex<W>::reduce(const Shape& shape, W* rows) const {
  const FormRows<L> own(shape, rows);
  const Matrix<L> X = own.matrix(shape);
  for (int64_t i = 0; i < X.height; ++i) own.y[i] = all<L>(v[i]);
  multiply(X.transposed(), own.y, own.u);
  Vector<L> sum = Vector<L>{};
  for (int64_t k = 0; k < X.width; ++k) sum += absolute<L>(own.u[k]);
  const Vector<L> inverse = 1 / without_zeros<L>(sum);
  for (int64_t k = 0; k < X.width; ++k) own.u[k] *= inverse;
  multiply(X, own.u, own.y);
}

template <typename W>
template <typename L>
LEAN_INLINE void Gated<W>::reduce(const Shape& shape, W* rows) const {
  const FormRows<L> own(shape, rows);
  const Matrix<L> X = own.matrix(shape);
  int64_t k = 0, i = 0;
  Vector<L> mean = Vector<L>{};
  for (; k + TILE <= X.width; k += TILE) gate_products<L, TILE>(X, gate, k, own.u, mean);
  for (; k < X.width; ++k) gate_products<L, 1>(X, gate, k, own.u, mean);
  mean = without_zeros<L>(mean / static_cast<W>(shape.channels()));
  for (k = 0; k < X.width; ++k) own.u[k] = 1 + hyperbolic_tangent<L>(own.u[k] / mean);
  for (; i + TILE <= X.height; i += TILE) weighted_sums<L, TILE>(X, weight, i, own.u, own.y);
  for (; i < X.height; ++i) weighted_sums<L, 1>(X, weight, i, own.u, own.y);
}

}  // namespace lean

LEAN_PASSES(lean::Simplex)
LEAN_PASSES(lean::Gated)
