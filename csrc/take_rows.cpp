// Rows taken by an index: sap_fast::take_rows, and its backward, which sums up what each row gets back.
#include "common.h"

namespace sap_fast {
namespace {

Tensor index_of(const char* name, const Tensor& x) {
  TORCH_CHECK(x.dim() == 1 && x.scalar_type() == at::kLong, name, " must be int64 of one dimension, but is ",
              x.scalar_type(), " ", x.sizes());
  return x.contiguous();
}

// [S, count, ...] with another count.
Tensor with_rows(const Tensor& x, int64_t count) {
  auto sizes = x.sizes().vec();
  sizes[1] = count;
  return at::empty(sizes, x.options());
}

void check_rows(const char* name, const Tensor& x) {
  TORCH_CHECK(x.dim() >= 2 && x.size(0) >= 1 && x.size(0) <= 2, name,
              " must be a stack [S, rows, ...] with S = 1 or 2, but has shape ", x.sizes());
}

std::vector<Tensor> take_rows(const std::vector<Tensor>& xs, const Tensor& rows_in) {
  const auto rows = index_of("rows", rows_in);
  const int64_t taken = rows.size(0);
  const auto* pr = rows.const_data_ptr<int64_t>();
  std::vector<Tensor> ys;
  for (const auto& x : xs) {
    check_rows("x", x);
    for (int64_t i = 0; i < taken; ++i) {
      TORCH_CHECK_INDEX(pr[i] >= 0 && pr[i] < x.size(1), "place ", i, " takes row ", pr[i], " of ", x.size(1));
    }
    ys.push_back(with_rows(x, taken));
  }
  for (size_t t = 0; t < xs.size(); ++t) {
    const auto x = xs[t].contiguous();
    const int64_t count = x.size(1), width = count ? x.numel() / (x.size(0) * count) : 0;
    SAP_FAST_DISPATCH(x, "take_rows", [&] {
      const auto* px = x.const_data_ptr<scalar_t>();
      auto* py = ys[t].mutable_data_ptr<scalar_t>();
      parallel_rows(x.size(0) * taken, width, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          std::copy_n(px + (i / taken * count + pr[i % taken]) * width, width, py + i * width);
        }
      });
    });
  }
  return ys;
}

std::vector<Tensor> take_rows_backward(const std::vector<Tensor>& dys, const Tensor& offsets_in,
                                       const Tensor& takers_in) {
  const auto offsets = index_of("offsets", offsets_in), takers = index_of("takers", takers_in);
  const int64_t count = offsets.size(0) - 1, taken = takers.size(0);
  TORCH_CHECK(count >= 0, "offsets must hold one number more than there are rows, but hold none");
  const auto* po = offsets.const_data_ptr<int64_t>();
  const auto* pt = takers.const_data_ptr<int64_t>();
  for (int64_t i = 0; i <= count; ++i) {
    TORCH_CHECK_INDEX(po[i] >= (i ? po[i - 1] : 0) && po[i] <= taken, "offsets must rise from 0 to ", taken,
                      ", but number ", i, " is ", po[i]);
  }
  TORCH_CHECK_INDEX(po[0] == 0 && po[count] == taken, "offsets must rise from 0 to ", taken, ", but are from ", po[0],
                    " to ", po[count]);
  std::vector<Tensor> dxs;
  for (const auto& dy : dys) {
    check_rows("dy", dy);
    TORCH_CHECK(dy.size(1) == taken, "dy must have ", taken, " rows, one for each taker, but has ", dy.size(1));
    for (int64_t i = 0; i < taken; ++i) {
      TORCH_CHECK_INDEX(pt[i] >= 0 && pt[i] < taken, "taker ", i, " is ", pt[i], ", but there are ", taken, " places");
    }
    dxs.push_back(with_rows(dy, count));
  }
  for (size_t t = 0; t < dys.size(); ++t) {
    const auto dy = dys[t].contiguous();
    const int64_t width = taken ? dy.numel() / (dy.size(0) * taken) : dxs[t].numel() / std::max<int64_t>(1, dy.size(0) * count);
    SAP_FAST_DISPATCH(dy, "take_rows_backward", [&] {
      using V = Vec<scalar_t>;
      const auto* pdy = dy.const_data_ptr<scalar_t>();
      auto* pdx = dxs[t].mutable_data_ptr<scalar_t>();
      parallel_rows(dy.size(0) * count, width, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const auto* half = pdy + i / count * taken * width;
          const auto *begin = pt + po[i % count], *end = pt + po[i % count + 1];
          lanes<scalar_t>(width, [&](int64_t j, auto lane_count) {
            V total(compute_t<scalar_t>(0));
            for (const auto* taker = begin; taker != end; ++taker) {
              total = total + load(half + *taker * width + j, lane_count);
            }
            store(pdx + i * width + j, total, lane_count);
          });
        }
      });
    });
  }
  return dxs;
}

}  // namespace
}  // namespace sap_fast

TORCH_LIBRARY_IMPL(sap_fast, CPU, library) {
  library.impl("take_rows", &sap_fast::take_rows);
  library.impl("take_rows_backward", &sap_fast::take_rows_backward);
}
