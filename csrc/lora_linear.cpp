// Frozen linear maps with LoRA adapters on a dual: sap_fast::lora_linear and its backward on CPU tensors.
//
// The frozen products are ATen's, on both halves at once. Adapters are thin, so what they cost is reading x, y and
// their cotangents: a few rows at a time are widened, masked, contracted and expanded while they are in the cache.
// The formulas are those of sap_fast/ops/lora_linear/README.md.
#include "thin_products.h"

namespace sap_fast {
namespace {

using Optionals = c10::List<std::optional<Tensor>>;

// One adapter: a [rank, d_in] and b, transposed, [rank, d_out], in the compute dtype; tangents where they are read.
struct Adapter {
  int64_t target, rank, d_out;
  Tensor a, b, a_dot, b_dot;
  double scaling;
  Mask mask;
};

void check_weights(const Tensor& x, at::TensorList weights) {
  for (const auto& weight : weights) {
    TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(2) && weight.scalar_type() == x.scalar_type(),
                "weight must be ", x.scalar_type(), " [d_out, ", x.size(2), "], but is ", weight.scalar_type(), " ",
                weight.sizes());
  }
}

// d_out of each target: the size of tensors along a dimension.
std::vector<int64_t> widths_of(at::TensorList tensors, int64_t dim) {
  std::vector<int64_t> widths;
  for (const auto& tensor : tensors) {
    widths.push_back(tensor.size(dim));
  }
  return widths;
}

std::vector<Adapter> adapters_of(const Tensor& x, const std::vector<int64_t>& widths, const Optionals& a,
                                 const Optionals& b, const Optionals& a_dot, const Optionals& b_dot, const Tensor& seed,
                                 at::ArrayRef<double> scaling, at::ArrayRef<double> dropout, at::IntArrayRef salt,
                                 bool dual) {
  const size_t targets = widths.size();
  TORCH_CHECK(a.size() == targets && b.size() == targets && a_dot.size() == targets && b_dot.size() == targets &&
                  scaling.size() == targets && dropout.size() == targets && salt.size() == targets,
              "all lists must have one element for each of the ", targets, " targets");
  const int64_t drawn = seed.item<int64_t>();
  const auto dtype = compute_type(x);
  std::vector<Adapter> adapters;
  for (size_t i = 0; i < targets; ++i) {
    const std::optional<Tensor> a_i = a.get(i), b_i = b.get(i), a_dot_i = a_dot.get(i), b_dot_i = b_dot.get(i);
    if (!a_i || !b_i) {
      continue;
    }
    TORCH_CHECK(dropout[i] >= 0 && dropout[i] < 1, "dropout must be at least 0 and less than 1, but is ", dropout[i]);
    const int64_t d_out = widths[i], rank = a_i->size(0);
    const auto wide_a = [&](const Tensor& m) {
      TORCH_CHECK(m.sizes() == at::IntArrayRef({rank, x.size(2)}), "a must be ", rank, " x ", x.size(2), ", but is ",
                  m.sizes());
      return m.to(dtype).contiguous();
    };
    const auto wide_b = [&](const Tensor& m) {
      TORCH_CHECK(m.sizes() == at::IntArrayRef({d_out, rank}), "b must be ", d_out, " x ", rank, ", but is ",
                  m.sizes());
      return m.t().to(dtype).contiguous();
    };
    Adapter adapter{static_cast<int64_t>(i), rank, d_out,      wide_a(*a_i), wide_b(*b_i), {}, {},
                    scaling[i],              Mask(drawn, salt[i], dropout[i])};
    if (dual) {
      TORCH_CHECK(a_dot_i && b_dot_i, "a_dot and b_dot belong to a dual");
      adapter.a_dot = wide_a(*a_dot_i), adapter.b_dot = wide_b(*b_dot_i);
    }
    adapters.push_back(std::move(adapter));
  }
  return adapters;
}

// A few rows of x, as the adapters see them: widened, and masked for one adapter after the other.
template <class T>
struct Rows {
  using C = compute_t<T>;
  const T* x;
  int64_t rows, d, halves;  // of the whole stack, of which `halves` are read
  int64_t first = 0, count = 0;
  const C *keep = nullptr, *z = nullptr, *z_dot = nullptr;
  std::vector<C> keep_room, room, room_dot;
  const Mask* mask = nullptr;

