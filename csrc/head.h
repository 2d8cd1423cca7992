// The output head, made ready for its two products with rows in their storage dtype: to logits, and from their
// cotangents back. Both are summed and returned in the compute dtype.
//
// In bfloat16 a product of ATen's returns bfloat16, too coarse for exp(z - lse), and for rows that are yet to be scaled
// and rounded; widened to float32 it does without the processor's bfloat16 unit. Where there is one, oneDNN's block
// product (which ATen exports) multiplies bfloat16 and returns float32.
#pragma once

#include "common.h"

#include <ATen/native/CPUBlas.h>

namespace sap_fast {
namespace {

class Head {
 public:
  // weight [vocab, d], for rows in `storage`.
  Head(const Tensor& weight, at::ScalarType storage) : vocab_(weight.size(0)), d_(weight.size(1)) {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
    if (storage == at::kBFloat16 && weight.scalar_type() == storage && d_ % 2 == 0 && d_ > 0 &&
        at::native::cpublas::could_pack(storage)) {
      narrow_ = weight.contiguous();
      packed_ = pack(narrow_);
      return;
    }
#endif
    wide_ = weight.to(storage == at::kDouble ? at::kDouble : at::kFloat);
  }

  // Whether pull() takes bfloat16, as the processor's unit does.
  bool narrow() const { return packed_.defined(); }

  // z = rows W^T of rows [m, d], into z [m, vocab] in the compute dtype.
  void logits(const Tensor& rows, Tensor z) const {
    if (!narrow()) {
      at::mm_out(z, rows.to(wide_.scalar_type()), wide_.t());
      return;
    }
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
    const auto* x = rows.const_data_ptr<at::BFloat16>();
    const auto* w = reinterpret_cast<const at::BFloat16*>(packed_.const_data_ptr<float>());
    auto* pz = z.mutable_data_ptr<float>();
    at::parallel_for(0, rows.size(0) > 0 ? packed_.size(0) : 0, 8, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t column = block * kColumns;
        at::native::cpublas::brgemm(rows.size(0), std::min(kColumns, vocab_ - column), d_, d_, kColumns, vocab_, false,
                                    x, w + column * d_, pz + column);
      }
      at::native::cpublas::brgemm_release();
    });
#endif
  }

  // x = dz W, into x [m, d] in the compute dtype. dz is [m, vocab], in bfloat16 if narrow(), where a row is even: of an
  // odd vocabulary it ends with a zero.
  void pull(const Tensor& dz, Tensor x) const {
    if (!narrow()) {
      at::mm_out(x, dz, wide_);
      return;
    }
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
    const int64_t m = dz.size(0), even = dz.size(1), blocks = (d_ + kWide - 1) / kWide;
    // Where there are more threads than blocks, they share the rows as well.
    const int64_t parts = std::clamp<int64_t>(at::get_num_threads() / blocks, 1, std::max<int64_t>(1, m / kFewest));
    const auto* pz = dz.const_data_ptr<at::BFloat16>();
    auto* px = x.mutable_data_ptr<float>();
    at::parallel_for(0, blocks * parts, 1, [&](int64_t first, int64_t last) {
      // Pairs of rows of a block of W, interleaved: they are read once, while they lie in the cache.
      std::vector<uint32_t> pairs(kDeep / 2 * kWide);
      const auto* w = reinterpret_cast<const at::BFloat16*>(pairs.data());
      for (int64_t task = first; task < last; ++task) {
        const int64_t column = task / parts * kWide, width = std::min(kWide, d_ - column);
        const int64_t row = m * (task % parts) / parts, rows = m * (task % parts + 1) / parts - row;
        for (int64_t k = 0; k < (rows > 0 ? even : 0); k += kDeep) {
          const int64_t deep = std::min(kDeep, even - k);
          interleave(pairs.data(), k, deep, column, width);
          at::native::cpublas::brgemm(rows, width, deep, even, kWide, d_, k > 0, pz + row * even + k, w,
                                      px + row * d_ + column);
        }
      }
      at::native::cpublas::brgemm_release();
    });
#endif
  }

 private:
  static constexpr int64_t kColumns = 64;
  // A block of W in pull(), which with the cotangents it meets fits a cache of the second level.
  static constexpr int64_t kDeep = 1024, kWide = 288;
  static constexpr int64_t kFewest = 64;  // rows that are worth a block's being interleaved

  // Blocks of 64 columns of W^T, two rows of it interleaved: [blocks, d / 2, 64] of pairs, moved as one float each;
  // columns beyond the vocabulary are zero.
  static Tensor pack(const Tensor& weight) {
    const int64_t vocab = weight.size(0), pairs = weight.size(1) / 2;
    auto packed = at::empty({(vocab + kColumns - 1) / kColumns, pairs, kColumns}, weight.options().dtype(at::kFloat));
    const auto* from = reinterpret_cast<const float*>(weight.const_data_ptr<at::BFloat16>());
    auto* to = packed.mutable_data_ptr<float>();
    parallel_rows(packed.size(0), kColumns * pairs, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t column = block * kColumns, count = std::min(kColumns, vocab - column);
        auto* block_to = to + block * pairs * kColumns;
        if (count < kColumns) {
          std::fill_n(block_to, pairs * kColumns, 0.0f);
        }
        at::vec::transpose_mxn<float>(from + column * pairs, pairs, block_to, kColumns, static_cast<int>(count),
                                      static_cast<int>(pairs));
      }
    });
    return packed;
  }

  // Rows k to k + deep of `width` columns of W as pairs [deep / 2, kWide]; a row beyond the vocabulary is zero.
  void interleave(uint32_t* to, int64_t k, int64_t deep, int64_t column, int64_t width) const {
    const auto* from = reinterpret_cast<const uint16_t*>(narrow_.const_data_ptr<at::BFloat16>()) + column;
    for (int64_t i = 0; i < deep; i += 2, to += kWide) {
      const uint16_t* even = from + (k + i) * d_;
      const uint16_t* odd = even + d_;
      const bool last = k + i + 1 == vocab_;
      for (int64_t j = 0; j < width; ++j) {
        to[j] = even[j] | uint32_t(last ? 0 : odd[j]) << 16;
      }
    }
  }

  int64_t vocab_, d_;
  Tensor wide_, narrow_, packed_;
};

}  // namespace
}  // namespace sap_fast
