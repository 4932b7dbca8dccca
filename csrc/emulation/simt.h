// The functions of ptx.cuh for the host: one launch at a time, every thread of a cluster a fiber.
// So the kernels run, whole and unchanged, where there is no GPU: tests/ops/test_emulated.py.
// Nothing of this is part of fasttune._C.
//
// What it finds: wrong indices, missing barriers (warps run in the order that the test chooses),
// barriers that not all reach, misaligned vectors, shared memory read before it is written (it
// starts as NaN). What it can't: speed, and what the hardware does otherwise than documented.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

namespace fasttune {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct alignas(16) Vector {
  uint32_t word[4];
};

namespace simt {

struct Index {
  unsigned x;
};

// As many arrivals as members, then the next phase.
struct Barrier {
  int members = 0, arrived = 0;
  int64_t phase = 0;
};

struct Warp {
  Barrier barrier;
  float value[32];
  uint32_t a[32][4], b[32][2];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Vector> shared;
};

struct Fiber {
  ucontext_t context;
  Index thread, block;
  int rank, lane;
  Block* home;
  Warp* warp;
  int64_t cluster_phase;
  bool arrived;  // at the cluster's barrier, without having waited yet
  bool done;
};

// What a launch is made of. A cluster runs to its end before the next one starts.
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier cluster;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  std::function<void()> body;
  Index block_dim, grid_dim;
  int cluster_size = 1;
  int64_t events = 0;  // arrivals and ends: without any in a whole round, all wait for ever
  int order = 0;       // of the warps: 0 ascending, 1 descending, else a seed
  std::string error;   // the first one
  int64_t launches = 0;
};

inline Machine& machine() {
  static Machine one;
  return one;
}
inline Fiber& self() { return *machine().running; }

inline void fail(const std::string& what) {
  if (machine().error.empty()) machine().error = what;
}

inline void yield() {
  Fiber& me = self();
  swapcontext(&me.context, &machine().scheduler);
}

inline int64_t arrive(Barrier& barrier) {
  const int64_t phase = barrier.phase;
  ++machine().events;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
  return phase;
}
inline void wait(const Barrier& barrier, int64_t phase) {
  while (barrier.phase == phase) yield();
}
inline void meet(Barrier& barrier) { wait(barrier, arrive(barrier)); }

inline void fiber_main() {
  Fiber& me = self();
  machine().body();
  me.done = true;
  ++machine().events;
  yield();
}

constexpr size_t kStack = 128 * 1024;  // bytes

inline char* stacks(size_t fibers) {
  static char* memory = nullptr;
  static size_t have = 0;
  if (fibers > have) {
    if (memory != nullptr) munmap(memory, have * kStack);
    memory = static_cast<char*>(mmap(nullptr, fibers * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    have = fibers;
  }
  return memory;
}

inline void start_cluster(int64_t first_block, int threads, int shared) {
  Machine& m = machine();
  const size_t count = static_cast<size_t>(m.cluster_size) * threads;
  char* memory = stacks(count);
  m.cluster = {static_cast<int>(count), 0, 0};
  m.blocks.clear();
  m.fibers.assign(count, Fiber{});
  for (int rank = 0; rank < m.cluster_size; ++rank) {
    auto block = std::make_unique<Block>();
    block->barrier.members = threads;
    block->warps.resize(threads / 32);
    for (Warp& warp : block->warps) warp.barrier.members = 32;
    block->shared.resize((shared + 15) / 16);
    std::memset(block->shared.data(), 0xFF, block->shared.size() * sizeof(Vector));
    for (int thread = 0; thread < threads; ++thread) {
      const size_t index = static_cast<size_t>(rank) * threads + thread;
      Fiber& fiber = m.fibers[index];
      fiber.thread = {static_cast<unsigned>(thread)};
      fiber.block = {static_cast<unsigned>(first_block + rank)};
      fiber.rank = rank;
      fiber.lane = thread % 32;
      fiber.home = block.get();
      fiber.warp = &block->warps[thread / 32];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = memory + index * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
    }
    m.blocks.push_back(std::move(block));
  }
}

// A warp runs as far as it can before the next one does, so that whoever relies on warps keeping
// step is found out.
inline void run_cluster() {
  Machine& m = machine();
  std::vector<std::vector<Fiber*>> warps;
  for (Fiber& fiber : m.fibers) {
    if (fiber.lane == 0) warps.emplace_back();
    warps.back().push_back(&fiber);
  }
  if (m.order == 1) std::reverse(warps.begin(), warps.end());
  if (m.order > 1) std::shuffle(warps.begin(), warps.end(), std::mt19937(m.order));
  for (bool more = true; more;) {
    const int64_t before = m.events;
    more = false;
    for (std::vector<Fiber*>& warp : warps) {
      int64_t seen;
      do {
        seen = m.events;
        for (Fiber* fiber : warp) {
          if (fiber->done) continue;
          m.running = fiber;
          swapcontext(&m.scheduler, &fiber->context);
        }
      } while (m.events != seen);
      for (const Fiber* fiber : warp) more = more || !fiber->done;
    }
    if (more && m.events == before) {
      return fail("deadlock: some threads wait at a barrier that others don't reach");
    }
  }
}

}  // namespace simt

#define threadIdx (::fasttune::simt::self().thread)
#define blockIdx (::fasttune::simt::self().block)
#define blockDim (::fasttune::simt::machine().block_dim)
#define gridDim (::fasttune::simt::machine().grid_dim)

inline Vector load_vector(const void* from) {
  if (reinterpret_cast<uint64_t>(from) % 16 != 0) {
    simt::fail("a vector is read at an address that is no multiple of 16");
  }
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline Vector load_vector_cached(const void* from) { return load_vector(from); }
inline void store_vector(void* to, const Vector& v) {
  if (reinterpret_cast<uint64_t>(to) % 16 != 0) {
    simt::fail("a vector is written at an address that is no multiple of 16");
  }
  std::memcpy(to, &v, sizeof(v));
}

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

namespace simt {

inline float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof(value));
  return static_cast<float>(value);
}
inline uint16_t narrow(float x, BFloat16) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t narrow(float x, Half) {
  const auto value = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

}  // namespace simt

template <typename T>
void unpack2(uint32_t word, float& first, float& second) {
  first = simt::widen(T{static_cast<uint16_t>(word)});
  second = simt::widen(T{static_cast<uint16_t>(word >> 16)});
}
template <typename T>
uint32_t pack2(float first, float second) {
  return simt::narrow(first, T{}) | static_cast<uint32_t>(simt::narrow(second, T{})) << 16;
}

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float x, float y) { return x / y; }

inline float multiply(float x, float y) { return x * y; }

inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000); }

