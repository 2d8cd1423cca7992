// Attention of a dual over packed or padded sequences: sap_fast::attention and its backward on CPU tensors.
//
// Work is cut into blocks: some queries of all heads that share a kv head, as rows with the heads innermost, and all
// the keys that one of them sees. Their scores are whole rows, so softmax needs no online form, and a backward sums
// what it needs of them instead of taking it from o. Memory is linear in the sequence.
#include "sequences.h"

#include <atomic>

namespace sap_fast {
namespace {

// Rows of scores in a block: enough for the products to run at full speed, few enough for them to stay in the caches.
constexpr int64_t kBlockRows = 192;

// Queries [query, query + queries) and keys [key, key + keys) of a sequence.
struct Block {
  int64_t query, queries, key, keys;
};

// f(sequence, kv_head) for all of them, the largest first, each by the next thread that is free.
template <class F>
void for_each_kv_head(std::vector<Sequence> sequences, int64_t kv_heads, const F& f) {
  const auto size = [](const Sequence& x) { return x.queries.real * x.keys.real; };
  std::stable_sort(sequences.begin(), sequences.end(),
                   [&](const Sequence& x, const Sequence& y) { return size(x) > size(y); });
  const int64_t count = static_cast<int64_t>(sequences.size()) * kv_heads;
  std::atomic<int64_t> next{0};
  // As many ranges as threads, even where there is less to do: in a parallel region products start no threads of their
  // own, so they sum in an order that does not depend on how many there are.
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    // Whether autograd is off is known to the calling thread alone.
    const at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t i = next++; i < count; i = next++) {
      f(sequences[i / kv_heads], i % kv_heads);
    }
  });
}

// The blocks of one kv head of a sequence, and room for their scores.
class Blocks {
 public:
  Blocks(const Sequence& sequence, int64_t group, int64_t window, int64_t matrices, at::ScalarType dtype)
      : real_(sequence.queries.real),
        offset_(sequence.offset()),
        group_(group),
        window_(window),
        queries_(std::max<int64_t>(16, kBlockRows / group)) {
    queries_ = std::min({queries_, int64_t(64), real_});
    const int64_t keys = window ? std::min(sequence.keys.real, window + queries_ - 1) : sequence.keys.real;
    room_ = at::empty({matrices, queries_ * group * keys}, at::TensorOptions(dtype));
  }

  template <class F>
  void for_each(const F& f) const {
    for (int64_t i = 0; i < real_; i += queries_) {
      const int64_t queries = std::min(queries_, real_ - i), key = first_seen(i);
      f(Block{i, queries, key, offset_ + i + queries - key});
    }
  }

  // The i-th matrix of a block: [queries * group, keys].
  Tensor matrix(int64_t i, const Block& block) const {
    const int64_t rows = block.queries * group_;
    return room_.select(0, i).narrow(0, 0, rows * block.keys).view({rows, block.keys});
  }

  // f(row, begin, end): the row's query sees the keys [begin, end) of the block's.
  template <class F>
  void for_each_row(const Block& block, const F& f) const {
    for (int64_t row = 0; row < block.queries * group_; ++row) {
      const int64_t query = block.query + row / group_;
      f(row, first_seen(query) - block.key, offset_ + query + 1 - block.key);
    }
  }

 private:
  int64_t first_seen(int64_t query) const {
    return window_ ? std::max<int64_t>(0, offset_ + query - window_ + 1) : 0;
  }

  int64_t real_, offset_, group_, window_, queries_;
  Tensor room_;
};

// Of one half of x [S, rows, heads, d], `count` rows of some heads, widened: [count * heads, d].
Tensor tile(const Tensor& x, int64_t half, int64_t first, int64_t count, int64_t head, int64_t heads) {
  const auto part = x.select(0, half).narrow(0, first, count).narrow(1, head, heads);
  return part.to(compute_type(x)).reshape({count * heads, x.size(3)});
}

// The counterpart of `tile`.
void put(const Tensor& x, int64_t half, int64_t first, int64_t count, int64_t head, int64_t heads, const Tensor& from) {
  x.select(0, half).narrow(0, first, count).narrow(1, head, heads).copy_(from.view({count, heads, x.size(3)}));
}

template <class C>
void clear_hidden(C* x, int64_t begin, int64_t end, int64_t keys) {
  std::fill(x, x + begin, C(0));
  std::fill(x + end, x + keys, C(0));
}

