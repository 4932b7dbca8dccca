// The low-rank side of a LoRA linear layer by PyTorch's products of whole matrices, with one
// drawing of the mask for both gradients that need it.
#include <ATen/Parallel.h>

#include <algorithm>

#include "bindings.h"
#include "lora.h"

namespace fasttune::cpu {
namespace {

constexpr int64_t kPiece =
    4096;                      // elements; a multiple of 16, so that a piece begins a word of bits
constexpr int64_t kGrain = 8;  // pieces a thread takes at least

template <typename Body>
void for_each_piece(int64_t n, const Body& body) {
  at::parallel_for(0, (n + kPiece - 1) / kPiece, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      body(piece * kPiece, std::min(kPiece, n - piece * kPiece));
    }
  });
}

DropoutParams params_of(const at::Tensor& x, const at::Tensor& out, const LoraMask& mask) {
  return {
      x.const_data_ptr(), out.mutable_data_ptr(), x.numel(), mask.p, mask.seed, dtype_of(x), false};
}

at::Tensor widened(const at::Tensor& x) {
  return x.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

at::Tensor down(const at::Tensor& x, const at::Tensor& a, const LoraMask& mask) {
  if (mask.p == 0) return at::mm(x, a.t());
  const at::Tensor dropped = at::empty_like(x);
  dropout(params_of(x, dropped, mask));
  return at::mm(dropped, a.t());
}

at::Tensor up(const at::Tensor& low, const at::Tensor& b, const at::Tensor& bias) {
  return bias.defined() ? at::addmm(bias, low, b.t()) : at::mm(low, b.t());
}

std::tuple<at::Tensor, at::Tensor> up_backward(const at::Tensor& dy, const at::Tensor& low,
                                               const at::Tensor& b, double factor) {
  at::Tensor db;
  // r x out and turned: with out x r, the GEMM takes up to half as long again.
  if (low.defined()) db = widened(at::mm(low.t(), dy)).mul_(factor).t().contiguous();
  return {at::mm(dy, b), db};
}

at::Tensor input_backward(const at::Tensor& x, const at::Tensor& dlow, const at::Tensor& a,
                          const at::Tensor& dx, const LoraMask& mask) {
  if (mask.p == 0) {
    if (dx.defined()) dx.addmm_(dlow, a);
    return widened(at::mm(dlow.t(), x));
  }
  // One bit an element: a sixteenth of x in bf16, gone when this returns.
  const at::Tensor bits_of_x = at::empty({(x.numel() + 15) / 16}, x.options().dtype(at::kShort));
  uint16_t* const bits = reinterpret_cast<uint16_t*>(bits_of_x.mutable_data_ptr<int16_t>());
  at::Tensor buffer = at::empty_like(x);
  const auto piece_of = [&](const at::Tensor& in, const at::Tensor& out, int64_t first, int64_t n,
                            bool accumulate) {
    const int64_t offset = first * static_cast<int64_t>(x.element_size());
    DropoutParams piece = params_of(in, out, mask);
    piece.x = static_cast<const char*>(piece.x) + offset;
    piece.out = static_cast<char*>(piece.out) + offset;
    piece.n = n;
    piece.accumulate = accumulate;
    return piece;
  };
  for_each_piece(x.numel(), [&](int64_t first, int64_t n) {
    uint16_t drawn[(kPiece + kDrawSlack) / 16];  // drawing writes past the piece's end
    draw_mask(mask.seed, static_cast<uint64_t>(first), n, mask.p, drawn);
    std::copy(drawn, drawn + (n + 15) / 16, bits + first / 16);
    apply_mask(piece_of(x, buffer, first, n, false), drawn);
  });
  const at::Tensor da = at::mm(dlow.t(), buffer);
  if (dx.defined()) {
    at::mm_out(buffer, dlow, a);
    for_each_piece(x.numel(), [&](int64_t first, int64_t n) {
      apply_mask(piece_of(buffer, dx, first, n, true), bits + first / 16);
    });
  }
  return widened(da);
}

}  // namespace

at::Tensor scaled_by_pytorch(const at::Tensor& x, double factor, at::ScalarType type) {
  if (factor == 1.0) return x.to(type).contiguous();
  return widened(x).mul(factor).to(type).contiguous();
}

const LoraKernels kPlainLora = {down, up, up_backward, input_backward};

}  // namespace fasttune::cpu