  Rows(const Tensor& stack, int64_t read)
      : x(stack.const_data_ptr<T>()), rows(stack.size(1)), d(stack.size(2)), halves(read) {}

  void move(int64_t to_first, int64_t to_count) {
    first = to_first, count = to_count, mask = nullptr;
  }

  void see(const Mask& next) {
    if (mask != nullptr && *mask == next) {
      return;
    }
    mask = &next, keep = nullptr;
    if (next.p != 0.0) {
      keep_room.resize(kGroup * d);
      for (int64_t i = 0; i < count; ++i) {
        next.draw(first + i, 0, d, keep_room.data() + i * d);
      }
      keep = keep_room.data();
    }
    z = widened(x + first * d, count * d, keep, room);
    z_dot = halves == 2 ? widened(x + (rows + first) * d, count * d, keep, room_dot) : nullptr;
  }
};

// f(first, last) over ranges of groups of kGroup rows, in parallel.
template <class F>
void parallel_groups(int64_t rows, int64_t width, const F& f) {
  parallel_rows((rows + kGroup - 1) / kGroup, kGroup * width, f);
}

// Adds what the adapters give of x, which is contiguous, to the contiguous ys.
void add_adapters(at::TensorList ys, const Tensor& x, const std::vector<Adapter>& adapters) {
  const int64_t halves = x.size(0), rows = x.size(1), d = x.size(2);
  SAP_FAST_DISPATCH(x, "lora_linear", [&] {
    using C = compute_t<scalar_t>;
    parallel_groups(adapters.empty() ? 0 : rows, d, [&](int64_t begin, int64_t end) {
      Rows<scalar_t> group(x, halves);
      std::vector<C> t, t_dot, room;
      for (int64_t i = begin * kGroup; i < std::min(rows, end * kGroup); i += kGroup) {
        const int64_t count = std::min(kGroup, rows - i);
        group.move(i, count);
        for (const auto& one : adapters) {
          group.see(one.mask);
          const auto *m = data<C>(one.a), *m_dot = data<C>(one.a_dot), *e = data<C>(one.b), *e_dot = data<C>(one.b_dot);
          t.assign(count * one.rank, C(0));
          contract(group.z, count, d, m, one.rank, C(one.scaling), t.data());
          auto* y = ys[one.target].mutable_data_ptr<scalar_t>();
          const auto size = count * one.d_out;
          accumulate(y, {y}, i * one.d_out, size, room, [&](C* z) {
            expand<C>(z, count, one.d_out, t.data(), e, nullptr, nullptr, one.rank, nullptr);
          });
          if (halves == 2) {
            t_dot.assign(count * one.rank, C(0));
            contract(group.z_dot, count, d, m, one.rank, C(one.scaling), t_dot.data());
            contract(group.z, count, d, m_dot, one.rank, C(one.scaling), t_dot.data());
            accumulate(y, {y}, (rows + i) * one.d_out, size, room, [&](C* z) {
              expand<C>(z, count, one.d_out, t_dot.data(), e, t.data(), e_dot, one.rank, nullptr);
            });
          }
        }
      }
    });
  });
}

std::vector<Tensor> lora_linear(const Tensor& x_in, at::TensorList weights, const Optionals& biases, const Optionals& a,
                                const Optionals& b, const Optionals& a_dot, const Optionals& b_dot, const Tensor& seed,
                                at::ArrayRef<double> scaling, at::ArrayRef<double> dropout, at::IntArrayRef salt) {
  const WithoutAutocast guard;
  check_stack("x", x_in, 3);
  const auto x = x_in.contiguous();
  const int64_t halves = x.size(0), rows = x.size(1), d = x.size(2);
  TORCH_CHECK(biases.size() == weights.size(), "bias must have one element for each of the ", weights.size(), " weights");
  check_weights(x, weights);
  const auto adapters =
      adapters_of(x, widths_of(weights, 0), a, b, a_dot, b_dot, seed, scaling, dropout, salt, halves == 2);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (const std::optional<Tensor> bias = biases.get(i)) {
      check_is("bias", *bias, {weights[i].size(0)}, bias->scalar_type());
    }
  }
  std::vector<Tensor> ys;
  for (size_t i = 0; i < weights.size(); ++i) {
    ys.push_back(at::mm(x.view({halves * rows, d}), weights[i].t()).view({halves, rows, weights[i].size(0)}));
    if (const std::optional<Tensor> bias = biases.get(i)) {
      ys.back().select(0, 0).add_(*bias);  // affine: the tangent has none
    }
  }
  add_adapters(ys, x, adapters);
  return ys;
}

