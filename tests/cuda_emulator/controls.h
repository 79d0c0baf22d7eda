// What the Python side of the emulator may ask for.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace vatt::emulator {

// The order in which warps and lanes get their turn: 0 ascending, 1 descending, others shuffled.
void set_order(int seed);

// How often each event of emulator::count happened since the last call.
std::map<std::string, int64_t> take_counts();

}  // namespace vatt::emulator
