// Philox 4x32-10, the counter-based random numbers of every mask in fasttune; one source for host
// and device, no torch header.
//
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The
// constants and the known answers in tests/ops/test_dropout.py are Random123's.
//
// The mask of a tensor, by the contiguous logical index i of an element (64 bits):
//   counter = (low 32 bits of i / 8, high 32 bits of i / 8, 0, 0)
//   key     = (low 32 bits of the seed, high 32 bits of the seed)
//   u       = the 16 bits number i % 8 of philox(counter, key): of its word i % 8 / 2 the low half
//             where i is even, the high half where i is odd
//   kept if and only if u >= nearbyint(p * 2^16), ties to even
// so neither the tiling, nor the number of threads, nor the device changes it. The 16 bits of eight
// elements lie in a little-endian machine's memory as eight 16-bit elements do.
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

// One call ("draw") serves so many elements.
constexpr int kElementsPerDraw = 8;

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

FASTTUNE_HOST_DEVICE Philox4 philox_counter(uint64_t draw) {
  return {{static_cast<uint32_t>(draw), static_cast<uint32_t>(draw >> 32), 0u, 0u}};
}

// The random words of elements 8 * draw .. 8 * draw + 7.
FASTTUNE_HOST_DEVICE Philox4 philox_draw(uint64_t seed, uint64_t draw) {
  return philox4x32_10(philox_counter(draw), static_cast<uint32_t>(seed),
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

FASTTUNE_HOST_DEVICE Philox4 philox_draw(const PhiloxKeys& keys, uint64_t draw) {
  Philox4 state = philox_counter(draw);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    state = philox_round(state, keys.word[2 * round], keys.word[2 * round + 1]);
  }
  return state;
}

// In [0, 2^16]. At 0 (p up to 2^-17) nothing is dropped; at 2^16 (p from 1 - 2^-17) everything is,
// and no 16-bit number is as large: kernels that compare 16 bits take it apart.
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::nearbyint(p * 65536.0));
}
constexpr uint32_t kDropAll = 65536;

// What kept elements are multiplied by: by p as it was given, not by the multiple of 2^-16.
inline double dropout_scale(double p) { return p < 1.0 ? 1.0 / (1.0 - p) : 0.0; }

}  // namespace fasttune
