// CUDA kernels on the CPU: the threads of a block are fibers, blocks run one after the other. A warp runs as far as it
// can before another gets its turn, in an order the test chooses, so that a missing barrier shows in the numbers.
//
// What a test gets to see as an error: deadlocks, traps, lanes that meet in different instructions, reads and writes
// outside shared memory or a guarded buffer (guard pages, see __init__.py), misaligned vector accesses.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

namespace vatt::emulator {

// Runs `thread` once per thread of every block; throws std::runtime_error with what went wrong and where.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// Dynamic shared memory of the running block: starts as NaN (0xff), 1024-byte aligned, ends at a guard page.
unsigned char* shared_memory();
size_t shared_size();

int thread_index();      // in the block, x fastest
int64_t block_number();  // of the running block, different for each that ever runs

// Ends the kernel with an error; for use inside a thread.
[[noreturn]] void fail(const std::string& what);

// Counts events that are no errors, such as bank conflicts; reset when a test asks for them.
void count(const char* event, int64_t number);

namespace detail {
struct Meeting {
  const char* name = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  std::vector<void*> slots;
};
Meeting& meet(int width, const char* name, void* slot);
void suspend(const char* what, bool (*ready)(void*), void* context);
}  // namespace detail

// Lets other threads run until ready() holds; `what` names the wait in the report of a deadlock.
template <typename Ready>
void wait_until(const char* what, Ready ready) {
  if (!ready()) detail::suspend(what, [](void* context) { return (*static_cast<Ready*>(context))(); }, &ready);
}

// An instruction that `width` neighbouring threads (32: a warp, 128: a warpgroup) execute together. The last to arrive
// calls body(at), where at(i) is the slot that thread i of the group brought.
template <typename Slot, typename Body>
void together(int width, const char* name, Slot& slot, const Body& body) {
  detail::Meeting& meeting = detail::meet(width, name, &slot);
  if (meeting.arrived == width) {
    body([&meeting](int i) -> Slot& { return *static_cast<Slot*>(meeting.slots[i]); });
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    wait_until(name, [&meeting, before = meeting.generation] { return meeting.generation != before; });
  }
}

// bar.sync and bar.arrive of barrier `id` with `count` threads; __syncthreads is barrier 0 with all of them.
void barrier_sync(int id, int count, const char* name = "bar.sync");
void barrier_arrive(int id, int count);

// cp.async at its slowest and its fastest: the destination is NaN from the moment of the call (whoever still reads
// what was there notices), the bytes land when the thread waits for their group.
void copy_async(void* shared, const void* global, int bytes, int valid_bytes);
void commit_copies();
void wait_copies(int groups_in_flight);

}  // namespace vatt::emulator
