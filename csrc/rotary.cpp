// Rotary embedding of query and key duals: sap_fast::rotary and its transpose.
#include "common.h"

namespace sap_fast {
namespace {

// Turns all heads of one row: channel i with channel i + R / 2. `turn` is -1 for the transpose (with the sines of the
// other half, where a model's angles differ between the halves).
template <class T>
void turn_row(const T* x, T* y, const compute_t<T>* cos, const compute_t<T>* sin, int64_t heads, int64_t d, int64_t r,
              bool transposed) {
  using V = Vec<T>;
  const int64_t m = r / 2;
  for (int64_t head = 0; head < heads; ++head, x += d, y += d) {
    lanes<T>(m, [&](int64_t j, auto count) {
      const V x1 = load(x + j, count), x2 = load(x + m + j, count);
      const V c1 = V::loadu(cos + j, count), c2 = V::loadu(cos + m + j, count);
      const V s1 = V::loadu(sin + j, count), s2 = V::loadu(sin + m + j, count);
      store(y + j, transposed ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1, count);
      store(y + m + j, transposed ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2, count);
    });
    std::copy(x + r, x + d, y + r);
  }
}

Tensor turn(const Tensor& x_in, const Tensor& cos, const Tensor& sin, bool transposed) {
  check_stack("x", x_in, 4);
  const auto x = x_in.contiguous();
  const int64_t halves = x.size(0), rows = x.size(1), heads = x.size(2), d = x.size(3), r = cos.size(-1);
  check_is("cos", cos, {rows, r}, compute_type(x));
  check_is("sin", sin, {rows, r}, compute_type(x));
  TORCH_CHECK(r % 2 == 0 && r <= d, "cos and sin must have an even width of at most ", d, ", but have ", r);
  auto y = at::empty_like(x);
  SAP_FAST_DISPATCH(x, "rotary", [&] {
    const auto* px = x.const_data_ptr<scalar_t>();
    const auto* pc = cos.const_data_ptr<compute_t<scalar_t>>();
    const auto* ps = sin.const_data_ptr<compute_t<scalar_t>>();
    auto* py = y.mutable_data_ptr<scalar_t>();
    parallel_rows(halves * rows, heads * d, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t o = i * heads * d, angle = i % rows * r;
        turn_row(px + o, py + o, pc + angle, ps + angle, heads, d, r, transposed);
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> turn_both(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                     bool transposed) {
  TORCH_CHECK(cos.dim() == 2 && sin.sizes() == cos.sizes() && k.scalar_type() == q.scalar_type(),
              "cos and sin must be [rows, width], and q and k of one dtype, but they are ", cos.sizes(), ", ",
              sin.sizes(), ", ", q.scalar_type(), ", ", k.scalar_type());
  const auto c = cos.to(compute_type(q)).contiguous(), s = sin.to(compute_type(q)).contiguous();
  return {turn(q, c, s, transposed), turn(k, c, s, transposed)};
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  return turn_both(q, k, cos, sin, false);
}

// The map is linear: its backward is its transpose.
std::tuple<Tensor, Tensor> rotary_backward(const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin) {
  return turn_both(dq, dk, cos, sin, true);
}

}  // namespace
}  // namespace sap_fast

TORCH_LIBRARY_IMPL(sap_fast, CPU, library) {
  library.impl("rotary", &sap_fast::rotary);
  library.impl("rotary_backward", &sap_fast::rotary_backward);
}
