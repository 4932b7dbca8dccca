// Check, allocate, launch, on CUDA: on the tensor's device and the current stream. Nothing here
// waits for the device, and everything may be captured in a graph (a seed is then part of the
// graph).
#include "bindings_cuda.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <sstream>

#include "kernels.h"

#ifndef FASTTUNE_ARCHITECTURES
#define FASTTUNE_ARCHITECTURES
#endif
#define FASTTUNE_TEXT_(...) #__VA_ARGS__
#define FASTTUNE_TEXT(...) FASTTUNE_TEXT_(__VA_ARGS__)

namespace fasttune {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

cuda::DType dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return cuda::DType::kFloat32;
    case at::kHalf:
      return cuda::DType::kFloat16;
    case at::kBFloat16:
      return cuda::DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": the CUDA kernel takes float32, float16 or bfloat16, found ",
                       x.scalar_type());
  }
}

void check_like(const char* op, const char* name, const Tensor& x, at::IntArrayRef shape,
                at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(x.sizes() == shape && x.scalar_type() == dtype && x.device() == device, op,
                    ": expected ", name, " of shape ", shape, ", ", dtype, ", on ", device,
                    ", found ", x.sizes(), ", ", x.scalar_type(), ", on ", x.device());
}

template <typename Ask>
int cached(std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS>& known, int device, Ask&& ask) {
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0) {
    value = ask();
    known[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

// Of the current device.
cuda::Device launch_device(int index) {
  static std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS> known{};
  const int multiprocessors = cached(known, index, [&] {
    int count = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index));
    return count;
  });
  return {c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(index)).stream(),
          multiprocessors};
}

void check_launch(int status) { C10_CUDA_CHECK(static_cast<cudaError_t>(status)); }

// ---- Labels out of range: one record a device, which kernels write and the host reads without
// waiting (LabelFault in kernels.h).

std::array<std::atomic<cuda::LabelFault*>, C10_COMPILE_TIME_MAX_GPUS> faults{};

void raise_fault(int device) {
  cuda::LabelFault* record = faults[device].load(std::memory_order_acquire);
  if (record == nullptr) return;
  if (__atomic_load_n(&record->state, __ATOMIC_ACQUIRE) != 2) return;
  const cuda::LabelFault fault = *record;
  __atomic_store_n(&record->state, 0u, __ATOMIC_RELEASE);
  TORCH_CHECK_INDEX(false, "target: label ", fault.label, " in row ", fault.row,
                    " is out of range: expected [0, ", fault.classes, ") or ignore_index ",
                    fault.ignore_index, " (met on cuda:", device, " by an earlier call)");
}

// What an earlier call met is told first.
cuda::LabelFault* fault_record(int device) {
  raise_fault(device);
  cuda::LabelFault* record = faults[device].load(std::memory_order_acquire);
  if (record != nullptr) return record;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  record = faults[device].load(std::memory_order_acquire);
  if (record != nullptr) return record;
  // An allocation is refused while a stream is captured, unless the thread says that it may be.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  void* memory = nullptr;
  const cudaError_t status =
      cudaHostAlloc(&memory, sizeof(cuda::LabelFault), cudaHostAllocPortable | cudaHostAllocMapped);
  C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  C10_CUDA_CHECK(status);
  record = new (memory) cuda::LabelFault{};
  faults[device].store(record, std::memory_order_release);
  return record;
}

// ---- Cross entropy. logits [N, V], target [N] int64, weight [V] float32, factor [N] or one
// element, float32; loss [N] and stats [N, 2] float32.

struct Classes {
  const Tensor& target;
  const OptionalTensor& weight;
  int64_t ignore_index;
  double label_smoothing, softcap, z_loss;
};

bool has_rows(const Tensor& logits) {
  const bool unit = logits.size(1) <= 1 || logits.stride(1) == 1;
  return unit && (logits.size(0) <= 1 || logits.stride(0) >= logits.size(1));
}

