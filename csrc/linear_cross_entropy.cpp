// Output head and cross-entropy of a pair: ATen's products with the head, chunk by chunk of rows, and what lies between.
#include "head.h"

namespace sap_fast {
namespace {

// Logits of one half that exist at once, in elements; as many rows as that makes of a vocabulary, at least 64.
constexpr int64_t kChunk = int64_t(1) << 24;

int64_t chunk_rows(int64_t vocab) {
  return std::max<int64_t>(64, kChunk / std::max<int64_t>(1, vocab));
}

// Logits of rows [first, last) of the first `halves` halves, in the compute dtype: [halves * count, vocab].
Tensor logits(const Tensor& x, int64_t halves, int64_t first, int64_t last, const Head& head) {
  const auto part = x.narrow(0, 0, halves).narrow(1, first, last - first);
  return head.logits(part.reshape({-1, x.size(2)}).contiguous());
}

// One row: lse = log sum exp z, lse_dot = sum p z_dot (0 where z_dot is null); in double, since a confident token's loss
// is a small difference of them to its logit.
template <class C>
std::pair<double, double> log_sum_exp(const C* z, const C* z_dot, int64_t vocab) {
  using V = Vec<C>;
  V largest(-std::numeric_limits<C>::infinity());
  lanes<C>(vocab, [&](int64_t j, auto count) {
    largest = V::set(largest, at::vec::maximum(largest, V::loadu(z + j, count)), count);
  });
  const C top = at::vec::vec_reduce_all<C>([](V& a, V& b) { return at::vec::maximum(a, b); }, largest);
  Total<C> total, total_dot;
  lanes<C>(vocab, [&](int64_t j, auto count) {
    const V p = V::set(V(C(0)), (V::loadu(z + j, count) - V(top)).exp(), count);
    total.add(p);
    if (z_dot != nullptr) {
      total_dot.add(p * V::loadu(z_dot + j, count));
    }
  });
  const double whole = total.value();
  return {top + std::log(whole), total_dot.value() / whole};
}

void check(const Tensor& x, const Tensor& weight, const Tensor& targets) {
  check_stack("x", x, 3);
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(2), "weight must be [vocab, ", x.size(2),
              "], but has shape ", weight.sizes());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == x.size(1) && targets.scalar_type() == at::kLong,
              "targets must be int64 [", x.size(1), "], but are ", targets.scalar_type(), " ", targets.sizes());
}

std::tuple<Tensor, Tensor> linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets_in) {
  const WithoutAutocast guard;
  check(x, weight, targets_in);
  const auto targets = targets_in.contiguous();
  const int64_t halves = x.size(0), rows = x.size(1), vocab = weight.size(0);
  const Head head(weight, x.scalar_type());
  auto nll = at::empty({halves, rows}, x.options().dtype(compute_type(x))), lse = at::empty_like(nll);
  AT_DISPATCH_FLOATING_TYPES(compute_type(x), "linear_cross_entropy", [&] {
    auto* pn = nll.mutable_data_ptr<scalar_t>();
    auto* pl = lse.mutable_data_ptr<scalar_t>();
    const auto* pt = targets.const_data_ptr<int64_t>();
    for (int64_t begin = 0; begin < rows; begin += chunk_rows(vocab)) {
      const int64_t count = std::min(chunk_rows(vocab), rows - begin);
      const auto z = logits(x, halves, begin, begin + count, head);
      const auto* pz = z.const_data_ptr<scalar_t>();
      parallel_rows(count, vocab, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const auto* row = pz + i * vocab;
          const auto* row_dot = halves == 2 ? row + count * vocab : nullptr;
          const auto [l, l_dot] = log_sum_exp(row, row_dot, vocab);
          const int64_t target = pt[begin + i];
          // A target outside of the vocabulary would read someone else's memory; as no number it is refused by the step.
          const bool known = target >= 0 && target < vocab;
          const auto none = std::numeric_limits<scalar_t>::quiet_NaN();
          pl[begin + i] = static_cast<scalar_t>(l);
          pn[begin + i] = known ? static_cast<scalar_t>(l - row[target]) : none;
          if (halves == 2) {
            pl[rows + begin + i] = static_cast<scalar_t>(l_dot);
            pn[rows + begin + i] = known ? static_cast<scalar_t>(l_dot - row_dot[target]) : none;
          }
        }
      });
    }
  });
  return {nll, lse};
}

