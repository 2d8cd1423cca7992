// Gated linear units of a dual: sap_fast::glu and its backward, fresh or into the buffers of gate and up.
#include "common.h"

#include <ATen/MemoryOverlap.h>

namespace sap_fast {
namespace {

// s(g) and its first two derivatives; sap_fast/ops/glu/README.md has the formulas.
template <class V>
struct Silu {
  static void at(const V& g, V& s, V& s1, V& s2) {
    const V one(1), sigma = one / (one + g.neg().exp());
    const V rest = one - sigma;
    s = g * sigma;
    s1 = sigma * (one + g * rest);
    s2 = sigma * rest * (V(2) + g * (rest - sigma));
  }
};

template <class V>
struct Gelu {
  static void at(const V& g, V& s, V& s1, V& s2) {
    const V cumulative = V(0.5) * (V(1) + (g * V(0.7071067811865476)).erf());
    const V density = V(0.3989422804014327) * (V(-0.5) * g * g).exp();
    s = g * cumulative;
    s1 = cumulative + g * density;
    s2 = density * (V(2) - g * g);
  }
};

template <class V>
struct GeluTanh {
  static void at(const V& g, V& s, V& s1, V& s2) {
    const V one(1), k(1.5957691216057308);
    const V w = k * (g + V(0.044715) * g * g * g), w1 = k * (one + V(0.134145) * g * g), w2 = k * V(0.26829) * g;
    const V sigma = one / (one + w.neg().exp()), rest = one - sigma, sigma1 = sigma * rest;
    s = g * sigma;
    s1 = sigma + g * sigma1 * w1;
    s2 = sigma1 * (V(2) * w1 + g * (w2 + (rest - sigma) * w1 * w1));
  }
};

// f(activation) for the one of this name.
template <class V, class F>
void with_activation(c10::string_view name, const F& f) {
  if (name == "silu") {
    f(Silu<V>{});
  } else if (name == "gelu") {
    f(Gelu<V>{});
  } else {
    TORCH_CHECK(name == "gelu_tanh", "activation must be silu, gelu or gelu_tanh, but is ", name);
    f(GeluTanh<V>{});
  }
}

Tensor glu(const Tensor& gate_in, const Tensor& up_in, c10::string_view activation) {
  check_stack("gate", gate_in, 3);
  check_is("up", up_in, gate_in.sizes(), gate_in.scalar_type());
  const auto gate = gate_in.contiguous(), up = up_in.contiguous();
  const int64_t halves = gate.size(0), half = gate.numel() / halves;
  auto y = at::empty_like(gate);
  SAP_FAST_DISPATCH(gate, "glu", [&] {
    using V = Vec<scalar_t>;
    const auto* pg = gate.const_data_ptr<scalar_t>();
    const auto* pu = up.const_data_ptr<scalar_t>();
    auto* py = y.mutable_data_ptr<scalar_t>();
    with_activation<V>(activation, [&](auto act) {
      parallel_lanes<scalar_t>(half, [&](int64_t first, int64_t last) {
        lanes<scalar_t>(last - first, [&](int64_t j, auto count) {
          const int64_t o = first + j;
          V s, s1, s2;
          act.at(load(pg + o, count), s, s1, s2);
          const V u = load(pu + o, count);
          store(py + o, s * u, count);
          if (halves == 2) {
            store(py + half + o, s1 * load(pg + half + o, count) * u + s * load(pu + half + o, count), count);
          }
        });
      });
    });
  });
  return y;
}

void check(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check_stack("dy", dy, 3);
  check_saved("gate", gate, dy.size(0), dy.sizes().slice(1), dy.scalar_type());
  check_is("up", up, gate.sizes(), gate.scalar_type());
}

// Every element of gate and up is read before it is written, so dgate and dup may be they.
void pull_back(const Tensor& dy_in, const Tensor& gate, const Tensor& up, const Tensor& dgate, const Tensor& dup,
               c10::string_view activation) {
  const auto dy = dy_in.contiguous();
  const bool full = dy.size(0) == 2;
  const int64_t half = dy.numel() / dy.size(0);
  SAP_FAST_DISPATCH(gate, "glu_backward", [&] {
    using V = Vec<scalar_t>;
    const auto* pdy = dy.const_data_ptr<scalar_t>();
    const auto* pdy_dot = pdy + (full ? half : 0);
    const auto* pg = gate.const_data_ptr<scalar_t>();
    const auto* pu = up.const_data_ptr<scalar_t>();
    auto* pdg = dgate.mutable_data_ptr<scalar_t>();
    auto* pdu = dup.mutable_data_ptr<scalar_t>();
    with_activation<V>(activation, [&](auto act) {
      parallel_lanes<scalar_t>(half, [&](int64_t first, int64_t last) {
        lanes<scalar_t>(last - first, [&](int64_t j, auto count) {
          const int64_t o = first + j;
          V s, s1, s2;
          act.at(load(pg + o, count), s, s1, s2);
          const V u = load(pu + o, count), dy_dot = load(pdy_dot + o, count);
          const V dg_dot = dy_dot * s1 * u, du_dot = dy_dot * s;
          if (!full) {
            store(pdg + o, dg_dot, count);
            store(pdu + o, du_dot, count);
            return;
          }
          const V y = load(pdy + o, count), g_dot = load(pg + half + o, count), u_dot = load(pu + half + o, count);
          store(pdg + o, y * s1 * u + dy_dot * (s2 * g_dot * u + s1 * u_dot), count);
          store(pdu + o, y * s + dy_dot * s1 * g_dot, count);
          store(pdg + half + o, dg_dot, count);
          store(pdu + half + o, du_dot, count);
        });
      });
    });
  });
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                        c10::string_view activation) {
  check(dy, gate, up);
  auto dgate = at::empty(dy.sizes(), gate.options()), dup = at::empty(dy.sizes(), up.options());
  pull_back(dy, gate.contiguous(), up.contiguous(), dgate, dup, activation);
  return {dgate, dup};
}

void glu_backward_(const Tensor& dy, Tensor gate, Tensor up, c10::string_view activation) {
  check(dy, gate, up);
  if (gate.is_contiguous() && up.is_contiguous()) {
    pull_back(dy, gate, up, gate, up, activation);
    return;
  }
  // Nothing is written that cannot all be written.
  at::assert_no_internal_overlap(gate);
  at::assert_no_internal_overlap(up);
  const auto [dgate, dup] = glu_backward(dy, gate, up, activation);
  gate.narrow(0, 0, dy.size(0)).copy_(dgate);
  up.narrow(0, 0, dy.size(0)).copy_(dup);
}

}  // namespace
}  // namespace sap_fast

TORCH_LIBRARY_IMPL(sap_fast, CPU, library) {
  library.impl("glu", &sap_fast::glu);
  library.impl("glu_backward", &sap_fast::glu_backward);
  library.impl("glu_backward_", &sap_fast::glu_backward_);
}