// `keep` holds what the kernel reads and nobody else refers to. The caching allocator gives its
// memory to later work of the same stream only.
cuda::CrossEntropyParams cross_entropy_params(const char* op, const Tensor& logits,
                                              const Classes& classes, std::vector<Tensor>& keep) {
  cuda::CrossEntropyParams p = {};
  p.dtype = dtype_of(op, logits);
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= INT32_MAX, op,
                    ": expected logits of shape [N, V] with 1 <= V < 2^31, found ", logits.sizes());
  p.rows = logits.size(0);
  p.classes = logits.size(1);
  p.logits = logits.const_data_ptr();
  p.stride = p.rows <= 1 ? p.classes : logits.stride(0);
  check_like(op, "target", classes.target, {p.rows}, at::kLong, logits.device());
  keep.push_back(classes.target.contiguous());
  p.target = keep.back().const_data_ptr<int64_t>();
  if (classes.weight.has_value()) {
    check_like(op, "weight", *classes.weight, {p.classes}, at::kFloat, logits.device());
    keep.push_back(classes.weight->contiguous());
    p.weight = keep.back().const_data_ptr<float>();
    keep.push_back(classes.weight->sum());
    p.weight_sum = keep.back().const_data_ptr<float>();
  }
  p.ignore_index = classes.ignore_index;
  p.options = {static_cast<float>(classes.label_smoothing), static_cast<float>(classes.softcap),
               static_cast<float>(classes.z_loss)};
  return p;
}

void set_factor(const char* op, const Tensor& factor, const Tensor& logits,
                cuda::CrossEntropyParams& p, std::vector<Tensor>& keep) {
  TORCH_CHECK_VALUE(factor.scalar_type() == at::kFloat && factor.device() == logits.device() &&
                        (factor.numel() == 1 || factor.numel() == p.rows),
                    op, ": expected factor of 1 or ", p.rows, " elements, float32, on ",
                    logits.device(), ", found ", factor.sizes(), ", ", factor.scalar_type(),
                    ", on ", factor.device());
  keep.push_back(factor.dim() == 1 ? factor : factor.reshape({factor.numel()}));
  p.factor = keep.back().const_data_ptr<float>();
  p.factor_stride = factor.numel() == 1 ? 0 : keep.back().stride(0);
}

void set_outputs(const Tensor& loss, const Tensor& stats, cuda::CrossEntropyParams& p) {
  p.loss = loss.mutable_data_ptr<float>();
  p.stats = stats.mutable_data_ptr<float>();
}

std::tuple<Tensor, Tensor> cross_entropy_rows(const Tensor& given, const Tensor& target,
                                              const OptionalTensor& weight, int64_t ignore_index,
                                              double label_smoothing, double softcap,
                                              double z_loss) {
  const char* op = "cross_entropy_rows";
  const c10::cuda::CUDAGuard guard(given.device());
  std::vector<Tensor> keep;
  TORCH_CHECK_VALUE(given.dim() == 2, op, ": expected logits of shape [N, V], found ",
                    given.sizes());
  const Tensor logits = has_rows(given) ? given : given.contiguous();
  cuda::CrossEntropyParams p = cross_entropy_params(
      op, logits, {target, weight, ignore_index, label_smoothing, softcap, z_loss}, keep);
  p.fault = fault_record(logits.get_device());
  const Tensor loss = at::empty({p.rows}, logits.options().dtype(at::kFloat));
  const Tensor stats = at::empty({p.rows, 2}, loss.options());
  set_outputs(loss, stats, p);
  check_launch(cuda::cross_entropy_rows(p, launch_device(logits.get_device())));
  return {loss, stats};
}

Tensor cross_entropy_rows_backward(const Tensor& given, const Tensor& target, const Tensor& stats,
                                   const Tensor& factor, const OptionalTensor& weight,
                                   int64_t ignore_index, double label_smoothing, double softcap,
                                   double z_loss) {
  const char* op = "cross_entropy_rows_backward";
  const c10::cuda::CUDAGuard guard(given.device());
  std::vector<Tensor> keep;
  TORCH_CHECK_VALUE(given.dim() == 2, op, ": expected logits of shape [N, V], found ",
                    given.sizes());
  const Tensor logits = has_rows(given) ? given : given.contiguous();
  cuda::CrossEntropyParams p = cross_entropy_params(
      op, logits, {target, weight, ignore_index, label_smoothing, softcap, z_loss}, keep);
  set_factor(op, factor, logits, p, keep);
  check_like(op, "stats", stats, {p.rows, 2}, at::kFloat, logits.device());
  keep.push_back(stats.contiguous());
  p.stats = const_cast<float*>(keep.back().const_data_ptr<float>());
  const Tensor grad = at::empty({p.rows, p.classes}, logits.options());
  p.grad = grad.mutable_data_ptr();
  p.grad_stride = p.classes;
  check_launch(cuda::cross_entropy_rows_backward(p, launch_device(logits.get_device())));
  return grad;
}

