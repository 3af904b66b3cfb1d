// Mixture of experts for the CPU, forward and backward.
//
// The (token, k) pairs are sorted by expert, so that each expert's tokens are consecutive rows
// of one matrix. Experts with few rows, as in decoding, are bound by reading their weights: their
// products are computed here, straight from the weights' dtype. The others go to the BLAS. A
// token's rows are summed by one thread in the order of k, so results are deterministic.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "vectors.h"

namespace {

using at::Tensor;

struct Shapes {
  int64_t tokens, top_k, experts, hidden, intermediate;
};

Shapes check_moe(
    const char* op, const Tensor& x, const Tensor& index, const Tensor& weights,
    const Tensor& gate_up, const Tensor& down) {
  TORCH_CHECK(x.dim() == 2, op, ": hidden_states must be [tokens, hidden], not ", x.sizes());
  TORCH_CHECK(index.dim() == 2 && index.size(0) == x.size(0), op,
              ": top_k_index must be [tokens, k] with ", x.size(0), " tokens, not ", index.sizes());
  TORCH_CHECK(index.scalar_type() == at::kLong, op, ": top_k_index must be int64, not ",
              index.scalar_type());
  TORCH_CHECK(weights.sizes() == index.sizes() && weights.is_floating_point(), op,
              ": top_k_weights must be floating point of top_k_index's shape ", index.sizes(),
              ", not ", weights.scalar_type(), " of shape ", weights.sizes());
  TORCH_CHECK(gate_up.dim() == 3 && gate_up.size(1) % 2 == 0 && gate_up.size(2) == x.size(1), op,
              ": gate_up_proj must be [experts, 2 * intermediate, ", x.size(1), "], not ",
              gate_up.sizes());
  const Shapes s{x.size(0), index.size(1), gate_up.size(0), x.size(1), gate_up.size(1) / 2};
  TORCH_CHECK(down.sizes() == at::IntArrayRef({s.experts, s.hidden, s.intermediate}), op,
              ": down_proj must be [", s.experts, ", ", s.hidden, ", ", s.intermediate, "], not ",
              down.sizes());
  TORCH_CHECK(gate_up.scalar_type() == x.scalar_type() && down.scalar_type() == x.scalar_type(), op,
              ": gate_up_proj is ", gate_up.scalar_type(), " and down_proj is ",
              down.scalar_type(), "; both must have hidden_states' dtype, ", x.scalar_type());
  return s;
}

// The pairs sorted by expert; a pair of the sentinel expert (index == experts) has no row.
struct Routing {
  std::vector<int64_t> begin;  // [experts + 1]: the rows of expert e are begin[e] .. begin[e + 1]
  std::vector<int64_t> row;    // [tokens * k]: the row of each pair, -1 for the sentinel
  Tensor pair;                 // int64 [rows]: the pair of each row
  Tensor token;                // int64 [rows]: its token

  int64_t rows() const { return begin.back(); }
  int64_t count(int64_t expert) const { return begin[expert + 1] - begin[expert]; }
};

Routing route(const Tensor& top_k_index, const Shapes& s) {
  const auto index = top_k_index.contiguous();
  const auto* expert_of = index.const_data_ptr<int64_t>();
  const auto pairs = index.numel();
  Routing r{std::vector<int64_t>(s.experts + 1), std::vector<int64_t>(pairs, -1), {}, {}};
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const auto e = expert_of[pair];
    TORCH_CHECK(e >= 0 && e <= s.experts, "moe_experts: top_k_index has ", e, ", but there are ",
                s.experts, " experts (", s.experts, " itself means: none)");
    if (e < s.experts) {
      ++r.begin[e + 1];
    }
  }
  for (int64_t e = 0; e < s.experts; ++e) {
    r.begin[e + 1] += r.begin[e];
  }
  r.pair = at::empty({r.rows()}, index.options());
  r.token = at::empty({r.rows()}, index.options());
  auto next = r.begin;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (const auto e = expert_of[pair]; e < s.experts) {
      const auto row = next[e]++;
      r.row[pair] = row;
      r.pair.mutable_data_ptr<int64_t>()[row] = pair;
      r.token.mutable_data_ptr<int64_t>()[row] = pair / s.top_k;
    }
  }
  return r;
}

// ---- Experts with few rows ----

constexpr int64_t kFewRows = 16;