inline void block_sync() { simt::meet(simt::self().home->barrier); }

inline float shuffle_xor(float value, int mask) {
  simt::Fiber& me = simt::self();
  me.warp->value[me.lane] = value;
  simt::meet(me.warp->barrier);
  const float other = me.warp->value[me.lane ^ mask];
  simt::meet(me.warp->barrier);
  return other;
}

template <typename S>
S& block_shared() {
  std::vector<Vector>& shared = simt::self().home->shared;
  if (shared.size() * sizeof(Vector) < sizeof(S))
    simt::fail("too little shared memory was asked for");
  return *reinterpret_cast<S*>(shared.data());
}

inline int cluster_size() { return simt::machine().cluster_size; }
inline int cluster_rank() { return simt::self().rank; }
inline void cluster_arrive() {
  simt::Fiber& me = simt::self();
  if (me.arrived) simt::fail("a thread arrives twice at the cluster's barrier and never waited");
  me.arrived = true;
  me.cluster_phase = simt::arrive(simt::machine().cluster);
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  simt::Fiber& me = simt::self();
  if (!me.arrived) simt::fail("a thread waits at the cluster's barrier and never arrived");
  me.arrived = false;
  simt::wait(simt::machine().cluster, me.cluster_phase);
}
template <typename S>
S* cluster_map(S* local, int rank) {
  char* mine = reinterpret_cast<char*>(simt::self().home->shared.data());
  char* theirs = reinterpret_cast<char*>(simt::machine().blocks[rank]->shared.data());
  return reinterpret_cast<S*>(theirs + (reinterpret_cast<char*>(local) - mine));
}

inline uint32_t atomic_claim(uint32_t* state) {
  const uint32_t before = *state;
  if (before == 0) *state = 1;
  return before;
}
inline void publish(uint32_t* state, uint32_t value) { *state = value; }

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::Fiber& me = simt::self();
  simt::Warp& warp = *me.warp;
  std::memcpy(warp.a[me.lane], a, sizeof(a));
  std::memcpy(warp.b[me.lane], b, sizeof(b));
  simt::meet(warp.barrier);
  const int g = me.lane / 4, t = me.lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 16; k += 2) {
      // Words 0 and 1 of a are its columns 0 to 7, words 2 and 3 the others; so for b.
      const uint32_t left = warp.a[4 * (row % 8) + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const uint32_t right = warp.b[4 * column + k % 8 / 2][k / 8];
      float x0, x1, y0, y1;
      unpack2<T>(left, x0, x1);
      unpack2<T>(right, y0, y1);
      d[i] += x0 * y0 + x1 * y1;
    }
  }
  simt::meet(warp.barrier);
}

template <typename Params>
int most_in_cluster(void (*)(Params), int, int) {
  return 16;
}

struct LaunchShape {
  int64_t blocks;
  int threads;
  int cluster = 1;
  int shared = 0;
};

template <typename Params>
int launch(void (*kernel)(Params), const LaunchShape& shape, void*, const Params& params) {
  simt::Machine& m = simt::machine();
  ++m.launches;
  if (shape.threads % 32 != 0 || shape.threads > 1024) simt::fail("an impossible block");
  if (shape.cluster > 16 || shape.blocks % shape.cluster != 0) simt::fail("an impossible cluster");
  if (shape.shared > 100 * 1024) simt::fail("more shared memory than two blocks can have");
  m.block_dim = {static_cast<unsigned>(shape.threads)};
  m.grid_dim = {static_cast<unsigned>(shape.blocks)};
  m.cluster_size = shape.cluster;
  m.body = [&] { kernel(params); };
  const int64_t clusters = shape.blocks / shape.cluster;
  for (int64_t i = 0; i < clusters && m.error.empty(); ++i) {
    const int64_t cluster = m.order == 1 ? clusters - 1 - i : i;
    simt::start_cluster(cluster * shape.cluster, shape.threads, shape.shared);
    simt::run_cluster();
  }
  return m.error.empty() ? 0 : 1;
}

}  // namespace fasttune