// ... of products that are there: adds biases and adapters to them.
void lora_linear_(at::TensorList ys, const Tensor& x_in, const Optionals& biases, const Optionals& a,
                  const Optionals& b, const Optionals& a_dot, const Optionals& b_dot, const Tensor& seed,
                  at::ArrayRef<double> scaling, at::ArrayRef<double> dropout, at::IntArrayRef salt) {
  const WithoutAutocast guard;
  check_stack("x", x_in, 3);
  const auto x = x_in.contiguous();
  const int64_t halves = x.size(0), rows = x.size(1);
  TORCH_CHECK(!ys.empty() && biases.size() == ys.size(), "bias must have one element for each of the ", ys.size(), " y");
  for (size_t i = 0; i < ys.size(); ++i) {
    TORCH_CHECK(ys[i].dim() == 3 && ys[i].is_contiguous(), "y must be contiguous [", halves, ", ", rows,
                ", d_out], but is ", ys[i].sizes());
    check_is("y", ys[i], {halves, rows, ys[i].size(2)}, x.scalar_type());
    if (const std::optional<Tensor> bias = biases.get(i)) {
      check_is("bias", *bias, {ys[i].size(2)}, bias->scalar_type());
    }
  }
  const auto adapters =
      adapters_of(x, widths_of(ys, 2), a, b, a_dot, b_dot, seed, scaling, dropout, salt, halves == 2);
  for (size_t i = 0; i < ys.size(); ++i) {
    if (const std::optional<Tensor> bias = biases.get(i)) {
      ys[i].select(0, 0).add_(*bias);  // affine: the tangent has none
    }
  }
  add_adapters(ys, x, adapters);
}

// dy W summed over targets: one product in the compute dtype, or all of them, each rounded to storage by ATen.
std::vector<Tensor> frozen_products(const std::vector<Tensor>& dys, at::TensorList weights) {
  std::vector<Tensor> products;
  for (size_t i = 0; i < dys.size(); ++i) {
    const auto dy = dys[i].view({-1, weights[i].size(0)});
    if (i > 0 && dy.scalar_type() == compute_type(dy)) {
      products[0].addmm_(dy, weights[i]);
    } else {
      products.push_back(at::mm(dy, weights[i]));
    }
  }
  return products;
}

using Gradients = std::pair<std::vector<Tensor>, std::vector<Tensor>>;

