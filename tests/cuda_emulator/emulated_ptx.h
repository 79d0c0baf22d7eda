// The instructions of csrc/tensor_core.cuh as the PTX ISA documents them (fragments: "Matrix fragments for
// mma.m16n8k16 with floating point type", "ldmatrix").
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"
#include "emulator.h"

namespace vatt {
namespace emulator {

template <typename T>
float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bits_float(static_cast<uint32_t>(bits) << 16);
  } else {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                            : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                           : std::ldexp(static_cast<float>(fraction), -24);
    return bits & 0x8000 ? -magnitude : magnitude;
  }
}

// Element i of a register that holds two.
inline uint16_t half_of(uint32_t two, int i) { return static_cast<uint16_t>(two >> (16 * i)); }

template <int kMatrices, bool kTransposed>
void load_matrices(uint32_t (&fragment)[kMatrices], const void* row) {
  struct Slot {
    uint32_t* fragment;
    const void* row;
  } slot{fragment, row};
  together(32, kTransposed ? "ldmatrix.trans" : "ldmatrix", slot, [](const auto& at) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint16_t values[8][8];
      int rows_in_bank[8] = {}, worst = 0;
      for (int r = 0; r < 8; ++r) {
        const auto address = reinterpret_cast<uintptr_t>(at(8 * matrix + r).row);
        if (address % 16) fail("ldmatrix at a misaligned address");
        memcpy(values[r], reinterpret_cast<const void*>(address), 16);
        worst = std::max(worst, ++rows_in_bank[address / 16 % 8]);
      }
      count("ldmatrix bank conflicts", worst - 1);
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = kTransposed ? values[c][r] : values[r][c];
        const uint32_t high = kTransposed ? values[c + 1][r] : values[r][c + 1];
        at(lane).fragment[matrix] = low | high << 16;
      }
    }
  });
}

}  // namespace emulator

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) { emulator::load_matrices<4, false>(fragment, row); }

inline void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row) {
  emulator::load_matrices<4, true>(fragment, row);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
  struct Slot {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } slot{d, a, {b0, b1}};
  emulator::together(32, "mma", slot, [](const auto& at) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const int row = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i % 2 + i / 4 * 8;
        a[row][k] = emulator::to_float<T>(emulator::half_of(at(lane).a[i / 2], i % 2));
      }
      for (int i = 0; i < 4; ++i) {
        b[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] =
            emulator::to_float<T>(emulator::half_of(at(lane).b[i / 2], i % 2));
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = at(lane).d[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        at(lane).d[i] = sum;
      }
    }
  });
}

template <int kBytes>
void cp_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::copy_async(shared, global, kBytes, valid_bytes);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int kGroupsInFlight>
void cp_async_wait() {
  emulator::wait_copies(kGroupsInFlight);
}

template <typename T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
uint32_t add2(uint32_t a, uint32_t b) {
  const auto sum = [=](int i) {
    return emulator::to_float<T>(emulator::half_of(a, i)) + emulator::to_float<T>(emulator::half_of(b, i));
  };
  return pack2<T>(sum(0), sum(1));
}

}  // namespace vatt
