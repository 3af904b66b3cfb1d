// RMSNorm and SiluAndMul for the CPU, forward and backward.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "vectors.h"

namespace {

using at::Tensor;

// ---- RMSNorm: weight * round(x * rstd), with round() to x's dtype as Llama does it ----

template <typename T>
Acc<T> reciprocal_rms(const T* x, int64_t n, double eps) {
  Pack<T> squares;
  for_packs<T>(n, [&](int64_t i, auto count) {
    const auto v = Pack<T>::load(x + i, count);
    squares = fma(v, v, squares);
  });
  return 1 / std::sqrt(squares.sum() / n + Acc<T>(eps));
}

template <typename T>
void rms_norm_row(T* out, const T* x, const T* weight, int64_t n, double eps) {
  const Pack<T> rstd(reciprocal_rms(x, n, eps));
  for_packs<T>(n, [&](int64_t i, auto count) {
    const auto normed = (Pack<T>::load(x + i, count) * rstd).rounded();
    (normed * Pack<T>::load(weight + i, count)).store(out + i, count);
  });
}

// With r = rstd:  grad_x = r * grad * weight - x * r^3 / n * sum(grad * weight * x);
// adds this row's part of the weight's gradient, grad * round(x * r), to `grad_weight`.
template <typename T>
void rms_norm_backward_row(
    T* grad_x, Acc<T>* grad_weight, const T* grad, const T* x, const T* weight, int64_t n,
    double eps) {
  const auto r = reciprocal_rms(x, n, eps);
  const Pack<T> rstd(r);
  Pack<T> dot;
  for_packs<T>(n, [&](int64_t i, auto count) {
    const auto g = Pack<T>::load(grad + i, count);
    const auto v = Pack<T>::load(x + i, count);
    dot = fma(g * Pack<T>::load(weight + i, count), v, dot);
    const auto sum = Pack<T>::load(grad_weight + i, count);
    fma(g, (v * rstd).rounded(), sum).store(grad_weight + i, count);
  });
  const Pack<T> slope(-r * r * r / n * dot.sum());
  for_packs<T>(n, [&](int64_t i, auto count) {
    const auto g = Pack<T>::load(grad + i, count) * Pack<T>::load(weight + i, count);
    fma(Pack<T>::load(x + i, count), slope, g * rstd).store(grad_x + i, count);
  });
}

void check_rms_norm(const char* op, const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(x.dim() >= 1, op, ": hidden_states must have at least one dimension");
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), op, ": weight has shape ",
              weight.sizes(), " but hidden_states' last dimension is ", x.size(-1));
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight is ", weight.scalar_type(),
              " but hidden_states is ", x.scalar_type(), "; they must have the same dtype");
}

Tensor rms_norm(const Tensor& hidden_states, const Tensor& weight_in, double eps) {
  check_rms_norm("rms_norm", hidden_states, weight_in);
  const auto x = hidden_states.contiguous();
  const auto weight = weight_in.contiguous();
  auto out = at::empty_like(x);
  const auto n = x.size(-1);
  dispatch("rms_norm", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto* from = x.const_data_ptr<T>();
    const auto* w = weight.const_data_ptr<T>();
    auto* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, n ? x.numel() / n : 0, grain(n), [&](int64_t begin, int64_t end) {
      for (auto row = begin; row < end; ++row) {
        rms_norm_row(to + row * n, from + row * n, w, n, eps);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad_in, const Tensor& hidden_states, const Tensor& weight_in, double eps) {
  check_rms_norm("rms_norm_backward", hidden_states, weight_in);
  const auto grad = grad_in.contiguous();
  const auto x = hidden_states.contiguous();
  const auto weight = weight_in.contiguous();
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(),
              "rms_norm_backward: the gradient must have hidden_states' shape and dtype");
  const auto n = x.size(-1);
  const auto rows = n ? x.numel() / n : 0;
  // Each block of rows sums the weight's gradient by itself. The blocks depend on the shape
  // alone, so the result does not depend on the number of threads.
  const auto block = std::max(grain(n), at::divup(rows, 64));
  const auto blocks = at::divup(rows, block);
  auto grad_x = at::empty_like(x);
  Tensor grad_weight;
  dispatch("rms_norm_backward", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto partial = at::zeros({blocks, n}, x.options().dtype(c10::CppTypeToScalarType<Acc<T>>()));
    const auto* g = grad.const_data_ptr<T>();
    const auto* from = x.const_data_ptr<T>();
    const auto* w = weight.const_data_ptr<T>();
    auto* to = grad_x.mutable_data_ptr<T>();
    auto* sums = partial.template mutable_data_ptr<Acc<T>>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (auto row = begin * block; row < std::min(end * block, rows); ++row) {
        const auto at = row * n;
        rms_norm_backward_row(to + at, sums + row / block * n, g + at, from + at, w, n, eps);
      }
    });
    grad_weight = partial.sum(0).to(x.scalar_type());
  });
  return {grad_x, grad_weight};
}