// p = softmax(s), p_dot = p (s_dot - mu) in place of s and s_dot, which may be null; returns (lse, mu).
template <class C>
std::pair<C, C> softmax(C* s, C* s_dot, int64_t begin, int64_t end, int64_t keys) {
  using V = Vec<C>;
  V largest(-std::numeric_limits<C>::infinity());
  lanes<C>(end - begin, [&](int64_t j, auto count) {
    largest = V::set(largest, at::vec::maximum(largest, V::loadu(s + begin + j, count)), count);
  });
  const C top = at::vec::vec_reduce_all<C>([](V& a, V& b) { return at::vec::maximum(a, b); }, largest);
  Total<C> total, total_dot;
  lanes<C>(end - begin, [&](int64_t j, auto count) {
    const V p = V::set(V(C(0)), (V::loadu(s + begin + j, count) - V(top)).exp(), count);
    total.add(p);
    p.store(s + begin + j, count);
    if (s_dot != nullptr) {
      total_dot.add(p * V::loadu(s_dot + begin + j, count));
    }
  });
  const C whole = total.value(), mu = total_dot.value() / whole;
  const V share(C(1) / whole);
  lanes<C>(end - begin, [&](int64_t j, auto count) {
    const V p = V::loadu(s + begin + j, count) * share;
    p.store(s + begin + j, count);
    if (s_dot != nullptr) {
      // The mean goes before the product with v does: a large mean would cost o_dot the digits it is left with.
      (p * (V::loadu(s_dot + begin + j, count) - V(mu))).store(s_dot + begin + j, count);
    }
  });
  clear_hidden(s, begin, end, keys);
  if (s_dot != nullptr) {
    clear_hidden(s_dot, begin, end, keys);
  }
  return {top + std::log(whole), mu};
}

// One row of a backward's four matrices; what half mode has none of is null.
template <class C>
struct Row {
  C *s, *s_dot, *dp, *dp_dot;
};

