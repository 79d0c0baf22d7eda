// VATT_CLONES before a function compiles it for each level of the instruction set; the module chooses when it is
// loaded. What the function calls is inlined, and so compiled anew in every clone.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VATT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VATT_CLONES
#endif