// ---- SiluAndMul: silu(x[..., :d]) * x[..., d:] ----

int64_t check_halves(const char* op, const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, op,
              ": the last dimension must be even, gate and up side by side, but x has shape ",
              x.sizes());
  return x.size(-1) / 2;
}

Tensor silu_and_mul(const Tensor& x_in) {
  const auto d = check_halves("silu_and_mul", x_in);
  const auto x = x_in.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = d;
  auto out = at::empty(sizes, x.options());
  dispatch("silu_and_mul", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto* from = x.const_data_ptr<T>();
    auto* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, d ? out.numel() / d : 0, grain(d), [&](int64_t begin, int64_t end) {
      for (auto row = begin; row < end; ++row) {
        const auto* gate = from + row * 2 * d;
        silu_and_mul_row(to + row * d, gate, gate + d, d);
      }
    });
  });
  return out;
}

Tensor silu_and_mul_backward(const Tensor& grad_in, const Tensor& x_in) {
  const auto d = check_halves("silu_and_mul_backward", x_in);
  const auto grad = grad_in.contiguous();
  const auto x = x_in.contiguous();
  TORCH_CHECK(grad.numel() * 2 == x.numel() && grad.scalar_type() == x.scalar_type(),
              "silu_and_mul_backward: the gradient must have half of x's last dimension, and "
              "x's dtype");
  auto grad_x = at::empty_like(x);
  dispatch("silu_and_mul_backward", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto* g = grad.const_data_ptr<T>();
    const auto* from = x.const_data_ptr<T>();
    auto* to = grad_x.mutable_data_ptr<T>();
    at::parallel_for(0, d ? grad.numel() / d : 0, grain(d), [&](int64_t begin, int64_t end) {
      for (auto row = begin; row < end; ++row) {
        const auto* gate = from + row * 2 * d;
        auto* to_gate = to + row * 2 * d;
        silu_and_mul_backward_row(to_gate, to_gate + d, g + row * d, gate, gate + d, d);
      }
    });
  });
  return grad_x;
}

}  // namespace

// A fragment: moe.cpp adds its ops to the same namespace.
TORCH_LIBRARY_FRAGMENT(KERNEL_NAMESPACE, m) {
  m.def("rms_norm(Tensor hidden_states, Tensor weight, float eps) -> Tensor");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor hidden_states, Tensor weight, float eps) "
      "-> (Tensor, Tensor)");
  m.def("silu_and_mul(Tensor x) -> Tensor");
  m.def("silu_and_mul_backward(Tensor grad, Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(KERNEL_NAMESPACE, CPU, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("rms_norm_backward", &rms_norm_backward);
  m.impl("silu_and_mul", &silu_and_mul);
  m.impl("silu_and_mul_backward", &silu_and_mul_backward);
}