// The gradients of the adapters. The first product becomes dx: the sum of the products and of what the adapters give;
// without products it is not needed. All tensors but x are contiguous. Without adapters x gives its shape alone.
Gradients adapters_backward(const std::vector<Tensor>& dys, const Tensor& x_in, const std::vector<Tensor>& products,
                            const std::vector<Adapter>& adapters) {
  const auto x = adapters.empty() ? x_in : x_in.contiguous();
  const int64_t n = dys[0].size(0), rows = x.size(1), d = x.size(2);
  const bool full = n == 2, need_dx = !products.empty();
  const auto wide = x.options().dtype(compute_type(x));
  std::vector<Tensor> das(dys.size(), Tensor()), dbs(dys.size(), Tensor()), ts, dts;
  for (const auto& one : adapters) {
    ts.push_back(at::zeros({rows, one.rank}, wide));
    dts.push_back(at::zeros({rows, one.rank}, wide));
  }

  SAP_FAST_DISPATCH(x, "lora_linear_backward", [&] {
    using C = compute_t<scalar_t>;
    const auto* px = x.const_data_ptr<scalar_t>();
    std::vector<const scalar_t*> sources;
    for (const auto& product : products) {
      sources.push_back(product.const_data_ptr<scalar_t>());
    }
    auto* pdx = need_dx ? products[0].mutable_data_ptr<scalar_t>() : nullptr;
    parallel_groups(adapters.empty() && sources.size() < 2 ? 0 : rows, d, [&](int64_t begin, int64_t end) {
      Rows<scalar_t> group(x, 1);
      std::vector<C> dt_primal, room, room_dot, dy_room, dy_dot_room;
      for (int64_t i = begin * kGroup; i < std::min(rows, end * kGroup); i += kGroup) {
        const int64_t count = std::min(kGroup, rows - i);
        group.move(i, count);
        // dz and dz_dot are these rows of dx, or null.
        const auto each_adapter = [&](C* dz, C* dz_dot) {
          for (size_t k = 0; k < adapters.size(); ++k) {
            const auto& one = adapters[k];
            const int64_t d_out = one.d_out, rank = one.rank, size = count * d_out;
            const auto *m = data<C>(one.a), *m_dot = data<C>(one.a_dot);
            const auto *e = data<C>(one.b), *e_dot = data<C>(one.b_dot);
            group.see(one.mask);
            contract(group.z, count, d, m, rank, C(one.scaling), ts[k].mutable_data_ptr<C>() + i * rank);
            const auto* dy = dys[one.target].const_data_ptr<scalar_t>() + i * d_out;
            const auto* dy_dot = widened<scalar_t>(dy + (n - 1) * rows * d_out, size, nullptr, dy_dot_room);
            auto* dt_dot = dts[k].mutable_data_ptr<C>() + i * rank;
            contract(dy_dot, count, d_out, e, rank, C(one.scaling), dt_dot);
            if (dz_dot != nullptr) {
              expand<C>(dz_dot, count, d, dt_dot, m, nullptr, nullptr, rank, group.keep);
            }
            if (dz != nullptr) {
              dt_primal.assign(count * rank, C(0));
              contract(widened<scalar_t>(dy, size, nullptr, dy_room), count, d_out, e, rank, C(one.scaling),
                       dt_primal.data());
              contract(dy_dot, count, d_out, e_dot, rank, C(one.scaling), dt_primal.data());
              expand<C>(dz, count, d, dt_primal.data(), m, dt_dot, m_dot, rank, group.keep);
            }
          }
        };
        if (!need_dx) {
          each_adapter(nullptr, nullptr);
          continue;
        }
        accumulate(pdx, sources, ((n - 1) * rows + i) * d, count * d, room_dot, [&](C* dz_dot) {
          if (full) {
            accumulate(pdx, sources, i * d, count * d, room, [&](C* dz) { each_adapter(dz, dz_dot); });
          } else {
            each_adapter(nullptr, dz_dot);
          }
        });
      }
    });

    std::vector<std::pair<Outer<scalar_t>, int64_t>> sums;
    const auto add = [&](const Outer<scalar_t>& outer) {
      for (int64_t column = 0; column < outer.d; column += Outer<scalar_t>::kColumns) {
        sums.emplace_back(outer, column);
      }
    };
    for (size_t k = 0; k < adapters.size(); ++k) {
      const auto& one = adapters[k];
      const int64_t i = one.target, d_out = one.d_out, rank = one.rank;
      das[i] = at::empty({rank, d}, wide), dbs[i] = at::empty({rank, d_out}, wide);
      const auto* dy_dot = dys[i].const_data_ptr<scalar_t>() + (n - 1) * rows * d_out;
      add({px, data<C>(dts[k]), das[i].mutable_data_ptr<C>(), rows, d, rank, &one.mask});
      add({dy_dot, data<C>(ts[k]), dbs[i].mutable_data_ptr<C>(), rows, d_out, rank, nullptr});
    }
    parallel_rows(sums.size(), rows * Outer<scalar_t>::kColumns, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        sums[k].first(sums[k].second);
      }
    });
  });
  for (size_t i = 0; i < dys.size(); ++i) {
    das[i] = das[i].defined() ? das[i] : at::empty({0}, wide);
    dbs[i] = dbs[i].defined() ? dbs[i].t().contiguous() : at::empty({0}, wide);
  }
  return {das, dbs};
}