// p and p_dot in place of s and s_dot, ds and ds_dot in place of dp and dp_dot.
//
// With the row at hand lse and mu are but shifts. Its own sums do what they and o would do, without the rounding of
// these: sum p = 1, mu = sum p s_dot, delta_dot = sum p dp_dot, delta = sum (p dp + p_dot dp_dot), and ds sums to zero.
template <class C>
void pull_back(const Row<C>& row, C lse, C mu, int64_t begin, int64_t end, int64_t keys) {
  using V = Vec<C>;
  const bool full = row.s_dot != nullptr;
  Total<C> p_sum, rate_sum, delta_sum, delta_dot_sum;
  lanes<C>(end - begin, [&](int64_t k, auto count) {
    const int64_t j = begin + k;
    const V p = V::set(V(C(0)), (V::loadu(row.s + j, count) - V(lse)).exp(), count);
    const V dp_dot = V::loadu(row.dp_dot + j, count);
    p.store(row.s + j, count);
    p_sum.add(p);
    delta_dot_sum.add(p * dp_dot);
    if (full) {
      const V rate = V::loadu(row.s_dot + j, count) - V(mu);
      rate_sum.add(p * rate);
      delta_sum.add(p * at::vec::fmadd(rate, dp_dot, V::loadu(row.dp + j, count)));
    }
  });
  const double whole = p_sum.value(), mean = rate_sum.value() / whole, slope = delta_dot_sum.value() / whole;
  const C share = 1 / whole, mean_rate = mean, delta_dot = slope, delta = delta_sum.value() / whole - mean * slope;
  lanes<C>(end - begin, [&](int64_t k, auto count) {
    const int64_t j = begin + k;
    const V p = V::loadu(row.s + j, count) * V(share), rest_dot = V::loadu(row.dp_dot + j, count) - V(delta_dot);
    p.store(row.s + j, count);
    (p * rest_dot).store(row.dp_dot + j, count);
    if (full) {
      const V p_dot = p * (V::loadu(row.s_dot + j, count) - V(mu + mean_rate));
      p_dot.store(row.s_dot + j, count);
      (p_dot * rest_dot + p * (V::loadu(row.dp + j, count) - V(delta))).store(row.dp + j, count);
    }
  });
  for (C* x : {row.s, row.s_dot, row.dp, row.dp_dot}) {
    if (x != nullptr) {
      clear_hidden(x, begin, end, keys);
    }
  }
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window) {
  TORCH_CHECK(window >= 0, "window must be at least 1, or 0 for none, but is ", window);
  for (const auto& [name, x] : {std::pair("q", q), std::pair("k", k), std::pair("v", v)}) {
    check_stack(name, x, 4);
    TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, " must be ", q.scalar_type(), ", but is ", x.scalar_type());
  }
  TORCH_CHECK(k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(3) == k.size(3),
              "q, k and v do not fit: ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK(k.size(2) >= 1 && q.size(2) >= 1 && q.size(2) % k.size(2) == 0, "heads must be a multiple of kv_heads, but are ", q.size(2),
              " and ", k.size(2));
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                     const std::optional<Tensor>& seqused, const std::optional<Tensor>& cu_seqlens_k,
                                     int64_t max_seqlen, int64_t max_seqlen_k, double scale, int64_t window) {
  const WithoutAutocast guard;
  check(q, k, v, window);
  const bool dual = q.size(0) == 2;
  const int64_t rows = q.size(1), heads = q.size(2), group = heads / k.size(2);
  const Cut cut{cu_seqlens, seqused, cu_seqlens_k, max_seqlen, max_seqlen_k};
  const auto sequences = cut.sequences(rows, k.size(1));
  auto o = at::empty(q.sizes(), q.options());
  auto lse = at::empty({q.size(0), rows, heads}, q.options().dtype(compute_type(q)));
  clear_rest(o, sequences, &Sequence::queries);
  clear_rest(lse, sequences, &Sequence::queries);
  AT_DISPATCH_FLOATING_TYPES(compute_type(q), "attention", [&] {
    auto* pl = lse.mutable_data_ptr<scalar_t>();
    for_each_kv_head(sequences, k.size(2), [&](const Sequence& sequence, int64_t kv_head) {
      const auto of_keys = [&](const Tensor& x, int64_t half) {
        return tile(x, half, sequence.keys.first, sequence.keys.real, kv_head, 1);
      };
      const auto all_k = of_keys(k, 0), all_v = of_keys(v, 0);
      const auto all_k_dot = dual ? of_keys(k, 1) : Tensor(), all_v_dot = dual ? of_keys(v, 1) : Tensor();
      const Blocks blocks(sequence, group, window, 2, compute_type(q));
      blocks.for_each([&](const Block& block) {
        const int64_t first = sequence.queries.first + block.query, head = kv_head * group;
        const auto seen = [&](const Tensor& x) { return x.narrow(0, block.key, block.keys); };
        const auto k0 = seen(all_k), v0 = seen(all_v), q0 = tile(q, 0, first, block.queries, head, group).mul(scale);
        auto p = blocks.matrix(0, block), p_dot = blocks.matrix(1, block);
        at::mm_out(p, q0, k0.t());
        if (dual) {
          at::mm_out(p_dot, tile(q, 1, first, block.queries, head, group).mul(scale), k0.t());
          p_dot.addmm_(q0, seen(all_k_dot).t());
        }
        auto *ps = p.template mutable_data_ptr<scalar_t>(), *ps_dot = p_dot.template mutable_data_ptr<scalar_t>();
        blocks.for_each_row(block, [&](int64_t row, int64_t begin, int64_t end) {
          auto* s_dot = dual ? ps_dot + row * block.keys : nullptr;
          const auto [l, mu] = softmax(ps + row * block.keys, s_dot, begin, end, block.keys);
          const int64_t at = (first + row / group) * heads + head + row % group;
          pl[at] = l;
          if (dual) {
            pl[rows * heads + at] = mu;
          }
        });
        put(o, 0, first, block.queries, head, group, at::mm(p, v0));
        if (dual) {
          put(o, 1, first, block.queries, head, group, at::mm(p, seen(all_v_dot)).addmm_(p_dot, v0));
        }
      });
    });
  });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& /*o*/, const Tensor& lse_in,
                                                      const Tensor& cu_seqlens, const std::optional<Tensor>& seqused,
                                                      const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen,
                                                      int64_t max_seqlen_k, double scale, int64_t window) {
  const WithoutAutocast guard;
  check(q, k, v, window);
  check_stack("do", d_o, 4);
  const int64_t n = d_o.size(0), last = n - 1, rows = q.size(1), heads = q.size(2), group = heads / k.size(2);
  const bool full = n == 2;
  TORCH_CHECK(n <= q.size(0) && d_o.sizes().slice(1) == q.sizes().slice(1) && d_o.scalar_type() == q.scalar_type(),
              "do must be ", q.scalar_type(), " of the shape of q, but is ", d_o.scalar_type(), " ", d_o.sizes());
  const Cut cut{cu_seqlens, seqused, cu_seqlens_k, max_seqlen, max_seqlen_k};
  const auto sequences = cut.sequences(rows, k.size(1));
  const auto lse = lse_in.contiguous();
  check_saved("lse", lse, n, {rows, heads}, compute_type(q));
  const auto empty = [&](const Tensor& x) { return at::empty({n, x.size(1), x.size(2), x.size(3)}, x.options()); };
  const auto dq = empty(q), dk = empty(k), dv = empty(v);
  clear_rest(dq, sequences, &Sequence::queries);
  clear_rest(dk, sequences, &Sequence::keys);
  clear_rest(dv, sequences, &Sequence::keys);
  AT_DISPATCH_FLOATING_TYPES(compute_type(q), "attention_backward", [&] {
    const auto* pl = lse.const_data_ptr<scalar_t>();
    for_each_kv_head(sequences, k.size(2), [&](const Sequence& sequence, int64_t kv_head) {
      const auto of_keys = [&](const Tensor& x, int64_t half) {
        return tile(x, half, sequence.keys.first, sequence.keys.real, kv_head, 1);
      };
      const auto all_k = of_keys(k, 0), all_v = of_keys(v, 0);
      const auto all_k_dot = full ? of_keys(k, 1) : Tensor(), all_v_dot = full ? of_keys(v, 1) : Tensor();
      // Summed over the blocks, and over the group's heads as rows of a block: always in the same order.
      const auto sums = at::zeros({2, n, sequence.keys.real, q.size(3)}, all_k.options());
      const Blocks blocks(sequence, group, window, full ? 4 : 2, compute_type(q));
      blocks.for_each([&](const Block& block) {
        const int64_t first = sequence.queries.first + block.query, head = kv_head * group;
        const auto seen = [&](const Tensor& x) { return x.narrow(0, block.key, block.keys); };
        const auto of_queries = [&](const Tensor& x, int64_t half) {
          return tile(x, half, first, block.queries, head, group);
        };
        const auto k0 = seen(all_k), v0 = seen(all_v), q0 = of_queries(q, 0).mul(scale);
        const auto do_dot = of_queries(d_o, last);
        auto p = blocks.matrix(0, block), ds_dot = blocks.matrix(1, block);
        at::mm_out(p, q0, k0.t());
        at::mm_out(ds_dot, do_dot, v0.t());
        Tensor q_dot, do_0, k_dot, p_dot, ds;
        if (full) {
          q_dot = of_queries(q, 1).mul(scale), do_0 = of_queries(d_o, 0), k_dot = seen(all_k_dot);
          p_dot = blocks.matrix(2, block), ds = blocks.matrix(3, block);
          at::mm_out(p_dot, q_dot, k0.t()).addmm_(q0, k_dot.t());
          at::mm_out(ds, do_0, v0.t()).addmm_(do_dot, seen(all_v_dot).t());
        }

        const auto data = [](const Tensor& x) {
          return x.defined() ? x.template mutable_data_ptr<scalar_t>() : nullptr;
        };
        const Row<scalar_t> start{data(p), data(p_dot), data(ds), data(ds_dot)};
        blocks.for_each_row(block, [&](int64_t row, int64_t begin, int64_t end) {
          const auto of_row = [&](scalar_t* x) { return x == nullptr ? x : x + row * block.keys; };
          const auto* l = pl + (first + row / group) * heads + head + row % group;
          pull_back<scalar_t>({of_row(start.s), of_row(start.s_dot), of_row(start.dp), of_row(start.dp_dot)}, *l,
                              full ? l[rows * heads] : scalar_t(0), begin, end, block.keys);
        });

        const auto sum_of = [&](int64_t i, int64_t half) { return seen(sums.select(0, i).select(0, half)); };
        // q carries the scale already.
        sum_of(0, last).addmm_(ds_dot.t(), q0);
        sum_of(1, last).addmm_(p.t(), do_dot);
        put(dq, last, first, block.queries, head, group, at::mm(ds_dot, k0).mul_(scale));
        if (full) {
          sum_of(0, 0).addmm_(ds.t(), q0).addmm_(ds_dot.t(), q_dot);
          sum_of(1, 0).addmm_(p.t(), do_0).addmm_(p_dot.t(), do_dot);
          put(dq, 0, first, block.queries, head, group, at::mm(ds, k0).addmm_(ds_dot, k_dot).mul_(scale));
        }
      });
      for (int64_t half = 0; half < n; ++half) {
        put(dk, half, sequence.keys.first, sequence.keys.real, kv_head, 1, sums.select(0, 0).select(0, half));
        put(dv, half, sequence.keys.first, sequence.keys.real, kv_head, 1, sums.select(0, 1).select(0, half));
      }
    });
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace sap_fast

TORCH_LIBRARY_IMPL(sap_fast, CPU, library) {
  library.impl("attention", &sap_fast::attention);
  library.impl("attention_backward", &sap_fast::attention_backward);
}
