// Thin products: a few rows at a time, widened, masked, contracted with the matrices of adapters and expanded again.
#pragma once

#include "common.h"

#include <cmath>

namespace sap_fast {
namespace {

// Rows that are worked on together: as many as the caches keep beside the matrices of the adapters.
constexpr int64_t kGroup = 8;
// A tile of sums: rows, and ranks or vectors of columns. 16 of them in 32 registers, or 8 in 16.
constexpr int64_t kRows = 4;
constexpr int64_t kTile = at::vec::Vectorized<float>::size() >= 16 ? 4 : 2;

// Dropout as sap_fast/ops/lora_linear/dropout.py draws it, bit for bit.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

struct Mask {
  double p;
  uint32_t key, limit;
  float factor;

  Mask(int64_t seed, int64_t salt, double probability) : p(probability) {
    key = mix(static_cast<uint32_t>(seed) + static_cast<uint32_t>(salt) * 0x9E3779B9u);
    const double words = std::nearbyint(p * 4294967296.0);
    // A probability that rounds to one drops even the last word, which no 32-bit limit would do.
    const bool all = words >= 4294967296.0;
    limit = all ? 0 : static_cast<uint32_t>(words);
    factor = all ? 0.0f : 1.0f / static_cast<float>(1.0 - p);
  }

  bool operator==(const Mask& other) const { return p == other.p && (p == 0.0 || key == other.key); }

  template <class C>
  void draw(int64_t row, int64_t column, int64_t count, C* keep) const {
    // Copies, since `keep` could be the memory of a member as far as the compiler knows, and of 32 bits, to be vectors.
    const uint32_t word = mix(static_cast<uint32_t>(row) + key), first = static_cast<uint32_t>(column);
    const uint32_t least = limit, width = static_cast<uint32_t>(count);
    const float kept = factor;
    for (uint32_t j = 0; j < width; ++j) {
      keep[j] = mix(word ^ ((first + j) * 0x9E3779B9u)) >= least ? kept : 0.0f;
    }
  }
};

template <class C>
const C* data(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<C>() : nullptr;
}

// f(i, count) over [0, size) in steps of `step`, then of one; counts are known to the compiler.
template <int64_t step, class F>
inline void steps(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + step <= size; i += step) {
    f(i, std::integral_constant<int64_t, step>{});
  }
  for (; i < size; ++i) {
    f(i, std::integral_constant<int64_t, 1>{});
  }
}

// A compiler keeps sums in registers only as an array of a plain function, in loops that it unrolls whole.
#define UNROLLED _Pragma("GCC unroll 16") for

// t += scaling z m^T for M rows and N ranks.
template <int M, int N, class C>
void contract_tile(const C* z, int64_t d, const C* m, C scaling, C* t, int64_t t_row) {
  constexpr int64_t lane = Vec<C>::size();
  Vec<C> sums[M][N];
  const int64_t whole = d / lane * lane;
  for (int64_t j = 0; j < whole; j += lane) {
    Vec<C> zs[M];
    UNROLLED (int u = 0; u < M; ++u) { zs[u] = Vec<C>::loadu(z + u * d + j); }
    UNROLLED (int w = 0; w < N; ++w) {
      const auto ms = Vec<C>::loadu(m + w * d + j);
      UNROLLED (int u = 0; u < M; ++u) { sums[u][w] = at::vec::fmadd(zs[u], ms, sums[u][w]); }
    }
  }
  UNROLLED (int u = 0; u < M; ++u) {
    UNROLLED (int w = 0; w < N; ++w) {
      C total = sum(sums[u][w]);
      for (int64_t j = whole; j < d; ++j) {
        total += z[u * d + j] * m[w * d + j];
      }
      t[u * t_row + w] += scaling * total;
    }
  }
}

// t += scaling z m^T, for z [rows, d], m [rank, d] and t [rows, rank].
template <class C>
void contract(const C* z, int64_t rows, int64_t d, const C* m, int64_t rank, C scaling, C* t) {
  steps<kTile>(rank, [&](int64_t r, auto width) {
    steps<kRows>(rows, [&](int64_t i, auto height) {
      constexpr int M = decltype(height)::value, N = decltype(width)::value;
      contract_tile<M, N>(z + i * d, d, m + r * d, scaling, t + i * rank + r, rank);
    });
  });
}

// z += keep (t m + t_2 m_2) for M rows and N vectors of columns, of the last of which `count` elements.
template <int M, int N, class C, class Count>
void expand_tile(C* z, int64_t d, const C* t, const C* m, const C* t_2, const C* m_2, int64_t rank, const C* keep,
                 Count count) {
  constexpr int64_t lane = Vec<C>::size();
  Vec<C> sums[M][N];
  for (; t != nullptr; t = t_2, m = m_2, t_2 = nullptr) {
    for (int64_t r = 0; r < rank; ++r) {
      Vec<C> ms[N];
      UNROLLED (int w = 0; w < N; ++w) { ms[w] = Vec<C>::loadu(m + r * d + w * lane, count); }
      UNROLLED (int u = 0; u < M; ++u) {
        const Vec<C> one(t[u * rank + r]);
        UNROLLED (int w = 0; w < N; ++w) { sums[u][w] = at::vec::fmadd(one, ms[w], sums[u][w]); }
      }
    }
  }
  UNROLLED (int u = 0; u < M; ++u) {
    UNROLLED (int w = 0; w < N; ++w) {
      const int64_t o = u * d + w * lane;
      const auto kept = keep == nullptr ? sums[u][w] : sums[u][w] * Vec<C>::loadu(keep + o, count);
      (Vec<C>::loadu(z + o, count) + kept).store(z + o, count);
    }
  }
}

// z += keep (t m + t_2 m_2), for z [rows, d], m [rank, d] and t [rows, rank]; t_2 and keep may be null.
template <class C>
void expand(C* z, int64_t rows, int64_t d, const C* t, const C* m, const C* t_2, const C* m_2, int64_t rank,
            const C* keep) {
  constexpr int64_t lane = Vec<C>::size();
  const auto columns = [&](int64_t j, auto width, auto count) {
    steps<kRows>(rows, [&](int64_t i, auto height) {
      constexpr int M = decltype(height)::value, N = decltype(width)::value;
      expand_tile<M, N>(z + i * d + j, d, t + i * rank, m + j, t_2 == nullptr ? t_2 : t_2 + i * rank,
                        m_2 == nullptr ? m_2 : m_2 + j, rank, keep == nullptr ? keep : keep + i * d + j, count);
    });
  };
  int64_t j = 0;
  for (; j + kTile * lane <= d; j += kTile * lane) {
    columns(j, std::integral_constant<int64_t, kTile>{}, std::integral_constant<int64_t, lane>{});
  }
  lanes<C>(d - j, [&](int64_t o, auto count) { columns(j + o, std::integral_constant<int64_t, 1>{}, count); });
}

// z in the compute dtype, times keep unless that is null; z itself where it is that already.
template <class T>
const compute_t<T>* widened(const T* z, int64_t size, const compute_t<T>* keep, std::vector<compute_t<T>>& room) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    if (keep == nullptr) {
      return z;
    }
  }
  room.resize(std::max<size_t>(room.size(), size));
  lanes<T>(size, [&](int64_t j, auto count) {
    const auto x = load(z + j, count);
    (keep == nullptr ? x : x * Vec<T>::loadu(keep + j, count)).store(room.data() + j, count);
  });
  return room.data();
}