bool few(int64_t rows) { return rows > 0 && rows <= kFewRows; }

// sums[r] = dot(weight, x[r]) for R rows: a weight is loaded and widened once for all of them.
template <typename T, int R>
inline void dots(Acc<T>* sums, const T* weight, const Acc<T>* x, int64_t n) {
  Pack<T> total[R];
  for_packs<T>(n, [&](int64_t i, auto count) {
    const auto w = Pack<T>::load(weight + i, count);
    for (int r = 0; r < R; ++r) {
      total[r] = fma(w, Pack<T>::load(x + r * n + i, count), total[r]);
    }
  });
  for (int r = 0; r < R; ++r) {
    sums[r] = total[r].sum();
  }
}

template <typename T>
void few_dots(Acc<T>* sums, const T* weight, const Acc<T>* x, int64_t rows, int64_t n) {
  for (; rows >= 4; rows -= 4, sums += 4, x += 4 * n) {
    dots<T, 4>(sums, weight, x, n);
  }
  switch (rows) {
    case 1: return dots<T, 1>(sums, weight, x, n);
    case 2: return dots<T, 2>(sums, weight, x, n);
    case 3: return dots<T, 3>(sums, weight, x, n);
  }
}

// body(expert, output) for each output of each expert with few rows, shared among the threads.
template <typename F>
void for_few(const Routing& routing, int64_t experts, int64_t outputs, const F& body) {
  std::vector<int64_t> chosen;
  for (int64_t e = 0; e < experts; ++e) {
    if (few(routing.count(e))) {
      chosen.push_back(e);
    }
  }
  const auto tasks = static_cast<int64_t>(chosen.size()) * outputs;
  at::parallel_for(0, tasks, 32, [&](int64_t begin, int64_t end) {
    for (auto task = begin; task < end; ++task) {
      body(chosen[task / outputs], task % outputs);
    }
  });
}

// act[row] = silu(gate) * up of the rows of experts with few rows.
template <typename T>
void few_activations(
    Acc<T>* act, const Acc<T>* x, const T* gate_up, const Routing& routing, const Shapes& s) {
  for_few(routing, s.experts, s.intermediate, [&](int64_t e, int64_t j) {
    const auto first = routing.begin[e], rows = routing.count(e);
    const auto* weight = gate_up + (e * 2 * s.intermediate + j) * s.hidden;
    Acc<T> gate[kFewRows], up[kFewRows];
    few_dots<T>(gate, weight, x + first * s.hidden, rows, s.hidden);
    few_dots<T>(up, weight + s.intermediate * s.hidden, x + first * s.hidden, rows, s.hidden);
    for (int64_t r = 0; r < rows; ++r) {
      act[(first + r) * s.intermediate + j] = gate[r] / (1 + std::exp(-gate[r])) * up[r];
    }
  });
}

// y[row] = down @ act[row] of the rows of experts with few rows.
template <typename T>
void few_outputs(
    Acc<T>* y, const Acc<T>* act, const T* down, const Routing& routing, const Shapes& s) {
  for_few(routing, s.experts, s.hidden, [&](int64_t e, int64_t j) {
    const auto first = routing.begin[e], rows = routing.count(e);
    Acc<T> sums[kFewRows];
    few_dots<T>(sums, down + (e * s.hidden + j) * s.intermediate, act + first * s.intermediate,
                rows, s.intermediate);
    for (int64_t r = 0; r < rows; ++r) {
      y[(first + r) * s.hidden + j] = sums[r];
    }
  });
}

// ---- All experts ----

// out = a @ b, multiplied in `gemm`, the dtype whose products are fastest here.
void matmul(Tensor out, const Tensor& a, const Tensor& b, at::ScalarType gemm) {
  if (out.scalar_type() == gemm) {
    at::mm_out(out, a.to(gemm), b.to(gemm));
  } else {
    out.copy_(at::mm(a.to(gemm), b.to(gemm)));
  }
}

template <typename A>
void activations(Tensor act, const Tensor& gate_up) {
  const auto n = act.size(1);
  const auto* from = gate_up.const_data_ptr<A>();
  auto* to = act.mutable_data_ptr<A>();
  at::parallel_for(0, act.size(0), grain(n), [&](int64_t begin, int64_t end) {
    for (auto row = begin; row < end; ++row) {
      const auto* gate = from + row * 2 * n;
      silu_and_mul_row(to + row * n, gate, gate + n, n);
    }
  });
}

