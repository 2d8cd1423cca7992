// The output head, made ready for logits in float32 of rows in their storage dtype.
//
// In bfloat16 a product of ATen's returns bfloat16, too coarse for exp(z - lse); widened to float32 it does without the
// processor's bfloat16 unit. Where there is one, oneDNN's block product (which ATen exports) multiplies bfloat16 and
// returns float32.
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
      packed_ = pack(weight.contiguous());
      return;
    }
#endif
    wide_ = weight.to(storage == at::kDouble ? at::kDouble : at::kFloat);
  }

  // rows W^T of rows [m, d]: [m, vocab] in the compute dtype.
  Tensor logits(const Tensor& rows) const {
    if (!packed_.defined()) {
      return at::mm(rows.to(wide_.scalar_type()), wide_.t());
    }
    auto z = at::empty({rows.size(0), vocab_}, rows.options().dtype(at::kFloat));
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
    const auto* x = rows.const_data_ptr<at::BFloat16>();
    const auto* w = reinterpret_cast<const at::BFloat16*>(packed_.const_data_ptr<int32_t>());
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
    return z;
  }

 private:
  static constexpr int64_t kColumns = 64;

  // Blocks of 64 columns of W^T, two rows of it interleaved: [blocks, d / 2, 64] of pairs; columns beyond the
  // vocabulary are zero.
  static Tensor pack(const Tensor& weight) {
    const int64_t vocab = weight.size(0), pairs = weight.size(1) / 2;
    auto packed = at::zeros({(vocab + kColumns - 1) / kColumns, pairs, kColumns}, weight.options().dtype(at::kInt));
    const auto* from = reinterpret_cast<const int32_t*>(weight.const_data_ptr<at::BFloat16>());
    auto* to = packed.mutable_data_ptr<int32_t>();
    parallel_rows(packed.size(0), kColumns * pairs, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t column = block * kColumns, count = std::min(kColumns, vocab - column);
        for (int64_t k = 0; k < pairs; k += kLine) {
          for (int64_t j = 0; j < count; ++j) {
            for (int64_t i = k; i < std::min(pairs, k + kLine); ++i) {
              to[(block * pairs + i) * kColumns + j] = from[(column + j) * pairs + i];
            }
          }
        }
      }
    });
    return packed;
  }

  static constexpr int64_t kLine = 16;  // pairs in a line of the cache

  int64_t vocab_, d_;
  Tensor wide_, packed_;
};

}  // namespace
}  // namespace sap_fast
