// glibc gives large freed blocks back to the system, so that every training step pays for zeroed
// pages anew; told to keep them, its heap is torn into holes by batches of changing length. Here
// large blocks live in one reserved range of addresses by themselves: the first free place that is
// large enough is taken, neighbours that are free become one, and pages once touched stay. A step
// frees what it took, so the next one finds the range as it was.
#include "allocator.h"

#if defined(__linux__)

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

namespace fasttune::cpu {
namespace {

constexpr size_t kAlignment = 64;     // bytes, as PyTorch's own
constexpr size_t kLarge = 64 * 1024;  // bytes; what is smaller goes to PyTorch's allocator

class KeptMemory final : public c10::Allocator {
 public:
  KeptMemory(char* base, size_t size, c10::Allocator* small)
      : base_(base), end_(base + size), small_(small) {
    free_.emplace(base, size);
  }

  c10::DataPtr allocate(size_t bytes) override {
    char* block = bytes < kLarge ? nullptr : take(bytes);
    if (block != nullptr) {
      c10::profiledCPUMemoryReporter().New(block, bytes);
    } else if (bytes > 0) {  // too small, or too large for what is free; the other may throw
      block = static_cast<char*>(small_->raw_allocate(bytes));
    }
    return {block, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  // One function for blocks of both kinds, since oneDNN's scratch memory comes and goes without a
  // DataPtr.
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

  KeptBytes bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {live_bytes_, touched_ - base_};
  }

  std::mutex& mutex() { return mutex_; }

 private:
  char* take(size_t bytes) {
    if (bytes > static_cast<size_t>(end_ - base_))
      return nullptr;  // or the rounding might overflow
    const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto place = std::find_if(free_.begin(), free_.end(),
                                    [size](const auto& range) { return range.second >= size; });
    if (place == free_.end()) return nullptr;
    char* const block = place->first;
    const size_t rest = place->second - size;
    free_.erase(place);
    if (rest > 0) free_.emplace(block + size, rest);
    sizes_.emplace(block, size);
    live_bytes_ += static_cast<int64_t>(size);
    touched_ = std::max(touched_, block + size);
    return block;
  }

  static void give_back(void* block);

  void put(char* block) {
    if (block < base_ || block >= end_) {
      if (block != nullptr) small_->raw_deallocate(block);
      return;
    }
    c10::profiledCPUMemoryReporter().Delete(block);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = sizes_.find(block);
    TORCH_CHECK(known != sizes_.end(), "fasttune: a block of memory is freed twice");
    size_t size = known->second;
    sizes_.erase(known);
    live_bytes_ -= static_cast<int64_t>(size);
    auto after = free_.lower_bound(block);
    if (after != free_.end() && block + size == after->first) {
      size += after->second;
      after = free_.erase(after);
    }
    if (after != free_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == block) {
        before->second += size;
        return;
      }
    }
    free_.emplace_hint(after, block, size);
  }

  char* const base_;
  char* const end_;
  c10::Allocator* const small_;
  std::mutex mutex_;
  std::map<char*, size_t> free_;             // by address
  std::unordered_map<char*, size_t> sizes_;  // of live blocks
  int64_t live_bytes_ = 0;
  char* touched_ = base_;
};

KeptMemory* kept = nullptr;  // never destroyed: tensors may outlive everything else

void KeptMemory::give_back(void* block) { kept->put(static_cast<char*>(block)); }

}  // namespace

bool keep_memory() {
  if (kept != nullptr) return true;
  const size_t size =
      2 * static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return false;
  madvise(base, size, MADV_HUGEPAGE);  // a hint: without it pages are small
  kept = new KeptMemory(static_cast<char*>(base), size, c10::GetCPUAllocator());
  // A child made while another thread allocates would inherit a lock that nobody opens.
  pthread_atfork([] { kept->mutex().lock(); }, [] { kept->mutex().unlock(); },
                 [] { kept->mutex().unlock(); });
  c10::SetCPUAllocator(kept, /*priority=*/1);
  return true;
}

bool keeps_memory() { return kept != nullptr; }

KeptBytes kept_bytes() { return kept == nullptr ? KeptBytes{0, 0} : kept->bytes(); }

}  // namespace fasttune::cpu

#else

namespace fasttune::cpu {
bool keep_memory() { return false; }
bool keeps_memory() { return false; }
KeptBytes kept_bytes() { return {0, 0}; }
}  // namespace fasttune::cpu

#endif
