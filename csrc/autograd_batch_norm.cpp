// Autograd of batch normalisation: what fasttune/ops/batch_norm.py registers in Python where
// nothing is compiled. A network has a batch norm after every convolution, many of them small.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

namespace fasttune {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using Wanted = std::array<bool, 3>;  // dx, dweight, dbias
using Three = std::tuple<Tensor, Tensor, Tensor>;

using Forward = Three(const Tensor&, const OptionalTensor&, const OptionalTensor&, double);
using Fixed = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                     const Tensor&, double);
using Backward = Three(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                       const Tensor&, double, bool, Wanted);

// Found at the first call: the schemas are defined in Python, after this is loaded.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const c10::TypedOperatorHandle<Forward>& forward_op() {
  static const auto op = find<Forward>("fasttune::batch_norm");
  return op;
}

const c10::TypedOperatorHandle<Fixed>& fixed_op() {
  static const auto op = find<Fixed>("fasttune::batch_norm_fixed");
  return op;
}

const c10::TypedOperatorHandle<Backward>& backward_op() {
  static const auto op = find<Backward>("fasttune::batch_norm_backward");
  return op;
}

bool wants(const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); }

OptionalTensor given(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// What both backwards do; x was saved unless nothing needs it.
variable_list gradients(AutogradContext* ctx, const Tensor& dy, bool batch_statistics) {
  variable_list inputs(3);
  if (!dy.defined()) return inputs;
  const variable_list saved = ctx->get_saved_variables();
  // needs_input_grad counts the tensors that were there.
  const bool has_weight = ctx->saved_data["weight"].toBool();
  const bool has_bias = ctx->saved_data["bias"].toBool();
  const Wanted wanted{ctx->needs_input_grad(0), has_weight && ctx->needs_input_grad(1),
                      has_bias && ctx->needs_input_grad(has_weight ? 2 : 1)};
  std::tie(inputs[0], inputs[1], inputs[2]) =
      backward_op().call(dy, given(saved[0]), given(saved[1]), saved[2], saved[3],
                         ctx->saved_data["eps"].toDouble(), batch_statistics, wanted);
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!wanted[i]) inputs[i] = Tensor();
  }
  return inputs;
}

void save(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
          const OptionalTensor& bias, const Tensor& mean, const Tensor& variance, double eps) {
  ctx->set_materialize_grads(false);
  ctx->save_for_backward({x, weight.value_or(Tensor()), mean, variance});
  ctx->saved_data["weight"] = weight.has_value();
  ctx->saved_data["bias"] = bias.has_value();
  ctx->saved_data["eps"] = eps;
}

// mean and variance go out by pointers: compiled autograd refuses a Function with a result that is
// not differentiable.
struct BatchNorm : Function<BatchNorm> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
                        const OptionalTensor& bias, double eps, Tensor* mean, Tensor* variance) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensor y;
    std::tie(y, *mean, *variance) = forward_op().call(x, weight, bias, eps);
    save(ctx, x, weight, bias, *mean, *variance, eps);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list inputs = gradients(ctx, grads[0], true);
    inputs.resize(6);
    return inputs;
  }
};

struct BatchNormFixed : Function<BatchNormFixed> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Tensor& mean, const Tensor& variance,
                        double eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensor y = fixed_op().call(x, weight, bias, mean, variance, eps);
    save(ctx, wants(weight) || wants(bias) ? x : Tensor(), weight, bias, mean, variance, eps);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list inputs = gradients(ctx, grads[0], false);
    inputs.resize(6);
    return inputs;
  }
};

Three batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                 double eps) {
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || wants(weight) || wants(bias))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(x, weight, bias, eps);
  }
  Tensor mean, variance;
  Tensor y = BatchNorm::apply(x, weight, bias, eps, &mean, &variance);
  return {y, mean, variance};
}

Tensor batch_norm_fixed(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Tensor& mean, const Tensor& variance, double eps) {
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || wants(weight) || wants(bias))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return fixed_op().call(x, weight, bias, mean, variance, eps);
  }
  return BatchNormFixed::apply(x, weight, bias, mean, variance, eps);
}

struct BatchNormBackward : Function<BatchNormBackward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext*, const Tensor& dy, const OptionalTensor& x,
                               const OptionalTensor& weight, const Tensor& mean,
                               const Tensor& variance, double eps, bool batch_statistics,
                               Wanted wanted) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dweight, dbias] =
        backward_op().call(dy, x, weight, mean, variance, eps, batch_statistics, wanted);
    return {dx, dweight, dbias};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "batch_norm can be differentiated once, not twice");
  }
};

Three batch_norm_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight,
                          const Tensor& mean, const Tensor& variance, double eps,
                          bool batch_statistics, Wanted wanted) {
  if (!at::GradMode::is_enabled() || !(dy.requires_grad() || wants(x) || wants(weight))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return backward_op().call(dy, x, weight, mean, variance, eps, batch_statistics, wanted);
  }
  const variable_list out =
      BatchNormBackward::apply(dy, x, weight, mean, variance, eps, batch_statistics, wanted);
  return {out[0], out[1], out[2]};
}

}  // namespace
}  // namespace fasttune

TORCH_LIBRARY_IMPL(fasttune, Autograd, m) {
  m.impl("batch_norm", &fasttune::batch_norm);
  m.impl("batch_norm_fixed", &fasttune::batch_norm_fixed);
  m.impl("batch_norm_backward", &fasttune::batch_norm_backward);
}
