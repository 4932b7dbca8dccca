// What only the device can do, each by one small function: every line of PTX in fasttune stands
// here. emulation/simt.h has the same functions for the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fasttune {

// Storage types. cuda_fp16.h and cuda_bf16.h would cost each file seconds of compilation.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct alignas(16) Vector {
  uint32_t word[4];
};

// Not ld.global.nc: a row is overwritten by the kernel that reads it.
__device__ __forceinline__ Vector load_vector(const void* from) {
  Vector v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(from)
               : "memory");
  return v;
}

// For what is read again soon, by this multiprocessor.
__device__ __forceinline__ Vector load_vector_cached(const void* from) {
  Vector v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_vector(void* to, const Vector& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float x) { return __float_as_uint(x); }

// Two 16-bit numbers a word, the first in the low half.
template <typename T>
__device__ __forceinline__ void unpack2(uint32_t word, float& first, float& second);
template <typename T>
__device__ __forceinline__ uint32_t pack2(float first, float second);

template <>
__device__ __forceinline__ void unpack2<BFloat16>(uint32_t word, float& first, float& second) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xFFFF0000u);
}
template <>
__device__ __forceinline__ void unpack2<Half>(uint32_t word, float& first, float& second) {
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(first), "=f"(second)
      : "r"(word));
}
template <>
__device__ __forceinline__ uint32_t pack2<BFloat16>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <>
__device__ __forceinline__ uint32_t pack2<Half>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// Right to 2 ulp and what rounding x * log2(e) adds; 0 below 2^-126. __expf would spend three more
// instructions on what lies below.
__device__ __forceinline__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ __forceinline__ float fast_divide(float x, float y) { return __fdividef(x, y); }

// Never fused with an addition that follows: dropout gives the bits of the CPU's.
__device__ __forceinline__ float multiply(float x, float y) { return __fmul_rn(x, y); }

// The low, or the high, halves of two words: a's first.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

__device__ __forceinline__ void block_sync() { __syncthreads(); }

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// The block's dynamic shared memory, as one struct.
template <typename S>
__device__ __forceinline__ S& block_shared() {
  extern __shared__ Vector arena[];
  return *reinterpret_cast<S*>(arena);
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Every thread of the cluster arrives, then waits. The relaxed arrival orders no memory: it only
// tells that a block has started, so that its shared memory may be written.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Where the block `rank` has what this block has at `local`, in shared memory.
template <typename S>
__device__ __forceinline__ S* cluster_map(S* local, int rank) {
  uint64_t remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(local), "r"(rank));
  return reinterpret_cast<S*>(remote);
}
#else
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive_relaxed() {}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <typename S>
__device__ __forceinline__ S* cluster_map(S* local, int) {
  return local;
}
#endif

__device__ __forceinline__ uint32_t atomic_claim(uint32_t* state) {
  return atomicCAS(state, 0u, 1u);
}
// Everything written before is seen by the host before `value` is.
__device__ __forceinline__ void publish(uint32_t* state, uint32_t value) {
  __threadfence_system();
  *reinterpret_cast<volatile uint32_t*>(state) = value;
}

// d += a b, all of the warp together. With g = lane / 4 and t = lane % 4 a lane holds, in words of
// two numbers that are neighbours along k:
//   a [16, 16]: rows g, g + 8, g, g + 8 at k = 2t, 2t, 2t + 8, 2t + 8
//   b [16, 8]:  k = 2t, 2t + 8 in column g
//   d [16, 8]:  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<Half>(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The most blocks of a cluster that the kernel can have on the current device: none of the code for
// clusters is in a kernel that the driver compiles from PTX of sm_80, whatever the device.
template <typename Params>
int most_in_cluster(void (*kernel)(Params), int threads, int shared) {
  const auto address = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, address) != cudaSuccess) return 1;
  if (attributes.ptxVersion < 90) return 1;
  if (cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
      cudaSuccess) {
    return 8;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(16);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 16;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  return error == cudaSuccess && clusters > 0 ? 16 : 8;
}

struct LaunchShape {
  int64_t blocks;
  int threads;
  int cluster = 1;  // blocks that divide `blocks`
  int shared = 0;   // bytes; at most kSharedUnasked without more ado
};
constexpr int kSharedUnasked = 48 * 1024;

template <typename Params>
int launch(void (*kernel)(Params), const LaunchShape& shape, void* stream, const Params& params) {
  if (shape.blocks == 0) return cudaSuccess;
  if (shape.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shape.cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  if (shape.shared > kSharedUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace fasttune
