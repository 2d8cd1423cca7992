// Output head and cross-entropy of a dual: products with the head, chunk by chunk of rows, and what lies between them.
// The backward's products are formed while the logits are there, as in Liger-Kernel's fused linear cross-entropy.
#include "head.h"

namespace sap_fast {
namespace {

// Logits that exist at once, of all halves together, in elements; as many rows as that makes of a vocabulary, at least
// 64 of each half. In float32 that is a little less than the 32 MiB from which glibc maps new pages for every
// allocation: to touch them first costs as much as a fifth of the product.
constexpr int64_t kChunk = (int64_t(1) << 23) - 4096;

int64_t chunk_rows(int64_t vocab, int64_t halves) {
  return std::max<int64_t>(64, kChunk / std::max<int64_t>(1, vocab * halves));
}

// What one row's logits come to: lse = top + log total, lse_dot. In double, since a confident token's loss is a small
// difference of them to its logit.
struct Sums {
  double top, total, lse_dot;
};

// One row. z becomes exp(z - top) if `keep`; z_dot is null without tangents.
template <class C>
Sums sums(C* z, const C* z_dot, int64_t vocab, bool keep) {
  using V = Vec<C>;
  V largest(-std::numeric_limits<C>::infinity());
  lanes<C>(vocab, [&](int64_t j, auto count) {
    largest = V::set(largest, at::vec::maximum(largest, V::loadu(z + j, count)), count);
  });
  const C top = at::vec::vec_reduce_all<C>([](V& a, V& b) { return at::vec::maximum(a, b); }, largest);
  Total<C> total, total_dot;
  lanes<C>(vocab, [&](int64_t j, auto count) {
    const V e = V::set(V(C(0)), (V::loadu(z + j, count) - V(top)).exp(), count);
    total.add(e);
    if (z_dot != nullptr) {
      total_dot.add(e * V::loadu(z_dot + j, count));
    }
    if (keep) {
      e.store(z + j, count);
    }
  });
  const double whole = total.value();
  return {top, whole, total_dot.value() / whole};
}

// One row of what is multiplied with W: of e = exp(z - top)
//   miss = p - e_y,  spread = p (z_dot - lse_dot)
// where spread is null in half mode. They may be z_dot and e themselves, or without spread e.
template <class C, class T>
void cotangents(const C* e, const C* z_dot, T* miss, T* spread, const Sums& of, int64_t target, int64_t vocab) {
  using V = Vec<C>;
  // Not p - 1, in which a confident token's digits would go: what the others are of the total.
  const bool known = target >= 0 && target < vocab;
  const double missed = known ? (static_cast<double>(e[target]) - of.total) / of.total : 0;
  const V share(static_cast<C>(1 / of.total)), lse_dot(static_cast<C>(of.lse_dot));
  lanes<C>(vocab, [&](int64_t j, auto count) {
    const V p = V::loadu(e + j, count) * share;
    if (spread != nullptr) {
      store<T>(spread + j, p * (V::loadu(z_dot + j, count) - lse_dot), count);
    }
    store<T>(miss + j, p, count);
  });
  if (known) {
    miss[target] = static_cast<T>(static_cast<C>(missed));
  }
}

void check(const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t grads) {
  check_stack("x", x, 3);
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(2), "weight must be [vocab, ", x.size(2),
              "], but has shape ", weight.sizes());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == x.size(1) && targets.scalar_type() == at::kLong,
              "targets must be int64 [", x.size(1), "], but are ", targets.scalar_type(), " ", targets.sizes());
  TORCH_CHECK(grads >= 0 && grads <= x.size(0), "grads must be 0 to ", x.size(0), ", the halves of x, but is ", grads);
}

// Rows [begin, begin + count) of nll, from their logits z [halves * count, vocab]; and for `grads` halves the rows that
// are multiplied with W, into dz [grads * count, >= vocab], which may be z.
template <class C, class T>
void rows_of(const Tensor& z, const Tensor& dz, const int64_t* targets, Tensor& nll, int64_t begin, int64_t count,
             int64_t vocab, int64_t grads) {
  const int64_t halves = nll.size(0), rows = nll.size(1), pitch = grads > 0 ? dz.size(1) : 0;
  auto* pz = z.mutable_data_ptr<C>();
  auto* pd = grads > 0 ? dz.mutable_data_ptr<T>() : nullptr;
  auto* pn = nll.mutable_data_ptr<C>() + begin;
  parallel_rows(count, vocab, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      auto* row = pz + i * vocab;
      const auto* row_dot = halves == 2 ? row + count * vocab : nullptr;
      const int64_t target = targets[begin + i];
      // A target outside of the vocabulary would read someone else's memory; as no number it is refused by the step.
      const bool known = target >= 0 && target < vocab;
      const C logit = known ? row[target] : std::numeric_limits<C>::quiet_NaN();
      const C logit_dot = known && row_dot != nullptr ? row_dot[target] : std::numeric_limits<C>::quiet_NaN();
      const Sums of = sums(row, row_dot, vocab, grads > 0);
      pn[i] = static_cast<C>(of.top + std::log(of.total) - logit);
      if (halves == 2) {
        pn[rows + i] = static_cast<C>(of.lse_dot - logit_dot);
      }
      if (grads > 0) {
        auto* miss = pd + ((grads - 1) * count + i) * pitch;
        cotangents<C, T>(row, row_dot, miss, grads == 2 ? pd + i * pitch : nullptr, of, target, vocab);
      }
    }
  });
}

