// Check, allocate, launch: deformable attention on CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "vector.h"

#ifdef FASTTUNE_VECTORS

namespace fasttune::cpu {
namespace {

bool is_served(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
}

// The arguments that forward and backward share, checked and made plain. Owns what the pointers in
// `params` point to.
struct DeformableCall {
  at::Tensor value, locations, weights;
  std::vector<DeformableLevel> levels;
  int64_t width;  // of a head, before padding
  DeformableParams params{};

  DeformableCall(const at::Tensor& value_, at::IntArrayRef shapes, at::IntArrayRef points,
                 const at::Tensor& locations_, const at::Tensor& weights_)
      : locations(locations_.contiguous()), weights(weights_.contiguous()) {
    TORCH_CHECK_TYPE(is_served(value_) && is_served(locations) && is_served(weights),
                     "deformable_attention: expected float32 or bfloat16 on CPU, found ",
                     value_.scalar_type(), ", ", locations.scalar_type(), " and ",
                     weights.scalar_type());
    TORCH_CHECK_VALUE(shapes.size() == 2 * points.size(), "deformable_attention: ", points.size(),
                      " levels need as many pairs of sizes, found ", shapes);
    for (size_t l = 0; l < points.size(); ++l) {
      const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
      TORCH_CHECK_VALUE(height > 0 && width > 0 && points[l] >= 0, "deformable_attention: shapes ",
                        shapes, " or points ", points, " are not sizes");
      levels.push_back({height, width, params.s, points[l]});
      params.s += height * width;
      params.n += points[l];
    }
    TORCH_CHECK_VALUE(value_.dim() == 4 && value_.size(1) == params.s && value_.size(3) > 0 &&
                          locations.dim() == 5,
                      "deformable_attention: value ", value_.sizes(), " does not fit shapes ",
                      shapes);
    TORCH_CHECK_VALUE(params.s < std::numeric_limits<int32_t>::max(),
                      "deformable_attention: ", params.s, " pixels are more than 32 bits count");
    params.b = value_.size(0);
    params.heads = value_.size(2);
    params.q = locations.size(1);
    const std::vector<int64_t> rows = {params.b, params.q, params.heads, params.n};
    TORCH_CHECK_VALUE(weights.sizes() == at::IntArrayRef(rows) && locations.size(4) == 2 &&
                          locations.sizes().slice(0, 4) == at::IntArrayRef(rows),
                      "deformable_attention: locations ", locations.sizes(), " or weights ",
                      weights.sizes(), " do not fit value ", value_.sizes(), " and points ",
                      points);
    width = value_.size(3);
    value = widened(value_);
    params.value = value.const_data_ptr();
    params.locations = locations.const_data_ptr();
    params.weights = weights.const_data_ptr();
    params.levels = levels.data();
    params.level_count = static_cast<int64_t>(levels.size());
    params.d = value.size(3);
    params.batch_stride = value.stride(0);
    params.row_stride = value.stride(1);
    params.head_stride = value.stride(2);
    params.dtype = dtype_of(value);
    params.locations_dtype = dtype_of(locations);
    params.weights_dtype = dtype_of(weights);
  }

  // [..., width] with zeros up to a multiple of what the kernel takes.
  at::Tensor widened(const at::Tensor& x) const {
    const int64_t left = width % kDeformableWidth;
    if (left != 0) return at::constant_pad_nd(x, {0, kDeformableWidth - left});
    return x.stride(3) == 1 ? x : x.contiguous();
  }

  // [b, rows, heads, d] for the kernel to write.
  at::Tensor fresh(int64_t rows) const {
    return at::empty({params.b, rows, params.heads, params.d}, value.options());
  }

  at::Tensor narrowed(const at::Tensor& x) const { return x.narrow(3, 0, width).contiguous(); }
};

at::Tensor bound_forward(const at::Tensor& value, at::IntArrayRef shapes, at::IntArrayRef points,
                         const at::Tensor& locations, const at::Tensor& weights) {
  DeformableCall call(value, shapes, points, locations, weights);
  const at::Tensor out = call.fresh(call.params.q);
  call.params.out = out.mutable_data_ptr();
  deformable_attention(call.params);
  return call.narrowed(out).flatten(2);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bound_backward(
    const at::Tensor& dout, const at::Tensor& value, at::IntArrayRef shapes, at::IntArrayRef points,
    const at::Tensor& locations, const at::Tensor& weights) {
  DeformableCall call(value, shapes, points, locations, weights);
  DeformableParams& params = call.params;
  TORCH_CHECK_VALUE(
      dout.dim() == 3 && dout.size(0) == params.b && dout.size(1) == params.q &&
          dout.size(2) == params.heads * call.width && dout.scalar_type() == value.scalar_type(),
      "deformable_attention_backward: dout ", dout.sizes(), " of ", dout.scalar_type(),
      " does not fit value ", value.sizes(), " of ", value.scalar_type());
  const at::Tensor incoming =
      call.widened(dout.contiguous().view({params.b, params.q, params.heads, call.width}));
  const at::Tensor dvalue = call.fresh(params.s);
  const at::Tensor dlocations = at::empty_like(call.locations);
  const at::Tensor dweights = at::empty_like(call.weights);
  params.dout = incoming.const_data_ptr();
  params.dvalue = dvalue.mutable_data_ptr();
  params.dlocations = dlocations.mutable_data_ptr();
  params.dweights = dweights.mutable_data_ptr();
  deformable_attention_backward(params);
  return {call.narrowed(dvalue), dlocations, dweights};
}

}  // namespace
}  // namespace fasttune::cpu

TORCH_LIBRARY_IMPL(fasttune, CPU, m) {
  m.impl("deformable_attention", &fasttune::cpu::bound_forward);
  m.impl("deformable_attention_backward", &fasttune::cpu::bound_backward);
}

#endif  // FASTTUNE_VECTORS
