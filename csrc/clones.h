// clones<body> is the function `body` compiled for each level of the instruction set. What it calls is inlined, and so
// compiled anew in every clone. The best level that the processor has runs; VATT_CPU_LEVEL forbids those above it.
#pragma once

#include <cstdlib>
#include <string>

#include "check.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VATT_HAS_CLONES 1
#else
#define VATT_HAS_CLONES 0
#endif

namespace vatt {

// 4 with AVX-512, 3 with AVX2, 1 for what every x86-64 processor has (x86-64-v4, -v3, -v1) and for other processors.
inline int choose_cpu_level() {
  const char* variable = std::getenv("VATT_CPU_LEVEL");
  const std::string highest = variable ? variable : "4";
  VATT_CHECK(highest == "4" || highest == "3" || highest == "1",
             "VATT_CPU_LEVEL must be 4 (AVX-512), 3 (AVX2) or 1, got " << highest << ".");
#if VATT_HAS_CLONES
  __builtin_cpu_init();
  if (highest == "4" && __builtin_cpu_supports("x86-64-v4")) return 4;
  if (highest != "1" && __builtin_cpu_supports("x86-64-v3")) return 3;
#endif
  return 1;
}

inline int cpu_level() {
  static const int level = choose_cpu_level();
  return level;
}

template <auto body>
struct Clones;

template <typename... Args, void (*body)(Args...)>
struct Clones<body> {
#if VATT_HAS_CLONES
  __attribute__((target("arch=x86-64-v4"), flatten)) static void v4(Args... args) { body(args...); }
  __attribute__((target("arch=x86-64-v3"), flatten)) static void v3(Args... args) { body(args...); }
  __attribute__((flatten)) static void v1(Args... args) { body(args...); }

  static void run(Args... args) {
    static void (*const chosen)(Args...) = cpu_level() == 4 ? v4 : cpu_level() == 3 ? v3 : v1;
    chosen(args...);
  }
#else
  static void run(Args... args) { body(args...); }
#endif
};

template <auto body>
inline constexpr auto clones = &Clones<body>::run;

}  // namespace vatt