std::tuple<Tensor, Tensor> linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets_in,
                                                int64_t grads) {
  const WithoutAutocast guard;
  check(x, weight, targets_in, grads);
  const auto targets = targets_in.contiguous();
  const int64_t halves = x.size(0), rows = x.size(1), d = x.size(2), vocab = weight.size(0);
  const Head head(weight, x.scalar_type());
  const auto wide = x.options().dtype(compute_type(x));
  auto nll = at::empty({halves, rows}, wide), basis = at::empty({grads, rows, d}, wide);
  const int64_t most = std::min(rows, chunk_rows(vocab, halves));
  const auto logits = at::empty({halves * most, vocab}, wide);
  // What the processor multiplies in bfloat16 is written in bfloat16; all else in place of the logits.
  const bool narrow = head.narrow() && grads > 0;
  auto narrowed = narrow ? at::empty({grads * most, vocab + vocab % 2}, x.options()) : Tensor();
  if (narrow && vocab % 2 == 1) {
    narrowed.select(1, vocab).zero_();
  }
  const auto products = at::empty({grads * most, d}, wide);
  AT_DISPATCH_FLOATING_TYPES(compute_type(x), "linear_cross_entropy", [&] {
    // The processor's unit serves float32 alone.
    using narrow_t = std::conditional_t<std::is_same_v<scalar_t, float>, at::BFloat16, scalar_t>;
    const auto* pt = targets.const_data_ptr<int64_t>();
    for (int64_t begin = 0; begin < rows; begin += most) {
      const int64_t count = std::min(most, rows - begin);
      const auto z = logits.narrow(0, 0, halves * count);
      const auto dz = (narrow ? narrowed : logits).narrow(0, 0, grads * count);
      const auto product = products.narrow(0, 0, grads * count);
      head.logits(x.narrow(1, begin, count).reshape({-1, d}).contiguous(), z);
      if (narrow) {
        rows_of<scalar_t, narrow_t>(z, dz, pt, nll, begin, count, vocab, grads);
      } else {
        rows_of<scalar_t, scalar_t>(z, dz, pt, nll, begin, count, vocab, grads);
      }
      if (grads > 0) {
        head.pull(dz, product);
        basis.narrow(1, begin, count).copy_(product.view({grads, count, d}));
      }
    }
  });
  return {nll, basis};
}

Tensor linear_cross_entropy_backward(const Tensor& dnll_in, const Tensor& basis_in, at::ScalarType dtype) {
  TORCH_CHECK(basis_in.dim() == 3, "basis must be [n, rows, d], but has shape ", basis_in.sizes());
  const auto dnll = dnll_in.contiguous(), basis = basis_in.contiguous();
  const int64_t n = dnll.dim() ? dnll.size(0) : 0, rows = basis.size(1), d = basis.size(2);
  TORCH_CHECK(n >= 1 && n <= basis.size(0), "dnll has ", n, " halves, but basis ", basis.size(0));
  check_is("dnll", dnll, {n, rows}, basis.scalar_type());
  TORCH_CHECK(compute_type(basis) == basis.scalar_type(), "basis must be float32 or float64, but is ",
              basis.scalar_type());
  auto dx = at::empty({n, rows, d}, basis.options().dtype(dtype));
  TORCH_CHECK(compute_type(dx) == basis.scalar_type(), "dtype ", dtype, " does not go with a basis in ",
              basis.scalar_type());
  SAP_FAST_DISPATCH(dx, "linear_cross_entropy_backward", [&] {
    using C = compute_t<scalar_t>;
    using V = Vec<scalar_t>;
    const auto* pd = dnll.const_data_ptr<C>();
    const auto* spread = basis.const_data_ptr<C>();
    const auto* miss = spread + (basis.size(0) - 1) * rows * d;
    auto* px = dx.mutable_data_ptr<scalar_t>();
    parallel_rows(rows, d, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const V dnll_dot(pd[(n - 1) * rows + i]), dnll_row(pd[i]);
        lanes<scalar_t>(d, [&](int64_t j, auto count) {
          const V g = V::loadu(miss + i * d + j, count);
          if (n == 2) {
            const V t = V::loadu(spread + i * d + j, count);
            store<scalar_t>(px + i * d + j, dnll_row * g + dnll_dot * t, count);
          }
          store<scalar_t>(px + ((n - 1) * rows + i) * d + j, dnll_dot * g, count);
        });
      }
    });
  });
  return dx;
}

}  // namespace
}  // namespace sap_fast

TORCH_LIBRARY_IMPL(sap_fast, CPU, library) {
  library.impl("linear_cross_entropy", &sap_fast::linear_cross_entropy);
  library.impl("linear_cross_entropy_backward", &sap_fast::linear_cross_entropy_backward);
}
