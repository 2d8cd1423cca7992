// RMSNorm of a dual: sap_fast::rms_norm and its backward on CPU tensors.
#include "rms_norm.h"

namespace sap_fast {
namespace {

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_in, const Tensor& weight, double eps, double offset) {
  check_stack("x", x_in, 3);
  const auto x = x_in.contiguous();
  const int64_t halves = x.size(0), rows = x.size(1), d = x.size(2);
  check_weight(weight, d);
  const auto gain = gain_of(weight, offset, compute_type(x));
  auto y = at::empty_like(x);
  auto rstd = at::empty({halves, rows}, x.options().dtype(compute_type(x)));
  SAP_FAST_DISPATCH(x, "rms_norm", [&] {
    const auto* px = x.const_data_ptr<scalar_t>();
    const auto* pg = gain.const_data_ptr<compute_t<scalar_t>>();
    auto* py = y.mutable_data_ptr<scalar_t>();
    auto* pr = rstd.mutable_data_ptr<compute_t<scalar_t>>();
    parallel_rows(rows, d, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto* h = px + i * d;
        const auto* h_dot = halves == 2 ? h + rows * d : nullptr;
        const auto [r, r_dot] = statistics(h, h_dot, d, eps);
        normalise(h, h_dot, pg, r, r_dot, py + i * d, py + (rows + i) * d, d);
        pr[i] = r;
        if (halves == 2) {
          pr[rows + i] = r_dot;
        }
      }
    });
  });
  return {y, rstd};
}

Tensor rms_norm_backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& rstd_in, const Tensor& weight,
                         double /*eps*/, double offset) {
  check_stack("dy", dy_in, 3);
  const auto dy = dy_in.contiguous(), x = x_in.contiguous(), rstd = rstd_in.contiguous();
  const int64_t n = dy.size(0), rows = dy.size(1), d = dy.size(2);
  check_saved("x", x, n, {rows, d}, dy.scalar_type());
  check_saved("rstd", rstd, n, {rows}, compute_type(x));
  check_weight(weight, d);
  const auto gain = gain_of(weight, offset, compute_type(x));
  auto dx = at::empty_like(dy);
  SAP_FAST_DISPATCH(x, "rms_norm_backward", [&] {
    const auto* pdy = dy.const_data_ptr<scalar_t>();
    const auto* px = x.const_data_ptr<scalar_t>();
    const auto* pr = rstd.const_data_ptr<compute_t<scalar_t>>();
    const auto* pg = gain.const_data_ptr<compute_t<scalar_t>>();
    auto* pdx = dx.mutable_data_ptr<scalar_t>();
    const bool full = n == 2;
    parallel_rows(rows, d, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto* dy_dot = pdy + ((n - 1) * rows + i) * d;
        const auto* dy_row = full ? pdy + i * d : nullptr;
        const auto* h = px + i * d;
        const auto* h_dot = full ? h + rows * d : nullptr;
        const Row<scalar_t> row{dy_row, dy_dot, h, h_dot, pg};
        const auto k = coefficients(row, pr[i], full ? pr[rows + i] : pr[i], d);
        lanes<scalar_t>(d, [&](int64_t j, auto count) {
          const auto [dh, dh_dot] = cotangents(row, k, j, count);
          store(pdx + ((n - 1) * rows + i) * d + j, dh_dot, count);
          if (full) {
            store(pdx + i * d + j, dh, count);
          }
        });
      }
    });
  });
  return dx;
}

}  // namespace
}  // namespace sap_fast

TORCH_LIBRARY_IMPL(sap_fast, CPU, library) {
  library.impl("rms_norm", &sap_fast::rms_norm);
  library.impl("rms_norm_backward", &sap_fast::rms_norm_backward);
}
