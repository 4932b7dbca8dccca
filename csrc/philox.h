// Philox 4x32-10, the counter-based random numbers of every mask in fasttune; one source for host
// and device, no torch header.
//
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The
// constants and the known answers in tests/ops/test_dropout.py are Random123's.
//
// The mask of a tensor, by the contiguous logical index i of an element (64 bits):
//   counter = (low 32 bits of i / 4, high 32 bits of i / 4, 0, 0)
//   key     = (low 32 bits of the seed, high 32 bits of the seed)
//   u       = word i % 4 of philox(counter, key)
//   kept if and only if u >= nearbyint(p * 2^32), ties to even
// so neither the tiling, nor the number of threads, nor the device changes it.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTTUNE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTTUNE_HOST_DEVICE inline
#endif

namespace fasttune {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Philox4 {
  uint32_t word[4];
};

FASTTUNE_HOST_DEVICE Philox4 philox_round(Philox4 c, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * c.word[0];
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxM1) * c.word[2];
  return {
      {static_cast<uint32_t>(product1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(product1),
       static_cast<uint32_t>(product0 >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(product0)}};
}

FASTTUNE_HOST_DEVICE Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, key0, key1);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return counter;
}

FASTTUNE_HOST_DEVICE Philox4 philox_counter(uint64_t quad) {
  return {{static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32), 0u, 0u}};
}

// The four random words of elements 4 * quad .. 4 * quad + 3.
FASTTUNE_HOST_DEVICE Philox4 philox_quad(uint64_t seed, uint64_t quad) {
  return philox4x32_10(philox_counter(quad), static_cast<uint32_t>(seed),
                       static_cast<uint32_t>(seed >> 32));
}

// Every round's two keys. Among a kernel's arguments they cost neither an addition nor a register:
// instructions read them from constant memory.
struct PhiloxKeys {
  uint32_t word[2 * kPhiloxRounds];
};

inline PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    keys.word[2 * round] = static_cast<uint32_t>(seed) + round * kPhiloxW0;
    keys.word[2 * round + 1] = static_cast<uint32_t>(seed >> 32) + round * kPhiloxW1;
  }
  return keys;
}

FASTTUNE_HOST_DEVICE Philox4 philox_quad(const PhiloxKeys& keys, uint64_t quad) {
  Philox4 state = philox_counter(quad);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    state = philox_round(state, keys.word[2 * round], keys.word[2 * round + 1]);
  }
  return state;
}

// 64 bits, because p = 1 (nothing is kept) gives 2^32.
inline uint64_t dropout_threshold(double p) {
  return static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
}

}  // namespace fasttune
