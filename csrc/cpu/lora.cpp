// The gradients of a LoRA linear layer that need its dropout's mask, with one drawing of it for
// both.
#include <ATen/Parallel.h>

#include <algorithm>

#include "products.h"

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

}  // namespace

at::Tensor lora_input_backward(const DropoutParams& dropout, const at::Tensor& x,
                               const at::Tensor& dlow, const at::Tensor& a, const at::Tensor& dx) {
  // One bit an element: a sixteenth of x in bf16, gone when this returns.
  const at::Tensor mask = at::empty({(x.numel() + 15) / 16}, x.options().dtype(at::kShort));
  uint16_t* const bits = reinterpret_cast<uint16_t*>(mask.mutable_data_ptr<int16_t>());
  at::Tensor buffer = at::empty_like(x);
  const auto piece_of = [&](const at::Tensor& in, const at::Tensor& out, int64_t first, int64_t n,
                            bool accumulate) {
    const int64_t offset = first * static_cast<int64_t>(x.element_size());
    DropoutParams piece = dropout;
    piece.x = static_cast<const char*>(in.const_data_ptr()) + offset;
    piece.out = static_cast<char*>(out.mutable_data_ptr()) + offset;
    piece.n = n;
    piece.accumulate = accumulate;
    return piece;
  };
  for_each_piece(x.numel(), [&](int64_t first, int64_t n) {
    uint16_t drawn[(kPiece + kDrawSlack) / 16];  // drawing writes past the piece's end
    draw_mask(dropout.seed, static_cast<uint64_t>(first), n, dropout.p, drawn);
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
  return da;
}

}  // namespace fasttune::cpu
