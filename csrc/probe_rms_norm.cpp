// Residual + probe + RMSNorm of a dual: sap_fast::probe_rms_norm and its backward, with the gradient capture.
#include "rms_norm.h"

namespace sap_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> probe_rms_norm(const Tensor& residual_in, const Tensor& update_in,
                                                  const std::optional<Tensor>& probe_in, const Tensor& weight,
                                                  double eps, double offset) {
  check_stack("residual", residual_in, 3);
  check_is("update", update_in, residual_in.sizes(), residual_in.scalar_type());
  const auto residual = residual_in.contiguous(), update = update_in.contiguous();
  const int64_t halves = residual.size(0), rows = residual.size(1), d = residual.size(2);
  check_weight(weight, d);
  if (probe_in) {
    check_is("probe", *probe_in, {halves, d}, probe_in->scalar_type());
  }
  const auto dtype = compute_type(residual);
  const auto gain = gain_of(weight, offset, dtype);
  const auto probe = probe_in ? probe_in->to(dtype).contiguous() : Tensor();
  auto h = at::empty_like(residual), y = at::empty_like(residual);
  auto rstd = at::empty({halves, rows}, residual.options().dtype(dtype));
  SAP_FAST_DISPATCH(residual, "probe_rms_norm", [&] {
    using C = compute_t<scalar_t>;
    const auto* pr = residual.const_data_ptr<scalar_t>();
    const auto* pu = update.const_data_ptr<scalar_t>();
    const auto* pv = probe_in ? probe.const_data_ptr<C>() : nullptr;
    const auto* pg = gain.const_data_ptr<C>();
    auto* ph = h.mutable_data_ptr<scalar_t>();
    auto* py = y.mutable_data_ptr<scalar_t>();
    auto* ps = rstd.mutable_data_ptr<C>();
    parallel_rows(rows, d, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        for (int64_t half = 0; half < halves; ++half) {
          const int64_t o = (half * rows + i) * d;
          lanes<scalar_t>(d, [&](int64_t j, auto count) {
            auto x = load(pr + o + j, count) + load(pu + o + j, count);
            if (pv != nullptr) {
              x = x + Vec<scalar_t>::loadu(pv + half * d + j, count);
            }
            store(ph + o + j, x, count);
          });
        }
        // The norm reads the stored sum, rounded as the residual stream carries it on.
        const auto* row = ph + i * d;
        const auto* row_dot = halves == 2 ? row + rows * d : nullptr;
        const auto [r, r_dot] = statistics(row, row_dot, d, eps);
        normalise(row, row_dot, pg, r, r_dot, py + i * d, py + (rows + i) * d, d);
        ps[i] = r;
        if (halves == 2) {
          ps[rows + i] = r_dot;
        }
      }
    });
  });
  return {h, y, rstd};
}

// Into how many partial sums of columns the rows are split: whatever the number of threads, so that none changes a bit.
constexpr int64_t kBlocks = 32;

std::tuple<Tensor, Tensor> probe_rms_norm_backward(const std::optional<Tensor>& dh_in, const Tensor& dy_in,
                                                   const Tensor& h_in, const Tensor& rstd_in, const Tensor& weight,
                                                   double /*eps*/, double offset, bool capture) {
  check_stack("dy", dy_in, 3);
  const auto dy = dy_in.contiguous(), h = h_in.contiguous(), rstd = rstd_in.contiguous();
  const auto dh = dh_in ? dh_in->contiguous() : Tensor();
  const int64_t n = dy.size(0), rows = dy.size(1), d = dy.size(2);
  const auto dtype = compute_type(h);
  check_saved("h", h, n, {rows, d}, dy.scalar_type());
  check_saved("rstd", rstd, n, {rows}, dtype);
  check_weight(weight, d);
  if (dh_in) {
    check_is("dh", dh, dy.sizes(), dy.scalar_type());
  }
  const auto gain = gain_of(weight, offset, dtype);
  auto dx = at::empty_like(dy);
  auto partial = at::zeros({capture ? kBlocks : 0, n, d}, dy.options().dtype(dtype));
  SAP_FAST_DISPATCH(h, "probe_rms_norm_backward", [&] {
    using C = compute_t<scalar_t>;
    const auto* pdh = dh_in ? dh.const_data_ptr<scalar_t>() : nullptr;
    const auto* pdy = dy.const_data_ptr<scalar_t>();
    const auto* ph = h.const_data_ptr<scalar_t>();
    const auto* pr = rstd.const_data_ptr<C>();
    const auto* pg = gain.const_data_ptr<C>();
    auto* pdx = dx.mutable_data_ptr<scalar_t>();
    auto* pp = capture ? partial.mutable_data_ptr<C>() : nullptr;
    const bool full = n == 2;
    const int64_t block_rows = (rows + kBlocks - 1) / kBlocks;
    at::parallel_for(0, kBlocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        for (int64_t i = block * block_rows; i < std::min(rows, (block + 1) * block_rows); ++i) {
          const auto* h_row = ph + i * d;
          const Row<scalar_t> row{full ? pdy + i * d : nullptr, pdy + ((n - 1) * rows + i) * d, h_row,
                                  full ? h_row + rows * d : nullptr, pg};
          const auto k = coefficients(row, pr[i], full ? pr[rows + i] : pr[i], d);
          const auto put = [&](int64_t half, int64_t j, Vec<scalar_t> x, auto count) {
            const int64_t o = (half * rows + i) * d + j;
            if (pdh != nullptr) {
              x = x + load(pdh + o, count);
            }
            store(pdx + o, x, count);
            if (pp != nullptr) {
              auto* total = pp + (block * n + half) * d + j;
              (Vec<scalar_t>::loadu(total, count) + x).store(total, count);
            }
          };
          lanes<scalar_t>(d, [&](int64_t j, auto count) {
            const auto [x, x_dot] = cotangents(row, k, j, count);
            put(n - 1, j, x_dot, count);
            if (full) {
              put(0, j, x, count);
            }
          });
        }
      }
    });
  });
  return {dx, capture ? partial.sum(0) : at::empty({0}, partial.options())};
}

}  // namespace
}  // namespace sap_fast

TORCH_LIBRARY_IMPL(sap_fast, CPU, library) {
  library.impl("probe_rms_norm", &sap_fast::probe_rms_norm);
  library.impl("probe_rms_norm_backward", &sap_fast::probe_rms_norm_backward);
}
