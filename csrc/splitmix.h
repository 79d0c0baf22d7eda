// The hash behind every random choice, as vatt_engine/splitmix.py has it.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vatt {

// The splitmix64 finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit integers.
VATT_HOST_DEVICE uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace vatt
