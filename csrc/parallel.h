// parallel_for: a range cut into one piece per thread. Threads are made for the call and end with it: nothing survives
// a fork, and no second OpenMP pool competes with torch's. `body` must not throw.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace vatt {

// body(begin, end) over [0, total), by at most `num_threads` threads with at least `grain` items each.
template <typename Body>
void parallel_for(int64_t total, int num_threads, int64_t grain, const Body& body) {
  const int64_t pieces = std::clamp<int64_t>(total / std::max<int64_t>(grain, 1), 1, std::max(num_threads, 1));
  std::vector<std::thread> threads;
  threads.reserve(pieces - 1);
  for (int64_t i = 1; i < pieces; ++i) {
    threads.emplace_back([&body, total, pieces, i] { body(total * i / pieces, total * (i + 1) / pieces); });
  }
  body(0, total / pieces);
  for (auto& thread : threads) thread.join();
}

}  // namespace vatt