std::tuple<Tensor, Tensor> cross_entropy_grad_(Tensor& logits, const Tensor& target,
                                               const Tensor& factor, const OptionalTensor& weight,
                                               int64_t ignore_index, double label_smoothing,
                                               double softcap, double z_loss) {
  const char* op = "cross_entropy_grad_";
  const c10::cuda::CUDAGuard guard(logits.device());
  std::vector<Tensor> keep;
  TORCH_CHECK_VALUE(logits.dim() == 2 && has_rows(logits), op,
                    ": expected logits [N, V] of strides [V or more, 1], found shape ",
                    logits.sizes(), " and strides ", logits.strides());
  cuda::CrossEntropyParams p = cross_entropy_params(
      op, logits, {target, weight, ignore_index, label_smoothing, softcap, z_loss}, keep);
  set_factor(op, factor, logits, p, keep);
  const int index = logits.get_device();
  p.fault = fault_record(index);
  p.grad = logits.mutable_data_ptr();
  p.grad_stride = p.stride;
  static std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS> known{};
  const int most = cached(known, index, cuda::cross_entropy_max_cluster);
  p.plan = plan_row(p.classes, static_cast<int32_t>(logits.element_size()), most);
  const Tensor loss = at::empty({p.rows}, logits.options().dtype(at::kFloat));
  const Tensor stats = at::empty({p.rows, 2}, loss.options());
  set_outputs(loss, stats, p);
  check_launch(cuda::cross_entropy_grad(p, launch_device(index)));
  return {loss, stats};
}

// Records the first label out of range by its row in the whole of `target`; a chunk's kernel, which
// knows only the chunk's rows, then finds the record taken.
void note_labels(const Tensor& target, int64_t classes, int64_t ignore_index) {
  const char* op = "note_labels";
  const c10::cuda::CUDAGuard guard(target.device());
  check_like(op, "target", target, {target.numel()}, at::kLong, target.device());
  const Tensor labels = target.contiguous();
  cuda::CrossEntropyParams p = {};
  p.target = labels.const_data_ptr<int64_t>();
  p.rows = labels.numel();
  p.classes = classes;
  p.ignore_index = ignore_index;
  p.fault = fault_record(target.get_device());
  check_launch(cuda::check_labels(p, launch_device(target.get_device())));
}

void scale_(Tensor& x, const Tensor& factor) {
  const char* op = "scale_";
  if (x.scalar_type() == at::kDouble || !x.is_contiguous()) {
    x.mul_(factor);
    return;
  }
  const c10::cuda::CUDAGuard guard(x.device());
  TORCH_CHECK_VALUE(factor.numel() == 1 && factor.device() == x.device(), op,
                    ": expected factor of one element on ", x.device(), ", found ", factor.sizes(),
                    " on ", factor.device());
  const Tensor wide = factor.to(at::kFloat);
  check_launch(
      cuda::scale({x.mutable_data_ptr(), wide.const_data_ptr<float>(), x.numel(), dtype_of(op, x)},
                  launch_device(x.get_device())));
}

// ---- Dropout.

uint64_t read_seed(const char* op, double p, const OptionalTensor& seed) {
  TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, op, ": p must be in [0, 1], found ", p);
  if (!seed.has_value()) {
    TORCH_CHECK_VALUE(p == 0.0, op, ": a seed must be given with p = ", p);
    return 0;
  }
  TORCH_CHECK_VALUE(seed->scalar_type() == at::kLong && seed->numel() == 1 && seed->is_cpu(), op,
                    ": seed must be one int64 on the CPU, found ", seed->scalar_type(),
                    " of shape ", seed->sizes(), " on ", seed->device());
  return static_cast<uint64_t>(seed->item<int64_t>());
}