// dz_dot = dnll_dot (p - e_y),  dz = dnll (p - e_y) + dnll_dot p (z_dot - lse_dot), in place of z.
template <class C>
void cotangents(C* z, C* z_dot, C lse, C lse_dot, C dnll, C dnll_dot, int64_t target, int64_t vocab) {
  using V = Vec<C>;
  lanes<C>(vocab, [&](int64_t j, auto count) {
    const V p = (V::loadu(z + j, count) - V(lse)).exp();
    if (z_dot == nullptr) {
      (V(dnll_dot) * p).store(z + j, count);
      return;
    }
    const V spread = V::loadu(z_dot + j, count) - V(lse_dot);
    (p * (V(dnll) + V(dnll_dot) * spread)).store(z + j, count);
    (V(dnll_dot) * p).store(z_dot + j, count);
  });
  if (target < 0 || target >= vocab) {
    return;
  }
  z[target] -= z_dot == nullptr ? dnll_dot : dnll;
  if (z_dot != nullptr) {
    z_dot[target] -= dnll_dot;
  }
}

Tensor linear_cross_entropy_backward(const Tensor& dnll_in, const Tensor& x, const Tensor& lse_in,
                                     const Tensor& weight, const Tensor& targets_in) {
  const WithoutAutocast guard;
  check(x, weight, targets_in);
  const auto dnll = dnll_in.contiguous(), lse = lse_in.contiguous(), targets = targets_in.contiguous();
  const int64_t n = dnll.dim() ? dnll.size(0) : 0, rows = x.size(1), vocab = weight.size(0);
  TORCH_CHECK(n >= 1 && n <= x.size(0), "dnll has ", n, " halves, but x ", x.size(0));
  check_is("dnll", dnll, {n, rows}, compute_type(x));
  check_saved("lse", lse, n, {rows}, compute_type(x));
  const Head head(weight, x.scalar_type());
  // dz takes part in its product in the dtype of the rows, whose rounding the result has in any case.
  const auto same_weight = weight.to(x.scalar_type());
  auto dx = at::empty({n, rows, x.size(2)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(compute_type(x), "linear_cross_entropy_backward", [&] {
    const auto* pd = dnll.const_data_ptr<scalar_t>();
    const auto* pl = lse.const_data_ptr<scalar_t>();
    const auto* pt = targets.const_data_ptr<int64_t>();
    for (int64_t begin = 0; begin < rows; begin += chunk_rows(vocab)) {
      const int64_t count = std::min(chunk_rows(vocab), rows - begin);
      auto z = logits(x, n, begin, begin + count, head);
      auto* pz = z.mutable_data_ptr<scalar_t>();
      parallel_rows(count, vocab, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t row = begin + i;
          auto* z_row = pz + i * vocab;
          if (n == 2) {
            cotangents(z_row, z_row + count * vocab, pl[row], pl[rows + row], pd[row], pd[rows + row], pt[row], vocab);
          } else {
            cotangents<scalar_t>(z_row, nullptr, pl[row], 0, 0, pd[row], pt[row], vocab);
          }
        }
      });
      dx.narrow(1, begin, count).copy_(at::mm(z.to(x.scalar_type()), same_weight).view({n, count, -1}));
    }
  });
  return dx;
}

}  // namespace
}  // namespace sap_fast

TORCH_LIBRARY_IMPL(sap_fast, CPU, library) {
  library.impl("linear_cross_entropy", &sap_fast::linear_cross_entropy);
  library.impl("linear_cross_entropy_backward", &sap_fast::linear_cross_entropy_backward);
}