std::vector<Tensor> contiguous_cotangents(at::TensorList dys_in, const Tensor& x, const std::vector<int64_t>& widths) {
  TORCH_CHECK(!dys_in.empty() && dys_in.size() == widths.size(), "dy must be given for each of ", widths.size(),
              " weights, but there are ", dys_in.size());
  check_stack("dy", dys_in[0], 3);
  const int64_t n = dys_in[0].size(0);
  TORCH_CHECK(n <= x.size(0), "dy has ", n, " halves, but x only ", x.size(0));
  std::vector<Tensor> dys;
  for (size_t i = 0; i < widths.size(); ++i) {
    check_is("dy", dys_in[i], {n, x.size(1), widths[i]}, x.scalar_type());
    dys.push_back(dys_in[i].contiguous());
  }
  return dys;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_linear_backward(
    at::TensorList dys_in, const Tensor& x, at::TensorList weights, const Optionals& a, const Optionals& b,
    const Optionals& a_dot, const Optionals& b_dot, const Tensor& seed, at::ArrayRef<double> scaling,
    at::ArrayRef<double> dropout, at::IntArrayRef salt, bool need_dx) {
  const WithoutAutocast guard;
  check_stack("x", x, 3);
  check_weights(x, weights);
  const auto widths = widths_of(weights, 0);
  const auto dys = contiguous_cotangents(dys_in, x, widths);
  const int64_t n = dys[0].size(0);
  const auto adapters = adapters_of(x, widths, a, b, a_dot, b_dot, seed, scaling, dropout, salt, n == 2);
  const auto products = need_dx ? frozen_products(dys, weights) : std::vector<Tensor>();
  const auto shape = std::vector<int64_t>{need_dx ? n : 0, x.size(1), x.size(2)};
  auto [das, dbs] = adapters_backward(dys, x, products, adapters);
  return {need_dx ? products[0].view(shape) : at::empty(shape, x.options()), std::move(das), std::move(dbs)};
}

// ... of products that are there, the first of which becomes dx.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> lora_linear_backward_(
    at::TensorList products_in, at::TensorList dys_in, const Tensor& x, const Optionals& a, const Optionals& b,
    const Optionals& a_dot, const Optionals& b_dot, const Tensor& seed, at::ArrayRef<double> scaling,
    at::ArrayRef<double> dropout, at::IntArrayRef salt) {
  const WithoutAutocast guard;
  check_stack("x", x, 3);
  for (const auto& dy : dys_in) {
    check_stack("dy", dy, 3);
  }
  const auto widths = widths_of(dys_in, 2);
  const auto dys = contiguous_cotangents(dys_in, x, widths);
  const int64_t n = dys[0].size(0);
  for (const auto& product : products_in) {
    check_is("product", product, {n, x.size(1), x.size(2)}, x.scalar_type());
    TORCH_CHECK(product.is_contiguous(), "product must be contiguous, but has strides ", product.strides());
  }
  const auto adapters = adapters_of(x, widths, a, b, a_dot, b_dot, seed, scaling, dropout, salt, n == 2);
  auto [das, dbs] = adapters_backward(dys, x, products_in.vec(), adapters);
  return {std::move(das), std::move(dbs)};
}

}  // namespace
}  // namespace sap_fast

TORCH_LIBRARY_IMPL(sap_fast, CPU, library) {
  library.impl("lora_linear", &sap_fast::lora_linear);
  library.impl("lora_linear_", &sap_fast::lora_linear_);
  library.impl("lora_linear_backward", &sap_fast::lora_linear_backward);
  library.impl("lora_linear_backward_", &sap_fast::lora_linear_backward_);
}