Tensor dropout_seeded(const Tensor& x, double p, const Tensor& seed) {
  const char* op = "dropout";
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor input = x.contiguous();
  const Tensor out = at::empty(x.sizes(), x.options());
  check_launch(cuda::dropout({input.const_data_ptr(), out.mutable_data_ptr(), x.numel(), p,
                              read_seed(op, p, seed), dtype_of(op, x), false},
                             launch_device(x.get_device())));
  return out;
}

void dropout_add_(Tensor& acc, const Tensor& x, double p, const Tensor& seed) {
  const char* op = "dropout_add_";
  const c10::cuda::CUDAGuard guard(x.device());
  const uint64_t value = read_seed(op, p, seed);
  TORCH_CHECK_VALUE(acc.is_contiguous() && acc.sizes() == x.sizes() &&
                        acc.scalar_type() == x.scalar_type() && acc.device() == x.device(),
                    op, ": acc must be contiguous and match x of shape ", x.sizes(), " and ",
                    x.scalar_type(), ", found ", acc.sizes(), " and ", acc.scalar_type());
  const Tensor input = x.contiguous();
  check_launch(cuda::dropout(
      {input.const_data_ptr(), acc.mutable_data_ptr(), x.numel(), p, value, dtype_of(op, x), true},
      launch_device(x.get_device())));
}

// ---- LoRA: x [M, in], a [r, in], b [out, r], low and dlow [M, r], dy [M, out], all of one dtype.

void check_matrix(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": expected ", name, " of two dimensions, found ", x.sizes());
}

Tensor workspace(int64_t floats, const Tensor& like) {
  return at::empty({floats}, like.options().dtype(at::kFloat));
}

Tensor lora_down(const Tensor& x, const Tensor& a, double p, const OptionalTensor& seed) {
  const char* op = "lora_down";
  const c10::cuda::CUDAGuard guard(x.device());
  check_matrix(op, "x", x);
  check_matrix(op, "a", a);
  check_like(op, "a", a, {a.size(0), x.size(1)}, x.scalar_type(), x.device());
  const Tensor input = x.contiguous(), small = a.contiguous();
  const Tensor out = at::empty({x.size(0), a.size(0)}, x.options());
  cuda::LoraDownParams params{input.const_data_ptr(),
                              small.const_data_ptr(),
                              out.mutable_data_ptr(),
                              nullptr,
                              x.size(0),
                              x.size(1),
                              a.size(0),
                              {p, read_seed(op, p, seed)},
                              dtype_of(op, x)};
  const cuda::Device device = launch_device(x.get_device());
  const Tensor space = workspace(cuda::lora_down_workspace(params, device), x);
  params.workspace = space.mutable_data_ptr<float>();
  check_launch(cuda::lora_down(params, device));
  return out;
}

std::tuple<Tensor, Tensor> lora_up_backward(const Tensor& dy, const Tensor& low, const Tensor& b) {
  const char* op = "lora_up_backward";
  const c10::cuda::CUDAGuard guard(dy.device());
  check_matrix(op, "dy", dy);
  check_matrix(op, "b", b);
  const int64_t rows = dy.size(0), outs = dy.size(1), rank = b.size(1);
  check_like(op, "b", b, {outs, rank}, dy.scalar_type(), dy.device());
  check_like(op, "low", low, {rows, rank}, dy.scalar_type(), dy.device());
  const Tensor input = dy.contiguous(), small = low.contiguous(), up = b.contiguous();
  const Tensor dlow = at::empty({rows, rank}, dy.options());
  const Tensor db = at::empty({outs, rank}, dy.options().dtype(at::kFloat));
  cuda::LoraUpBackwardParams params{input.const_data_ptr(),
                                    small.const_data_ptr(),
                                    up.const_data_ptr(),
                                    dlow.mutable_data_ptr(),
                                    db.mutable_data_ptr<float>(),
                                    nullptr,
                                    rows,
                                    outs,
                                    rank,
                                    dtype_of(op, dy)};
  const cuda::Device device = launch_device(dy.get_device());
  const Tensor space = workspace(cuda::lora_up_backward_workspace(params, device), dy);
  params.workspace = space.mutable_data_ptr<float>();
  check_launch(cuda::lora_up_backward(params, device));
  return {dlow, db};
}

