// The CUDA kernels under emulation, and the host-and-device headers they are built on, as plain C
// functions for tests/ops/ to call by ctypes. The tests compile this themselves.
//
// A kernel function returns 0, or else emulation_error() says what went wrong.
#include "../cross_entropy.cu"
#include "../dropout.cu"
#include "../lora.cu"

using namespace fasttune;
using namespace fasttune::cuda;

namespace {

constexpr Device kDevice{nullptr,
                         4};  // few multiprocessors: sums are split even where rows are few

}  // namespace

extern "C" {

const char* emulation_error() {
  static std::string last;
  last.swap(simt::machine().error);
  simt::machine().error.clear();
  return last.c_str();
}

// order: of a cluster's warps: 0 ascending, 1 descending (and so the clusters), else a seed to
// shuffle them by.
void emulation_order(int order) { simt::machine().order = order; }

void softmax_combine(const float* a, const float* b, float* out) {
  const OnlineSoftmax both = combine({a[0], a[1]}, {b[0], b[1]});
  out[0] = both.max, out[1] = both.sum;
}

// options: label_smoothing, softcap, z_loss. out: the loss, then a, b and e of softmax.h.
void softmax_row(const float* options, float max, float log_sum, float target_shifted,
                 float weighted_shifted, float target_weight, float weight_sum, int64_t classes,
                 float* out) {
  const CrossEntropyOptions o{options[0], options[1], options[2]};
  out[0] = row_loss(o, max, log_sum, target_shifted, weighted_shifted, target_weight, weight_sum,
                    classes);
  const RowFactors f = row_factors(o, max, log_sum, target_weight, weight_sum, classes);
  out[1] = f.a, out[2] = f.b, out[3] = f.e;
}

// plan: cluster, threads, held.
void split_plan(int64_t columns, int size, int max_cluster, int* plan) {
  const RowPlan found = plan_row(columns, size, max_cluster);
  plan[0] = found.cluster, plan[1] = found.threads, plan[2] = found.held;
}

// Counts in touched [columns] how often the threads of a cluster take each element; returns the
// most vectors that one thread takes.
int split_cover(uint64_t from, uint64_t to, int columns, int size, int cluster, int threads,
                uint8_t* touched) {
  const RowSpan span = row_span(from, to, columns, size);
  int most = 0;
  for (int rank = 0; rank < cluster; ++rank) {
    for (int thread = 0; thread < threads; ++thread) {
      const int count = vector_count(span, cluster, rank, threads, thread);
      most = std::max(most, count);
      for (int n = 0; n < count; ++n) {
        const int first =
            span.head + kVectorBytes / size * vector_index(n, cluster, rank, threads, thread);
        if ((from + uint64_t(first) * size) % kVectorBytes != 0) return -1;
        for (int i = 0; i < kVectorBytes / size; ++i) ++touched[first + i];
      }
      for (int e = rank * threads + thread; e < edge_count(span); e += cluster * threads) {
        ++touched[edge_column(span, e, columns)];
      }
    }
  }
  return most;
}

// The words of `count` draws from `first` on, [count, 4], by the keys that kernels get.
void philox_words(uint64_t seed, uint64_t first, int64_t count, uint32_t* out) {
  const PhiloxKeys keys = philox_keys(seed);
  for (int64_t i = 0; i < count; ++i) {
    const Philox4 word = philox_draw(keys, first + static_cast<uint64_t>(i));
    std::copy(word.word, word.word + 4, out + 4 * i);
  }
}

// what: 0 rows, 1 backward, 2 in-place gradient. plan: null for plan_row's.
int cross_entropy(int what, const void* logits, void* grad, const int64_t* target,
                  const float* weight, const float* weight_sum, const float* factor, float* loss,
                  float* stats, void* fault, int64_t rows, int64_t classes, int64_t stride,
                  int64_t grad_stride, int64_t factor_stride, int64_t ignore_index,
                  const float* options, int dtype, const int* plan) {
  CrossEntropyParams p = {};
  p.logits = logits, p.grad = grad, p.target = target;
  p.weight = weight, p.weight_sum = weight_sum, p.factor = factor;
  p.loss = loss, p.stats = stats, p.fault = static_cast<LabelFault*>(fault);
  p.rows = rows, p.classes = classes, p.stride = stride, p.grad_stride = grad_stride;
  p.factor_stride = factor_stride, p.ignore_index = ignore_index;
  p.options = {options[0], options[1], options[2]};
  p.dtype = static_cast<DType>(dtype);
  p.plan = plan_row(classes, p.dtype == DType::kFloat32 ? 4 : 2, cross_entropy_max_cluster());
  if (plan != nullptr) p.plan = {plan[0], plan[1], plan[2] != 0};
  if (what == 0) return cross_entropy_rows(p, kDevice);
  return what == 1 ? cross_entropy_rows_backward(p, kDevice) : cross_entropy_grad(p, kDevice);
}

int dropout(const void* x, void* out, int64_t n, double p, uint64_t seed, int dtype,
            int accumulate) {
  return fasttune::cuda::dropout({x, out, n, p, seed, static_cast<DType>(dtype), accumulate != 0},
                                 kDevice);
}

int down(const void* x, const void* a, void* out, int64_t rows, int64_t ins, int64_t rank, double p,
         uint64_t seed, int dtype) {
  LoraDownParams params{x, a, out, nullptr, rows, ins, rank, {p, seed}, static_cast<DType>(dtype)};
  std::vector<float> workspace(lora_down_workspace(params, kDevice), NAN);
  params.workspace = workspace.data();
  return lora_down(params, kDevice);
}

int up_backward(const void* dy, const void* low, const void* b, void* dlow, float* db, int64_t rows,
                int64_t outs, int64_t rank, int dtype) {
  LoraUpBackwardParams params{dy,      low,  b,    dlow, db,
                              nullptr, rows, outs, rank, static_cast<DType>(dtype)};
  std::vector<float> workspace(lora_up_backward_workspace(params, kDevice), NAN);
  params.workspace = workspace.data();
  return lora_up_backward(params, kDevice);
}

int down_backward(const void* x, const void* dlow, float* da, int64_t rows, int64_t ins,
                  int64_t rank, double p, uint64_t seed, int dtype) {
  LoraDownBackwardParams params{
      x, dlow, da, nullptr, rows, ins, rank, {p, seed}, static_cast<DType>(dtype)};
  std::vector<float> workspace(lora_down_backward_workspace(params, kDevice), NAN);
  params.workspace = workspace.data();
  return lora_down_backward(params, kDevice);
}

int add(void* dx, const void* dlow, const void* a, int64_t rows, int64_t ins, int64_t rank,
        double p, uint64_t seed, int dtype) {
  return lora_add({dx, dlow, a, rows, ins, rank, {p, seed}, static_cast<DType>(dtype)}, kDevice);
}

}  // extern "C"
