// How attention's queries and keys are cut into sequences: read from cu_seqlens, seqused and cu_seqlens_k, and checked.
#pragma once

#include "common.h"

namespace sap_fast {
namespace {

// Rows of the batch, of which `real` are no padding.
struct Range {
  int64_t first, length, real;
};

// Its last query sees its last key.
struct Sequence {
  Range queries, keys;

  // The key that query 0 sees as its own.
  int64_t offset() const { return keys.real - queries.real; }
};

// The rows of each sequence; `which` is "" of queries and "_k" of keys, as the arguments are called.
std::vector<Range> ranges_of(const char* which, const Tensor& cu_seqlens, const std::optional<Tensor>& seqused,
                             int64_t rows, int64_t max_seqlen) {
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1 && cu_seqlens.scalar_type() == at::kInt, "cu_seqlens",
              which, " must be int32 [B + 1], but is ", cu_seqlens.scalar_type(), " ", cu_seqlens.sizes());
  const int64_t count = cu_seqlens.numel() - 1;
  TORCH_CHECK(!seqused || (seqused->dim() == 1 && seqused->numel() == count && seqused->scalar_type() == at::kInt),
              "seqused must be int32 [", count, "], one for each sequence");
  const auto starts = cu_seqlens.accessor<int32_t, 1>();
  std::vector<Range> ranges;
  TORCH_CHECK(starts[0] == 0, "cu_seqlens", which, " must begin with 0, but begins with ", starts[0]);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t length = int64_t(starts[b + 1]) - starts[b];
    TORCH_CHECK(length >= 0 && starts[b + 1] <= rows, "cu_seqlens", which, " must not decrease nor exceed the ", rows,
                " rows, but sequence ", b, " is from ", starts[b], " to ", starts[b + 1]);
    const int64_t real = seqused ? std::clamp<int64_t>(seqused->accessor<int32_t, 1>()[b], 0, length) : length;
    TORCH_CHECK(real <= max_seqlen, "max_seqlen", which, " is ", max_seqlen, ", but sequence ", b, " has ", real,
                " rows");
    ranges.push_back({starts[b], length, real});
  }
  return ranges;
}

// How queries and keys are cut into sequences, as the ops are given it.
struct Cut {
  const Tensor& cu_seqlens;
  const std::optional<Tensor>&seqused, &cu_seqlens_k;
  int64_t max_seqlen, max_seqlen_k;

  std::vector<Sequence> sequences(int64_t rows, int64_t rows_k) const {
    const auto queries = ranges_of("", cu_seqlens, seqused, rows, max_seqlen);
    TORCH_CHECK(!cu_seqlens_k || !seqused, "seqused does not go together with cu_seqlens_k");
    TORCH_CHECK(cu_seqlens_k || rows_k == rows, "k must have the ", rows, " rows of q, but has ", rows_k);
    const auto keys = cu_seqlens_k ? ranges_of("_k", *cu_seqlens_k, {}, rows_k, max_seqlen_k) : queries;
    TORCH_CHECK(keys.size() == queries.size(), "cu_seqlens_k has ", keys.size(), " sequences, but cu_seqlens ",
                queries.size());
    std::vector<Sequence> sequences;
    for (size_t b = 0; b < queries.size(); ++b) {
      TORCH_CHECK_VALUE(queries[b].real <= keys[b].real, "sequence ", b, " has ", queries[b].real, " queries, but only ",
                        keys[b].real, " keys: the last query sees the last key, so each needs a key of its own");
      sequences.push_back({queries[b], keys[b]});
    }
    return sequences;
  }
};

// Zeros in the rows of [S, rows, ...] that are padding or of no sequence; all others are stored to.
void clear_rest(const Tensor& x, const std::vector<Sequence>& sequences, Range Sequence::* rows) {
  int64_t end = 0;
  for (const auto& sequence : sequences) {
    const auto& range = sequence.*rows;
    x.narrow(1, range.first + range.real, range.length - range.real).zero_();
    end = range.first + range.length;
  }
  x.narrow(1, end, x.size(1) - end).zero_();
}

}  // namespace
}  // namespace sap_fast
