// Check, allocate, launch: cross entropy on CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <numeric>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "kernels.h"
#include "vector.h"

#ifdef FASTTUNE_VECTORS

namespace fasttune::cpu {
namespace {

void check_labels(const at::Tensor& target, int64_t classes, int64_t ignore_index) {
  const int64_t* label = target.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < target.numel(); ++row) {
    TORCH_CHECK_INDEX(label[row] == ignore_index || (label[row] >= 0 && label[row] < classes),
                      "target: label ", label[row], " in row ", row,
                      " is out of range: expected [0, ", classes, ") or ignore_index ",
                      ignore_index);
  }
}

// The arguments that the three ops share, checked and made plain; grad and factor are left empty.
// Owns what the pointers in `params` point to.
struct CrossEntropyCall {
  at::Tensor logits, target, weight, loss, stats, factor;
  CrossEntropyParams params;

  CrossEntropyCall(const char* op, const at::Tensor& logits_, const at::Tensor& target_,
                   const std::optional<at::Tensor>& weight_, int64_t ignore_index,
                   double label_smoothing, double softcap, double z_loss)
      : logits(logits_), target(target_.contiguous()) {
    TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, op,
                      ": logits: expected shape [N, V] with V >= 1, found ", logits.sizes());
    TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16,
                     op, ": logits: expected float32 or bfloat16 on CPU, found ",
                     logits.scalar_type());
    const int64_t rows = logits.size(0), classes = logits.size(1);
    TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, op, ": target: expected int64, found ",
                     target.scalar_type());
    TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == rows, op, ": target: expected shape [",
                      rows, "], found ", target.sizes());
    check_labels(target, classes, ignore_index);
    float weight_sum = static_cast<float>(classes);
    if (weight_.has_value()) {
      TORCH_CHECK_VALUE(weight_->dim() == 1 && weight_->size(0) == classes &&
                            weight_->scalar_type() == at::kFloat,
                        op, ": weight: expected float32 of shape [", classes, "], found ",
                        weight_->scalar_type(), " of shape ", weight_->sizes());
      weight = weight_->contiguous();
      // In one order, unlike at::sum, whose bits depend on the number of threads.
      const float* w = weight.const_data_ptr<float>();
      weight_sum = static_cast<float>(std::accumulate(w, w + classes, 0.0));
    }
    params = {};
    params.target = target.const_data_ptr<int64_t>();
    params.weight = weight.defined() ? weight.const_data_ptr<float>() : nullptr;
    params.rows = rows;
    params.classes = classes;
    params.ignore_index = ignore_index;
    params.weight_sum = weight_sum;
    params.options = {static_cast<float>(label_smoothing), static_cast<float>(softcap),
                      static_cast<float>(z_loss)};
    params.dtype = dtype_of(logits);
  }

  bool rows_are_plain() const { return logits.stride(1) == 1 || logits.size(1) == 1; }

  void read_logits() {
    if (!rows_are_plain()) logits = logits.contiguous();
    params.logits = logits.const_data_ptr();
    params.logits_stride = logits.stride(0);
  }

  void write_loss() {
    loss = at::empty({params.rows}, logits.options().dtype(at::kFloat));
    stats = at::empty({params.rows, 2}, loss.options());
    params.loss = loss.mutable_data_ptr<float>();
    params.stats = stats.mutable_data_ptr<float>();
  }

  void write_grad(const char* op, const at::Tensor& grad, const at::Tensor& factor_) {
    TORCH_CHECK_VALUE(factor_.scalar_type() == at::kFloat &&
                          (factor_.numel() == 1 || factor_.sizes() == target.sizes()),
                      op, ": factor: expected one float32 or one a row, found ",
                      factor_.scalar_type(), " of shape ", factor_.sizes());
    factor = factor_;
    params.factor = factor.const_data_ptr<float>();
    params.factor_stride = factor.dim() == 1 && factor.size(0) > 1 ? factor.stride(0) : 0;
    params.grad = grad.mutable_data_ptr();
    params.grad_stride = grad.stride(0);
  }
};

std::tuple<at::Tensor, at::Tensor> cross_entropy_rows(const at::Tensor& logits,
                                                      const at::Tensor& target,
                                                      const std::optional<at::Tensor>& weight,
                                                      int64_t ignore_index, double label_smoothing,
                                                      double softcap, double z_loss) {
  CrossEntropyCall call("cross_entropy_rows", logits, target, weight, ignore_index, label_smoothing,
                        softcap, z_loss);
  call.read_logits();
  call.write_loss();
  cross_entropy(call.params);
  return {call.loss, call.stats};
}

at::Tensor cross_entropy_rows_backward(const at::Tensor& logits, const at::Tensor& target,
                                       const at::Tensor& stats, const at::Tensor& factor,
                                       const std::optional<at::Tensor>& weight,
                                       int64_t ignore_index, double label_smoothing, double softcap,
                                       double z_loss) {
  constexpr const char* kOp = "cross_entropy_rows_backward";
  CrossEntropyCall call(kOp, logits, target, weight, ignore_index, label_smoothing, softcap,
                        z_loss);
  TORCH_CHECK_VALUE(stats.scalar_type() == at::kFloat && stats.dim() == 2 &&
                        stats.size(0) == logits.size(0) && stats.size(1) == 2,
                    kOp, ": stats: expected float32 of shape [", logits.size(0), ", 2], found ",
                    stats.scalar_type(), " of shape ", stats.sizes());
  call.read_logits();
  call.stats = stats.contiguous();
  call.params.stats = const_cast<float*>(call.stats.const_data_ptr<float>());  // only read
  at::Tensor grad = at::empty(logits.sizes(), logits.options());
  call.write_grad(kOp, grad, factor);
  cross_entropy(call.params);
  return grad;
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_grad_(at::Tensor& logits, const at::Tensor& target,
                                                       const at::Tensor& factor,
                                                       const std::optional<at::Tensor>& weight,
                                                       int64_t ignore_index, double label_smoothing,
                                                       double softcap, double z_loss) {
  constexpr const char* kOp = "cross_entropy_grad_";
  CrossEntropyCall call(kOp, logits, target, weight, ignore_index, label_smoothing, softcap,
                        z_loss);
  TORCH_CHECK_VALUE(
      call.rows_are_plain() && (logits.size(0) < 2 || logits.stride(0) >= logits.size(1)), kOp,
      ": logits: expected rows of unit stride that do not overlap, found strides ",
      logits.strides(), " for shape ", logits.sizes());
  call.read_logits();
  call.write_loss();
  call.write_grad(kOp, logits, factor);
  cross_entropy(call.params);
  return {call.loss, call.stats};
}

}  // namespace
}  // namespace fasttune::cpu

TORCH_LIBRARY_IMPL(fasttune, CPU, m) {
  namespace cpu = fasttune::cpu;
  m.impl("cross_entropy_rows", &cpu::cross_entropy_rows);
  m.impl("cross_entropy_rows_backward", &cpu::cross_entropy_rows_backward);
  m.impl("cross_entropy_grad_", &cpu::cross_entropy_grad_);
}

#endif  // FASTTUNE_VECTORS
