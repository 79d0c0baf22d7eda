// The instructions of csrc/wgmma.cuh as the PTX ISA documents them ("Asynchronous warpgroup-level matrix instructions":
// matrix descriptors, canonical layouts, accumulator fragments).
//
// Products are as late and as early as they may be: operands are read at the instruction, and again when a wait ends
// their group; if they have changed, the sum is NaN. The registers of a sum are NaN from the instruction to the wait.
// Operands are also compared with a copy of shared memory that only fence_async_proxy brings up to date.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "emulated_ptx.h"
#include "emulator.h"

namespace vatt {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulator::shared_memory());
}

namespace emulator {

constexpr int kGroup = 128, kRows = 64, kColumns = 256, kDepth = 16, kRegisters = kRows * kColumns / kGroup;

// rows x 16 halves in shared memory; `across` says that k runs across rows of 128 bytes, not along them.
struct Operand {
  uint64_t descriptor = 0;
  bool across = false;
  int rows = 0;

  std::vector<uint16_t> read(const unsigned char* memory, size_t size) const {
    if (descriptor >> 62 != 1) fail("the emulator knows only descriptors with 128-byte swizzle");
    if (descriptor >> 49 & 7) fail("a descriptor with a base offset");
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
    std::vector<uint16_t> values(rows * kDepth);
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        uint32_t at = start + (across ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                                      : row / 8 * stride + row % 8 * 128 + k * 2);
        at ^= (at >> 7 & 7) << 4;
        if (at + 2 > size) fail("wgmma reads outside shared memory");
        memcpy(&values[row * kDepth + k], memory + at, 2);
      }
    }
    return values;
  }
};

// The sum of one warpgroup while products for it are in flight.
struct Sum {
  std::array<float*, kGroup> registers;
  std::vector<float> value = std::vector<float>(kRows * kColumns);
  int in_flight = 0;
  bool wrong = false;

  static int row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
  static int column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

  template <typename Each>
  void each(const Each& body) {
    for (int thread = 0; thread < kGroup; ++thread) {
      for (int i = 0; i < kRegisters; ++i) {
        body(registers[thread][i], value[row(thread, i) * kColumns + column(thread, i)]);
      }
    }
  }
};

struct Product {
  std::shared_ptr<Sum> sum;
  Operand operands[2];
  std::vector<uint16_t> read[2];
};

struct Warpgroup {
  bool fenced = false;
  std::map<float*, std::shared_ptr<Sum>> sums;  // in flight, by the first thread's registers
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;  // committed, oldest first
};

struct AsyncProxy {
  int64_t block = -1;
  std::vector<unsigned char> memory;
  std::map<int, Warpgroup> warpgroups;
};

// Of the running block: memory that no fence has shown is NaN.
inline AsyncProxy& async_proxy() {
  static AsyncProxy proxy;
  if (proxy.block != block_number()) {
    proxy = {block_number(), std::vector<unsigned char>(shared_size(), 0xff), {}};
  }
  return proxy;
}

inline Warpgroup& warpgroup() { return async_proxy().warpgroups[thread_index() / kGroup]; }

template <typename T>
void multiply(Sum& sum, const std::vector<uint16_t>& a, const std::vector<uint16_t>& b) {
  std::vector<float> right(kDepth * kColumns);
  for (int n = 0; n < kColumns; ++n) {
    for (int k = 0; k < kDepth; ++k) right[k * kColumns + n] = to_float<T>(b[n * kDepth + k]);
  }
  for (int m = 0; m < kRows; ++m) {
    float* row = &sum.value[m * kColumns];
    for (int k = 0; k < kDepth; ++k) {
      const float left = to_float<T>(a[m * kDepth + k]);
      for (int n = 0; n < kColumns; ++n) row[n] += left * right[k * kColumns + n];
    }
  }
}

template <typename T>
void start_product(const std::array<float*, kGroup>& registers, const Operand& a, const Operand& b) {
  AsyncProxy& proxy = async_proxy();
  Warpgroup& group = warpgroup();
  std::shared_ptr<Sum>& sum = group.sums[registers[0]];
  if (!sum) {
    sum = std::make_shared<Sum>();
    sum->registers = registers;
    sum->wrong = !group.fenced;
    sum->each([](float& given, float& value) { value = given, given = NAN; });
  }
  Product product{sum, {a, b}, {}};
  std::vector<uint16_t> seen[2];
  for (int i = 0; i < 2; ++i) {
    seen[i] = product.operands[i].read(proxy.memory.data(), shared_size());
    product.read[i] = product.operands[i].read(shared_memory(), shared_size());
    sum->wrong |= seen[i] != product.read[i];  // written, but not shown
  }
  multiply<T>(*sum, seen[0], seen[1]);
  ++sum->in_flight;
  group.open.push_back(std::move(product));
}

inline void finish_product(Warpgroup& group, Product& product) {
  Sum& sum = *product.sum;
  for (int i = 0; i < 2; ++i) {
    sum.wrong |= product.operands[i].read(shared_memory(), shared_size()) != product.read[i];
  }
  if (--sum.in_flight) return;
  sum.each([&sum](float& given, float& value) { given = sum.wrong ? NAN : value; });
  group.sums.erase(sum.registers[0]);
  group.fenced = false;
}

// An instruction that all of a warpgroup execute, and that takes effect once.
template <typename Body>
void together_once(const char* name, const Body& body) {
  int nothing = 0;
  together(kGroup, name, nothing, [&body](const auto&) { body(); });
}

}  // namespace emulator

inline void barrier_sync(int id, int threads) { emulator::barrier_sync(id, threads); }
inline void barrier_arrive(int id, int threads) { emulator::barrier_arrive(id, threads); }

template <int kCount>
void wgmma_fence(float (&)[kCount]) {
  emulator::together_once("wgmma.fence", [] { emulator::warpgroup().fenced = true; });
}

inline void wgmma_commit() {
  emulator::together_once("wgmma.commit_group", [] {
    emulator::Warpgroup& group = emulator::warpgroup();
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  });
}

template <int kGroupsInFlight, int kCount>
void wgmma_wait(float (&)[kCount]) {
  emulator::together_once("wgmma.wait_group", [] {
    emulator::Warpgroup& group = emulator::warpgroup();
    for (; group.groups.size() > kGroupsInFlight; group.groups.pop_front()) {
      for (emulator::Product& product : group.groups.front()) emulator::finish_product(group, product);
    }
  });
}

// Once per warp: a fence of one thread shows no more than its own writes, but threads before it have fenced theirs.
inline void fence_async_proxy() {
  int nothing = 0;
  emulator::together(32, "fence.proxy.async", nothing, [](const auto&) {
    memcpy(emulator::async_proxy().memory.data(), emulator::shared_memory(), emulator::shared_size());
  });
}

template <typename T, bool kAcrossA, bool kAcrossB>
void wgmma_m64n256k16(float (&d)[128], uint64_t a, uint64_t b) {
  struct Slot {
    float* d;
    uint64_t a, b;
  } slot{d, a, b};
  emulator::together(emulator::kGroup, "wgmma", slot, [](const auto& at) {
    std::array<float*, emulator::kGroup> registers;
    for (int thread = 0; thread < emulator::kGroup; ++thread) {
      if (at(thread).a != at(0).a || at(thread).b != at(0).b) emulator::fail("wgmma with several descriptors");
      registers[thread] = at(thread).d;
    }
    emulator::start_product<T>(registers, {at(0).a, kAcrossA, emulator::kRows},
                               {at(0).b, kAcrossB, emulator::kColumns});
  });
}

}  // namespace vatt