// out[token] = sum over k of scale[token, k] * y[row of (token, k)]; no `scale` means ones.
template <typename T>
void combine(
    T* out, const Acc<T>* y, const Acc<T>* scale, const Routing& routing, const Shapes& s) {
  at::parallel_for(0, s.tokens, grain(s.hidden * s.top_k), [&](int64_t begin, int64_t end) {
    for (auto token = begin; token < end; ++token) {
      for_packs<T>(s.hidden, [&](int64_t i, auto count) {
        Pack<T> sum;
        for (auto pair = token * s.top_k; pair < (token + 1) * s.top_k; ++pair) {
          if (const auto row = routing.row[pair]; row >= 0) {
            const Pack<T> factor(scale ? scale[pair] : 1);
            sum = fma(Pack<T>::load(y + row * s.hidden + i, count), factor, sum);
          }
        }
        sum.store(out + token * s.hidden + i, count);
      });
    }
  });
}

// The dtype to multiply matrices in: most CPUs are many times faster at float32 than at the
// 16-bit dtypes; `native_gemm` says that this one isn't.
at::ScalarType gemm_dtype(at::ScalarType dtype, bool native_gemm) {
  return dtype == at::kDouble || native_gemm ? dtype : at::kFloat;
}

Tensor moe_experts(
    const Tensor& hidden_states, const Tensor& top_k_index, const Tensor& top_k_weights,
    const Tensor& gate_up_in, const Tensor& down_in, bool native_gemm) {
  const auto s = check_moe(
      "moe_experts", hidden_states, top_k_index, top_k_weights, gate_up_in, down_in);
  const auto routing = route(top_k_index, s);
  const auto gate_up = gate_up_in.contiguous(), down = down_in.contiguous();
  auto out = at::empty({s.tokens, s.hidden}, hidden_states.options());
  dispatch("moe_experts", hidden_states.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto acc = c10::CppTypeToScalarType<A>();
    const auto gemm = gemm_dtype(hidden_states.scalar_type(), native_gemm);
    const auto x = hidden_states.index_select(0, routing.token).to(acc);
    const auto scale = top_k_weights.to(acc).contiguous();
    auto act = at::empty({routing.rows(), s.intermediate}, x.options());
    auto y = at::empty({routing.rows(), s.hidden}, x.options());
    few_activations<T>(act.template mutable_data_ptr<A>(), x.template const_data_ptr<A>(),
                       gate_up.const_data_ptr<T>(), routing, s);
    few_outputs<T>(y.template mutable_data_ptr<A>(), act.template const_data_ptr<A>(),
                   down.const_data_ptr<T>(), routing, s);
    for (int64_t e = 0; e < s.experts; ++e) {
      const auto first = routing.begin[e], rows = routing.count(e);
      if (rows <= kFewRows) {
        continue;
      }
      auto gate_and_up = at::empty({rows, 2 * s.intermediate}, x.options());
      matmul(gate_and_up, x.narrow(0, first, rows), gate_up.select(0, e).t(), gemm);
      activations<A>(act.narrow(0, first, rows), gate_and_up);
      matmul(y.narrow(0, first, rows), act.narrow(0, first, rows), down.select(0, e).t(), gemm);
    }
    combine<T>(out.mutable_data_ptr<T>(), y.template const_data_ptr<A>(),
               scale.template const_data_ptr<A>(), routing, s);
  });
  return out;
}

// ---- Backward ----

// For each row, with a = silu(gate) * up and `grad_act` the gradient of a for an unweighted row:
// grad_scale = <grad_act, a>; then gate_up becomes its own gradient, and grad_act becomes
// scale * a, which the gradient of down_proj needs.
template <typename A>
void activations_backward(Tensor gate_up, Tensor grad_act, Tensor grad_scale, const Tensor& scale) {
  const auto n = grad_act.size(1);
  auto* both = gate_up.mutable_data_ptr<A>();
  auto* grads = grad_act.mutable_data_ptr<A>();
  auto* to = grad_scale.mutable_data_ptr<A>();
  const auto* scales = scale.const_data_ptr<A>();
  at::parallel_for(0, grad_act.size(0), grain(n), [&](int64_t begin, int64_t end) {
    std::vector<A> act(n);
    for (auto row = begin; row < end; ++row) {
      auto* gate = both + row * 2 * n;
      auto* grad = grads + row * n;
      const Pack<A> factor(scales[row]);
      silu_and_mul_row(act.data(), gate, gate + n, n);
      Pack<A> dot;
      for_packs<A>(n, [&](int64_t i, auto count) {
        const auto g = Pack<A>::load(grad + i, count);
        const auto a = Pack<A>::load(act.data() + i, count);
        dot = fma(g, a, dot);
        (g * factor).store(grad + i, count);
        (a * factor).store(act.data() + i, count);
      });
      to[row] = dot.sum();
      silu_and_mul_backward_row(gate, gate + n, grad, gate, gate + n, n);
      std::copy(act.begin(), act.end(), grad);
    }
  });
}