// f(z) with z [size] in the compute dtype: the sum of the sources, which f adds to; rounded to `out` when it is done.
template <class T, class F>
void accumulate(T* out, const std::vector<const T*>& sources, int64_t offset, int64_t size,
                std::vector<compute_t<T>>& room, const F& f) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    if (sources.size() == 1 && sources[0] == out) {
      f(out + offset);
      return;
    }
  }
  room.resize(std::max<size_t>(room.size(), size));
  lanes<T>(size, [&](int64_t j, auto count) {
    Vec<T> total(compute_t<T>(0));
    for (const auto* source : sources) {
      total = total + load(source + offset + j, count);
    }
    total.store(room.data() + j, count);
  });
  f(room.data());
  lanes<T>(size, [&](int64_t j, auto count) { store(out + offset + j, Vec<T>::loadu(room.data() + j, count), count); });
}

// A sum over rows, m = t^T (keep z), of which a thread works on some columns; so its order is always the same.
template <class T>
struct Outer {
  using C = compute_t<T>;
  static constexpr int64_t kDepth = 64, kColumns = 4 * Vec<C>::size();
  const T* z;        // [rows, d]
  const C* t;        // [rows, rank]
  C* m;              // [rank, d]
  int64_t rows, d, rank;
  const Mask* mask;  // may be null

  // Columns [column, column + kColumns), as far as there are any.
  void operator()(int64_t column) const {
    const int64_t columns = std::min(kColumns, d - column);
    alignas(64) C tile[kDepth * kColumns] = {}, keep[kColumns] = {};
    for (int64_t r = 0; r < rank; ++r) {
      std::fill_n(m + r * d + column, columns, C(0));
    }
    for (int64_t first = 0; first < rows; first += kDepth) {
      const int64_t depth = std::min(kDepth, rows - first);
      for (int64_t i = 0; i < depth; ++i) {
        const bool masked = mask != nullptr && mask->p != 0.0;
        if (masked) {
          mask->draw(first + i, column, columns, keep);
        }
        lanes<T>(columns, [&](int64_t j, auto count) {
          const auto x = load(z + (first + i) * d + column + j, count);
          (masked ? x * Vec<T>::loadu(keep + j) : x).store(tile + i * kColumns + j);
        });
      }
      steps<kTile>(rank, [&](int64_t r, auto width) {
        add<decltype(width)::value>(tile, t + first * rank + r, m + r * d + column, depth, columns);
      });
    }
  }

  // m += t^T tile for N ranks and the columns of the tile.
  template <int N>
  void add(const C* tile, const C* ts, C* ms, int64_t depth, int64_t columns) const {
    constexpr int64_t lane = Vec<C>::size();
    Vec<C> sums[N][4];
    for (int64_t i = 0; i < depth; ++i) {
      Vec<C> zs[4];
      UNROLLED (int u = 0; u < 4; ++u) { zs[u] = Vec<C>::loadu(tile + i * kColumns + u * lane); }
      UNROLLED (int w = 0; w < N; ++w) {
        const Vec<C> one(ts[i * rank + w]);
        UNROLLED (int u = 0; u < 4; ++u) { sums[w][u] = at::vec::fmadd(one, zs[u], sums[w][u]); }
      }
    }
    UNROLLED (int w = 0; w < N; ++w) {
      UNROLLED (int u = 0; u < 4; ++u) {
        const int64_t count = std::min<int64_t>(columns - u * lane, lane);
        C* at = ms + w * d + u * lane;
        if (count > 0) {
          (Vec<C>::loadu(at, count) + sums[w][u]).store(at, count);
        }
      }
    }
  }
};

}  // namespace
}  // namespace sap_fast
