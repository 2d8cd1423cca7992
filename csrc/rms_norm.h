// The formulas of RMSNorm of a dual, for one row; sap_fast/ops/rms_norm/README.md has them in full.
#pragma once

#include "common.h"

namespace sap_fast {
namespace {

// Row statistics (rstd, rstd_dot) of h; h_dot may be null.
template <class T>
inline std::pair<compute_t<T>, compute_t<T>> statistics(const T* h, const T* h_dot, int64_t d, double eps) {
  using C = compute_t<T>;
  Vec<T> squares(C(0)), products(C(0));
  lanes<T>(d, [&](int64_t j, auto count) {
    const auto x = load(h + j, count);
    squares = at::vec::fmadd(x, x, squares);
    if (h_dot != nullptr) {
      products = at::vec::fmadd(x, load(h_dot + j, count), products);
    }
  });
  const C rstd = C(1) / std::sqrt(sum(squares) / C(d) + C(eps));
  return {rstd, -rstd * rstd * rstd * (sum(products) / C(d))};
}

// y = gain h rstd, y_dot = gain (h_dot rstd + h rstd_dot)
template <class T>
inline void normalise(const T* h, const T* h_dot, const compute_t<T>* gain, compute_t<T> rstd, compute_t<T> rstd_dot,
                      T* y, T* y_dot, int64_t d) {
  const Vec<T> r(rstd), r_dot(rstd_dot);
  lanes<T>(d, [&](int64_t j, auto count) {
    const auto g = Vec<T>::loadu(gain + j, count), x = load(h + j, count);
    store(y + j, g * x * r, count);
    if (h_dot != nullptr) {
      store(y_dot + j, g * (load(h_dot + j, count) * r + x * r_dot), count);
    }
  });
}

// One row of what a backward reads: null where half mode has none.
template <class T>
struct Row {
  const T *dy, *dy_dot, *h, *h_dot;
  const compute_t<T>* gain;
};

// dh_dot = a g_dot + b h,  dh = a g + c g_dot + b h_dot + e h,  with g = gain dy and g_dot = gain dy_dot.
template <class T>
struct Coefficients {
  Vec<T> a, b, c, e;
};

template <class T>
inline Coefficients<T> coefficients(const Row<T>& row, compute_t<T> rstd, compute_t<T> rstd_dot, int64_t d) {
  using C = compute_t<T>;
  Vec<T> h_g_dot(C(0)), h_g(C(0)), h_dot_g_dot(C(0));
  lanes<T>(d, [&](int64_t j, auto count) {
    const auto w = Vec<T>::loadu(row.gain + j, count), x = load(row.h + j, count);
    const auto g_dot = w * load(row.dy_dot + j, count);
    h_g_dot = at::vec::fmadd(x, g_dot, h_g_dot);
    if (row.dy != nullptr) {
      h_g = at::vec::fmadd(x, w * load(row.dy + j, count), h_g);
      h_dot_g_dot = at::vec::fmadd(load(row.h_dot + j, count), g_dot, h_dot_g_dot);
    }
  });
  const C mean = sum(h_g_dot) / C(d), cube = rstd * rstd * rstd;
  const C along = cube * (sum(h_g) + sum(h_dot_g_dot)) / C(d) + C(3) * rstd * rstd * rstd_dot * mean;
  return {Vec<T>(rstd), Vec<T>(-cube * mean), Vec<T>(rstd_dot), Vec<T>(-along)};
}

// (dh, dh_dot) at one vector of a row; in half mode dh is dh_dot.
template <class T, class Count>
inline std::pair<Vec<T>, Vec<T>> cotangents(const Row<T>& row, const Coefficients<T>& k, int64_t j, Count count) {
  const auto w = Vec<T>::loadu(row.gain + j, count), x = load(row.h + j, count);
  const auto g_dot = w * load(row.dy_dot + j, count);
  const auto dh_dot = k.a * g_dot + k.b * x;
  if (row.dy == nullptr) {
    return {dh_dot, dh_dot};
  }
  const auto g = w * load(row.dy + j, count);
  return {k.a * g + k.c * g_dot + k.b * load(row.h_dot + j, count) + k.e * x, dh_dot};
}

}  // namespace
}  // namespace sap_fast