// The gradients of hidden_states, top_k_weights, gate_up_proj and down_proj. The forward's
// products are computed anew: they would take several times the memory of its output.
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_experts_backward(
    const Tensor& grad, const Tensor& hidden_states, const Tensor& top_k_index,
    const Tensor& top_k_weights, const Tensor& gate_up, const Tensor& down, bool native_gemm) {
  const char* op = "moe_experts_backward";
  const auto s = check_moe(op, hidden_states, top_k_index, top_k_weights, gate_up, down);
  TORCH_CHECK(grad.sizes() == hidden_states.sizes() &&
                  grad.scalar_type() == hidden_states.scalar_type(),
              op, ": the gradient must have hidden_states' shape and dtype");
  const auto routing = route(top_k_index, s);
  const auto gemm = gemm_dtype(hidden_states.scalar_type(), native_gemm);
  const auto acc = hidden_states.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto x = hidden_states.index_select(0, routing.token).to(acc);
  const auto dy = grad.index_select(0, routing.token).to(acc);
  const auto scale = top_k_weights.reshape({-1}).index_select(0, routing.pair).to(acc);
  auto both = at::empty({routing.rows(), 2 * s.intermediate}, x.options());
  auto act = at::empty({routing.rows(), s.intermediate}, x.options());
  auto grad_scale = at::empty({routing.rows()}, x.options());
  auto grad_x = at::empty_like(x);
  auto grad_gate_up = at::zeros_like(gate_up, at::MemoryFormat::Contiguous);
  auto grad_down = at::zeros_like(down, at::MemoryFormat::Contiguous);
  for (int64_t e = 0; e < s.experts; ++e) {
    const auto first = routing.begin[e], rows = routing.count(e);
    if (rows == 0) {
      continue;
    }
    const auto of = [&](const Tensor& t) { return t.narrow(0, first, rows); };
    const auto w_gate_up = gate_up.select(0, e).to(gemm), w_down = down.select(0, e).to(gemm);
    matmul(of(both), of(x), w_gate_up.t(), gemm);
    matmul(of(act), of(dy), w_down, gemm);
    if (acc == at::kDouble) {
      activations_backward<double>(of(both), of(act), of(grad_scale), of(scale));
    } else {
      activations_backward<float>(of(both), of(act), of(grad_scale), of(scale));
    }
    matmul(grad_down.select(0, e), of(dy).t(), of(act), gemm);
    matmul(grad_gate_up.select(0, e), of(both).t(), of(x), gemm);
    matmul(of(grad_x), of(both), w_gate_up, gemm);
  }
  auto grad_hidden = at::empty({s.tokens, s.hidden}, hidden_states.options());
  dispatch(op, hidden_states.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    combine<T>(grad_hidden.mutable_data_ptr<T>(), grad_x.template const_data_ptr<Acc<T>>(),
               nullptr, routing, s);
  });
  auto grad_weights = at::zeros_like(top_k_weights, at::MemoryFormat::Contiguous);
  grad_weights.view(-1).index_copy_(0, routing.pair, grad_scale.to(top_k_weights.scalar_type()));
  return {grad_hidden, grad_weights, grad_gate_up, grad_down};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(KERNEL_NAMESPACE, m) {
  m.def(
      "moe_experts(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, "
      "Tensor gate_up_proj, Tensor down_proj, bool native_gemm) -> Tensor");
  m.def(
      "moe_experts_backward(Tensor grad, Tensor hidden_states, Tensor top_k_index, "
      "Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, bool native_gemm) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(KERNEL_NAMESPACE, CPU, m) {
  m.impl("moe_experts", &moe_experts);
  m.impl("moe_experts_backward", &moe_experts_backward);
}
