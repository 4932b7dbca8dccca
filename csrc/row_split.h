// How a row of logits is cut into 16-byte vectors and dealt to the threads of a cluster. Index
// arithmetic only, for host and device; no torch header.
#pragma once

#include <cstdint>

#include "philox.h"  // FASTTUNE_HOST_DEVICE

namespace fasttune {

constexpr int kVectorBytes = 16;
constexpr int kHeldVectors = 8;     // a thread keeps in registers: 32 of the 64 it may have
constexpr int kMaxThreads = 1024;   // a block
constexpr int kMaxCluster = 16;     // blocks; more than 8 is not portable
constexpr int kUsualThreads = 256;  // four such blocks fill a multiprocessor's registers

// A row = head, then `vectors` aligned vectors, then tail. Head and tail are its edges: fewer than
// a vector each, unless the row has no vectors.
struct RowSpan {
  int32_t head, vectors, tail;  // elements, vectors, elements
};

// address: of the row's first element, a multiple of the element's size; size: 2 or 4 bytes.
FASTTUNE_HOST_DEVICE RowSpan row_span(uint64_t address, int32_t columns, int32_t size) {
  const int32_t per = kVectorBytes / size;
  const int32_t past = static_cast<int32_t>(address % kVectorBytes) / size;
  int32_t head = past == 0 ? 0 : per - past;
  if (head > columns) head = columns;
  const int32_t vectors = (columns - head) / per;
  return {head, vectors, columns - head - vectors * per};
}

// A row read at one address and written at another has vectors only if both are aligned alike.
FASTTUNE_HOST_DEVICE RowSpan row_span(uint64_t from, uint64_t to, int32_t columns, int32_t size) {
  if (from % kVectorBytes != to % kVectorBytes) return {columns, 0, 0};
  return row_span(from, columns, size);
}

FASTTUNE_HOST_DEVICE int32_t edge_count(RowSpan span) { return span.head + span.tail; }

FASTTUNE_HOST_DEVICE int32_t edge_column(RowSpan span, int32_t edge, int32_t columns) {
  return edge < span.head ? edge : columns - edge_count(span) + edge;
}

// The i-th vector of a thread: neighbouring threads take neighbouring vectors, then the next block
// of the cluster goes on.
FASTTUNE_HOST_DEVICE int32_t vector_index(int32_t i, int32_t cluster, int32_t rank, int32_t threads,
                                          int32_t thread) {
  return (i * cluster + rank) * threads + thread;
}

// How many of a thread's vectors exist.
FASTTUNE_HOST_DEVICE int32_t vector_count(RowSpan span, int32_t cluster, int32_t rank,
                                          int32_t threads, int32_t thread) {
  const int32_t left = span.vectors - vector_index(0, cluster, rank, threads, thread);
  const int32_t stride = cluster * threads;
  return left <= 0 ? 0 : (left + stride - 1) / stride;
}

struct RowPlan {
  int32_t cluster;  // blocks that share a row
  int32_t threads;  // of a block, a multiple of 32
  bool held;        // the row stays in registers between its one reading and its one writing
};

// max_cluster: 1 before sm_90, where clusters do not exist; else kMaxCluster.
inline RowPlan plan_row(int64_t columns, int32_t size, int32_t max_cluster) {
  const int64_t vectors = columns * size / kVectorBytes;
  const auto fits = [&](int32_t cluster, int32_t threads) {
    return vectors <= static_cast<int64_t>(cluster) * threads * kHeldVectors;
  };
  for (int32_t threads = 32; threads < kUsualThreads; threads += 32) {
    if (fits(1, threads)) return {1, threads, true};
  }
  for (int32_t threads = kUsualThreads; threads <= kMaxThreads; threads *= 2) {
    for (int32_t cluster = 1; cluster <= max_cluster; cluster *= 2) {
      if (cluster > 8 && threads < kMaxThreads / 2) break;  // portable clusters first
      if (fits(cluster, threads)) return {cluster, threads, true};
    }
  }
  return {1, kMaxThreads, false};
}

}  // namespace fasttune
