// Rows of numbers, one SIMD register at a time, in the precision that sums are made in.
//
// A `Pack<T>` holds as many numbers as one Vectorized<T>, but widened: bfloat16 and half are
// loaded into two registers of float, so every kernel below is written once, for all dtypes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

namespace {

using at::vec::Vectorized;

// The type that T is computed in.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
struct Pack {
  static constexpr bool reduced = at::vec::is_reduced_floating_point_v<T>;
  static constexpr int parts = reduced ? 2 : 1;
  static constexpr int64_t size = Vectorized<T>::size();
  using V = Vectorized<Acc<T>>;
  using Full = std::integral_constant<int64_t, size>;

  V part[parts];

  Pack() : Pack(Acc<T>(0)) {}
  explicit Pack(Acc<T> value) {
    for (auto& p : part) {
      p = V(value);
    }
  }

  // The first `count` numbers at `from`, of type T or Acc<T>; zeros after them. A count of type
  // Full is known to the compiler.
  template <typename Count>
  static Pack load(const T* from, Count count) {
    Vectorized<T> values;
    if constexpr (is_full<Count>) {
      values = Vectorized<T>::loadu(from);
    } else {
      values = Vectorized<T>::loadu(from, count);
    }
    return widen(values);
  }
  template <typename Count>
  static Pack load(const Acc<T>* from, Count count) requires reduced {
    Pack pack;
    for (int i = 0; i < parts; ++i) {
      if constexpr (is_full<Count>) {
        pack.part[i] = V::loadu(from + i * V::size());
      } else if (const auto n = part_count(i, count); n > 0) {
        pack.part[i] = V::loadu(from + i * V::size(), n);
      }
    }
    return pack;
  }

  template <typename Count>
  void store(T* to, Count count) const {
    if constexpr (is_full<Count>) {
      narrow().store(to);
    } else {
      narrow().store(to, count);
    }
  }
  template <typename Count>
  void store(Acc<T>* to, Count count) const requires reduced {
    for (int i = 0; i < parts; ++i) {
      if constexpr (is_full<Count>) {
        part[i].store(to + i * V::size());
      } else if (const auto n = part_count(i, count); n > 0) {
        part[i].store(to + i * V::size(), n);
      }
    }
  }

  // The same numbers after a trip through T.
  Pack rounded() const {
    return widen(narrow());
  }

  Acc<T> sum() const {
    V total = part[0];
    for (int i = 1; i < parts; ++i) {
      total = total + part[i];
    }
    return at::vec::vec_reduce_all<Acc<T>>([](V a, V b) { return a + b; }, total);
  }

  template <typename F>
  Pack map(F f) const {
    Pack pack;
    for (int i = 0; i < parts; ++i) {
      pack.part[i] = f(part[i]);
    }
    return pack;
  }

  friend Pack operator+(Pack a, const Pack& b) {
    return combine(a, b, [](V x, V y) { return x + y; });
  }
  friend Pack operator-(Pack a, const Pack& b) {
    return combine(a, b, [](V x, V y) { return x - y; });
  }
  friend Pack operator*(Pack a, const Pack& b) {
    return combine(a, b, [](V x, V y) { return x * y; });
  }
  // a * b + c
  friend Pack fma(Pack a, const Pack& b, const Pack& c) {
    for (int i = 0; i < parts; ++i) {
      a.part[i] = at::vec::fmadd(a.part[i], b.part[i], c.part[i]);
    }
    return a;
  }

 private:
  template <typename Count>
  static constexpr bool is_full = std::is_same_v<Count, Full>;

  static Pack widen(Vectorized<T> values) {
    Pack pack;
    if constexpr (reduced) {
      std::tie(pack.part[0], pack.part[1]) = at::vec::convert_to_float<T>(values);
    } else {
      pack.part[0] = values;
    }
    return pack;
  }
  Vectorized<T> narrow() const {
    if constexpr (reduced) {
      return at::vec::convert_from_float<T>(part[0], part[1]);
    } else {
      return part[0];
    }
  }
  static int64_t part_count(int i, int64_t count) {
    return std::min<int64_t>(V::size(), count - i * V::size());
  }
  template <typename F>
  static Pack combine(Pack a, const Pack& b, F f) {
    for (int i = 0; i < parts; ++i) {
      a.part[i] = f(a.part[i], b.part[i]);
    }
    return a;
  }
};

// body(offset, count) for each pack of a row of n numbers; only the last may be short. The body
// is compiled once for full packs and once for that last one.
template <typename T, typename F>
inline void for_packs(int64_t n, const F& body) {
  int64_t i = 0;
  for (; i + Pack<T>::size <= n; i += Pack<T>::size) {
    body(i, typename Pack<T>::Full{});
  }
  if (i < n) {
    body(i, n - i);
  }
}

template <typename T>
inline Pack<T> sigmoid(const Pack<T>& x) {
  using V = typename Pack<T>::V;
  const V one(1);
  return x.map([one](V v) { return one / (one + v.neg().exp()); });
}

// out = silu(gate) * up; silu(x) = x * sigmoid(x)
template <typename T>
inline void silu_and_mul_row(T* out, const T* gate, const T* up, int64_t n) {
  for_packs<T>(n, [&](int64_t i, auto count) {
    const auto g = Pack<T>::load(gate + i, count);
    (g * sigmoid(g) * Pack<T>::load(up + i, count)).store(out + i, count);
  });
}

// The gradients of gate and up for out's; they may overwrite gate and up.
template <typename T>
inline void silu_and_mul_backward_row(
    T* grad_gate, T* grad_up, const T* grad, const T* gate, const T* up, int64_t n) {
  const Pack<T> one(1);
  for_packs<T>(n, [&](int64_t i, auto count) {
    const auto d = Pack<T>::load(grad + i, count);
    const auto g = Pack<T>::load(gate + i, count);
    const auto u = Pack<T>::load(up + i, count);
    const auto s = sigmoid(g);
    (d * u * s * (one + g * (one - s))).store(grad_gate + i, count);
    (d * g * s).store(grad_up + i, count);
  });
}

// How many rows a thread should take at least, so that starting it pays.
inline int64_t grain(int64_t row_size) {
  constexpr int64_t numbers = 16384;
  return std::max<int64_t>(1, numbers / std::max<int64_t>(1, row_size));
}

// f(T{}) with T the C++ type of a dtype that these kernels take.
template <typename F>
void dispatch(const char* op, c10::ScalarType dtype, const F& f) {
  switch (dtype) {
    case c10::ScalarType::Float: return f(float{});
    case c10::ScalarType::Double: return f(double{});
    case c10::ScalarType::BFloat16: return f(c10::BFloat16{});
    case c10::ScalarType::Half: return f(c10::Half{});
    default:
      TORCH_CHECK(false, op, ": dtype ", dtype,
                  " is not supported, only float32, float64, bfloat16 and float16 are");
  }
}

}  // namespace
