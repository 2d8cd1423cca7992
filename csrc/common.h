// What the C++ kernels share: checks, dispatch by dtype, vectors, parallel loops. Nothing about any op.
//
// Every file is compiled once for each capability of the processor (ATen's Vectorized is fixed per translation unit)
// into a module of its own, of which one is loaded. All is in an unnamed namespace, so that nothing of one module can
// take the place of another's.
//
// The notation is that of sap_fast/dual.py: stacks [S, ...], S = 2 a dual; cotangents [n, ...], of which the last is
// the ordinary gradient.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace sap_fast {
namespace {

using at::Tensor;

// float64 for float64, else float32: what statistics, sums and probabilities are computed in.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline at::ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class T>
using Vec = at::vec::Vectorized<compute_t<T>>;

// `count` elements, widened; lanes beyond them are zero.
template <class T>
inline Vec<T> load(const T* p, int64_t count) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    return Vec<T>::loadu(p, count);
  } else {
    return at::vec::convert<compute_t<T>>(at::vec::Vectorized<T>::loadu(p, count));
  }
}

// `count` elements, rounded to storage.
template <class T>
inline void store(T* p, const Vec<T>& x, int64_t count) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    x.store(p, count);
  } else {
    at::vec::convert<T>(x).store(p, count);
  }
}

template <class V>
inline typename V::value_type sum(const V& x) {
  return at::vec::vec_reduce_all<typename V::value_type>([](V& a, V& b) { return a + b; }, x);
}

// A long sum. Lanes add up a few vectors, whose sum goes to a double: a lane that holds a 1 would drop all that is less
// than half an eps of it, and a softmax over a vocabulary can have most of its tail there.
template <class T>
class Total {
 public:
  void add(const Vec<T>& x) {
    lanes_ = lanes_ + x;
    if (++count_ == kFold) {
      fold();
    }
  }

  double value() {
    fold();
    return folded_;
  }

 private:
  static constexpr int kFold = 16;

  void fold() {
    folded_ += static_cast<double>(sum(lanes_));
    lanes_ = Vec<T>(compute_t<T>(0));
    count_ = 0;
  }

  Vec<T> lanes_ = Vec<T>(compute_t<T>(0));
  double folded_ = 0;
  int count_ = 0;
};

// f(offset, count) over [0, d), a vector at a time; the count of whole vectors is known to the compiler.
template <class T, class F>
inline void lanes(int64_t d, const F& f) {
  constexpr int64_t width = Vec<T>::size();
  int64_t j = 0;
  for (; j + width <= d; j += width) {
    f(j, std::integral_constant<int64_t, width>{});
  }
  if (j < d) {
    f(j, d - j);
  }
}

// f(first, last) over rows, in parallel. A thread gets at least 16k elements, below which it costs more than it gives.
template <class F>
inline void parallel_rows(int64_t rows, int64_t width, const F& f) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)), f);
}

// f(first, last) over [0, size), in parallel, cut between whole vectors: where a loop ends decides how the compiler rounds.
template <class T, class F>
inline void parallel_lanes(int64_t size, const F& f) {
  constexpr int64_t width = Vec<T>::size();
  parallel_rows((size + width - 1) / width, width, [&](int64_t first, int64_t last) {
    f(first * width, std::min(size, last * width));
  });
}

// The weight of a norm as it multiplies, in the compute dtype.
inline Tensor gain_of(const Tensor& weight, double offset, at::ScalarType dtype) {
  return weight.to(dtype).add(offset).contiguous();
}

// ATen's products would be autocast inside a kernel, whose dtypes are settled.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

inline void check_stack(const char* name, const Tensor& x, int64_t dims) {
  TORCH_CHECK(x.dim() == dims && x.size(0) >= 1 && x.size(0) <= 2,
              name, " must be a stack [S, ...] of ", dims, " dimensions with S = 1 or 2, but has shape ", x.sizes());
}

// A tensor of just this shape and dtype.
inline void check_is(const char* name, const Tensor& x, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK(x.sizes() == sizes && x.scalar_type() == dtype, name, " must be ", dtype, " ", sizes, ", but is ",
              x.scalar_type(), " ", x.sizes());
}

// What a backward of n halves finds saved: a stack of n halves or more.
inline void check_saved(const char* name, const Tensor& x, int64_t n, at::IntArrayRef half, at::ScalarType dtype) {
  TORCH_CHECK(x.dim() >= 1 && x.size(0) >= n && x.size(0) <= 2 && x.sizes().slice(1) == half &&
                  x.scalar_type() == dtype,
              name, " must be ", dtype, ", ", n, " to 2 halves of ", half, ", but is ", x.scalar_type(), " ", x.sizes());
}

inline void check_weight(const Tensor& weight, int64_t d) {
  TORCH_CHECK(weight.sizes() == at::IntArrayRef({d}), "weight must be [", d, "], but has shape ", weight.sizes());
}

}  // namespace
}  // namespace sap_fast

// Calls `body` with scalar_t the dtype of storage.
#define SAP_FAST_DISPATCH(x, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, (x).scalar_type(), name, __VA_ARGS__)