Tensor lora_down_backward(const Tensor& x, const Tensor& dlow, double p,
                          const OptionalTensor& seed) {
  const char* op = "lora_down_backward";
  const c10::cuda::CUDAGuard guard(x.device());
  check_matrix(op, "x", x);
  check_matrix(op, "dlow", dlow);
  const int64_t rows = x.size(0), ins = x.size(1), rank = dlow.size(1);
  check_like(op, "dlow", dlow, {rows, rank}, x.scalar_type(), x.device());
  const Tensor input = x.contiguous(), small = dlow.contiguous();
  const Tensor da = at::empty({rank, ins}, x.options().dtype(at::kFloat));
  cuda::LoraDownBackwardParams params{input.const_data_ptr(),
                                      small.const_data_ptr(),
                                      da.mutable_data_ptr<float>(),
                                      nullptr,
                                      rows,
                                      ins,
                                      rank,
                                      {p, read_seed(op, p, seed)},
                                      dtype_of(op, x)};
  const cuda::Device device = launch_device(x.get_device());
  const Tensor space = workspace(cuda::lora_down_backward_workspace(params, device), x);
  params.workspace = space.mutable_data_ptr<float>();
  check_launch(cuda::lora_down_backward(params, device));
  return da;
}

void lora_add_(Tensor& dx, const Tensor& dlow, const Tensor& a, double p,
               const OptionalTensor& seed) {
  const char* op = "lora_add_";
  const c10::cuda::CUDAGuard guard(dx.device());
  check_matrix(op, "dx", dx);
  check_matrix(op, "a", a);
  const int64_t rows = dx.size(0), ins = dx.size(1), rank = a.size(0);
  TORCH_CHECK_VALUE(dx.is_contiguous(), op, ": dx must be contiguous, found strides ", dx.strides(),
                    " of shape ", dx.sizes());
  check_like(op, "a", a, {rank, ins}, dx.scalar_type(), dx.device());
  check_like(op, "dlow", dlow, {rows, rank}, dx.scalar_type(), dx.device());
  const Tensor small = dlow.contiguous(), down = a.contiguous();
  const cuda::LoraAddParams params{
      dx.mutable_data_ptr(),       small.const_data_ptr(), down.const_data_ptr(), rows, ins, rank,
      {p, read_seed(op, p, seed)}, dtype_of(op, dx)};
  check_launch(cuda::lora_add(params, launch_device(dx.get_device())));
}

Tensor lora_input_backward(const Tensor& x, const Tensor& dlow, const Tensor& a,
                           const OptionalTensor& dx, double p, const OptionalTensor& seed) {
  if (dx.has_value()) {
    Tensor sum = *dx;
    lora_add_(sum, dlow, a, p, seed);
  }
  return lora_down_backward(x, dlow, p, seed);
}

}  // namespace

std::string cuda_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::vector<std::string> cuda_architectures() {
  std::istringstream text(FASTTUNE_TEXT(FASTTUNE_ARCHITECTURES));
  std::vector<std::string> all;
  for (std::string one; std::getline(text, one, ',');) all.push_back(one);
  return all;
}

void raise_pending() {
  for (int device = 0; device < C10_COMPILE_TIME_MAX_GPUS; ++device) raise_fault(device);
}

}  // namespace fasttune

TORCH_LIBRARY_IMPL(fasttune, CUDA, m) {
  m.impl("cross_entropy_rows", &fasttune::cross_entropy_rows);
  m.impl("cross_entropy_rows_backward", &fasttune::cross_entropy_rows_backward);
  m.impl("cross_entropy_grad_", &fasttune::cross_entropy_grad_);
  m.impl("dropout_seeded", &fasttune::dropout_seeded);
  m.impl("dropout_add_", &fasttune::dropout_add_);
  m.impl("lora_down", &fasttune::lora_down);
  m.impl("lora_up_backward", &fasttune::lora_up_backward);
  m.impl("lora_down_backward", &fasttune::lora_down_backward);
  m.impl("lora_add_", &fasttune::lora_add_);
  m.impl("lora_input_backward", &fasttune::lora_input_backward);
  m.impl("note_labels", &fasttune::note_labels);
  m.impl("scale_", &fasttune::scale_);
}
