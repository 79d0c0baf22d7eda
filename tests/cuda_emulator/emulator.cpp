#include "emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "controls.h"

namespace vatt::emulator {
namespace {

constexpr size_t kPage = 4096, kStack = 256 << 10;
constexpr int kWarp = 32, kBarriers = 16;

// Memory between two pages that nobody may touch; it ends where the second begins.
class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_((bytes + kPage - 1) / kPage * kPage) {
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, bytes_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    if (bytes_) mprotect(begin(), bytes_, PROT_READ | PROT_WRITE);
  }
  ~Pages() { munmap(base_, bytes_ + 2 * kPage); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  unsigned char* begin() const { return base_ + kPage; }
  unsigned char* end() const { return begin() + bytes_; }
  size_t size() const { return bytes_; }

 private:
  unsigned char* base_;
  size_t bytes_;
};

struct Copy {
  unsigned char* to;
  std::vector<unsigned char> data;
};

struct Fiber {
  int index = 0;
  dim3 thread;
  Pages stack{kStack};
  ucontext_t start;
  jmp_buf here;
  bool started = false, done = false;
  const char* waits_for = nullptr;
  bool (*ready)(void*) = nullptr;
  void* context = nullptr;
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;

  bool can_run() const { return !done && (!ready || ready(context)); }
};

struct Barrier {
  int arrived = 0, count = 0;
  uint64_t generation = 0;
};

int order_seed = 0;
int64_t blocks_run = 0;
std::map<std::string, int64_t> counted;

class Block;
Block* running = nullptr;

class Block {
 public:
  Block(dim3 block, size_t shared_bytes, const std::function<void()>& thread)
      : block_(block), shared_bytes_(shared_bytes), shared_(shared_bytes + 1024), thread_(thread) {
    const int threads = block.x * block.y * block.z;
    for (int i = 0; i < threads; ++i) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_[i]->index = i;
      fibers_[i]->thread = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    }
    // At a multiple of 1024 as the hardware has it; what remains up to the guard page is poisoned and checked.
    shared_begin_ = shared_.end() - (shared_bytes + 1023) / 1024 * 1024;
  }

  void run() {
    prepare();
    ++blocks_run;
    running = this;
    size_t warp = 0;
    while (Fiber* next = pick(warp)) {
      resume(*next);
      if (!error_.empty()) throw std::runtime_error(error_ + where(next->index));
    }
    running = nullptr;
    for (const auto& fiber : fibers_) {
      if (!fiber->done) throw std::runtime_error("deadlock" + where(-1) + ":" + waiting());
    }
    const auto untouched = [](const unsigned char* from, const unsigned char* to) {
      return std::all_of(from, to, [](unsigned char byte) { return byte == 0xff; });
    };
    if (!untouched(shared_.begin(), shared_begin_) || !untouched(shared_begin_ + shared_bytes_, shared_.end())) {
      throw std::runtime_error("write outside shared memory" + where(-1));
    }
  }

  void suspend(const char* what, bool (*ready)(void*), void* context) {
    Fiber& fiber = *current_;
    fiber.waits_for = what;
    fiber.ready = ready;
    fiber.context = context;
    if (!_setjmp(fiber.here)) _longjmp(scheduler_, 1);
    fiber.ready = nullptr;
  }

  [[noreturn]] void abandon(const std::string& error) {
    error_ = error;
    _longjmp(scheduler_, 1);
  }

  detail::Meeting& meet(int width, const char* name, void* slot) {
    auto& meetings = meetings_[width];
    if (meetings.empty()) meetings.resize(fibers_.size() / width);
    const size_t group = current_->index / width;
    if (group >= meetings.size()) abandon(std::string(name) + " in a group that is not complete");
    detail::Meeting& meeting = meetings[group];
    meeting.slots.resize(width);
    if (meeting.arrived && strcmp(meeting.name, name)) {
      abandon(std::string("threads diverged: one is in ") + name + ", another in " + meeting.name);
    }
    meeting.name = name;
    meeting.slots[current_->index % width] = slot;
    ++meeting.arrived;
    return meeting;
  }

  void barrier(int id, int count, const char* name, bool wait) {
    if (count % kWarp && count != threads()) abandon("a barrier takes whole warps");
    Barrier& barrier = barriers_[id];
    if (barrier.arrived && barrier.count != count) abandon("a barrier with two counts");
    barrier.count = count;
    const uint64_t before = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
    } else if (wait) {
      wait_until(name, [&barrier, before] { return barrier.generation != before; });
    }
  }

  int threads() const { return static_cast<int>(fibers_.size()); }
  Fiber& current() { return *current_; }
  unsigned char* shared_begin() const { return shared_begin_; }
  size_t shared_bytes() const { return shared_bytes_; }
  jmp_buf& scheduler() { return scheduler_; }

 private:
  void prepare() {
    std::fill(shared_.begin(), shared_.end(), 0xff);
    meetings_.clear();
    barriers_.assign(kBarriers, {});
    for (auto& fiber : fibers_) {
      fiber->started = fiber->done = false;
      fiber->ready = nullptr;
      fiber->groups.clear();
      fiber->open.clear();
    }
    order_.resize(fibers_.size());
    std::iota(order_.begin(), order_.end(), 0);
    if (order_seed == 1) std::reverse(order_.begin(), order_.end());
    if (order_seed > 1) {
      std::mt19937 random(order_seed);
      std::vector<int> warps((order_.size() + kWarp - 1) / kWarp), lanes(kWarp);
      std::iota(warps.begin(), warps.end(), 0);
      std::iota(lanes.begin(), lanes.end(), 0);
      std::shuffle(warps.begin(), warps.end(), random);
      std::shuffle(lanes.begin(), lanes.end(), random);
      const auto rank = [&](int i) { return warps[i / kWarp] * kWarp + lanes[i % kWarp]; };
      std::sort(order_.begin(), order_.end(), [&](int a, int b) { return rank(a) < rank(b); });
    }
  }

  // The next lane of the warp that ran last, else the first warp in order that can run.
  Fiber* pick(size_t& warp) {
    const size_t warps = (order_.size() + kWarp - 1) / kWarp;
    if (Fiber* fiber = pick_in(warp)) return fiber;
    for (warp = 0; warp < warps; ++warp) {
      if (Fiber* fiber = pick_in(warp)) return fiber;
    }
    warp = 0;
    return nullptr;
  }

  Fiber* pick_in(size_t warp) {
    for (size_t i = warp * kWarp; i < std::min((warp + 1) * kWarp, order_.size()); ++i) {
      if (fibers_[order_[i]]->can_run()) return fibers_[order_[i]].get();
    }
    return nullptr;
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = fiber.thread;
    if (_setjmp(scheduler_)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.begin();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.start, &Block::enter, 0);
    setcontext(&fiber.start);
  }

  static void enter() {
    Block& block = *running;
    block.thread_();
    block.current_->done = true;
    _longjmp(block.scheduler_, 1);
  }

  std::string where(int thread) const {
    std::ostringstream text;
    text << " in block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ")";
    if (thread >= 0) text << ", thread " << thread;
    return text.str();
  }

  std::string waiting() const {
    std::map<std::string, std::pair<int, int>> waits;  // what -> how many, the first
    for (const auto& fiber : fibers_) {
      auto& [number, first] = waits[fiber->done ? "nothing: it has ended" : fiber->waits_for];
      if (!number++) first = fiber->index;
    }
    std::ostringstream text;
    for (const auto& [what, wait] : waits) {
      text << " " << wait.first << " threads from " << wait.second << " on wait for " << what << ";";
    }
    return text.str();
  }

  dim3 block_;
  size_t shared_bytes_;
  Pages shared_;
  unsigned char* shared_begin_;
  const std::function<void()>& thread_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> order_;
  std::map<int, std::vector<detail::Meeting>> meetings_;
  std::vector<Barrier> barriers_;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  std::string error_;
};

void on_signal(int number, siginfo_t* info, void*) {
  if (!running) {  // not ours: back to the default, and again
    signal(number, SIG_DFL);
    return;
  }
  std::ostringstream text;
  if (number == SIGILL || number == SIGTRAP) {
    text << "undefined behaviour (a misaligned access, an index outside its array, an overflow)";
  } else {
    text << "access outside a buffer, or misaligned, at " << info->si_addr;
  }
  running->abandon(text.str());
}

// Faults inside a kernel become its error, on a stack of their own, for as long as it runs.
class Signals {
 public:
  Signals() {
    stack_t stack{};
    stack.ss_sp = stack_.begin();
    stack.ss_size = stack_.size();
    sigaltstack(&stack, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~Signals() {
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
    running = nullptr;
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  Pages stack_{256 << 10};
  stack_t stack_before_{};
  struct sigaction before_[4];
};

}  // namespace

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = block;
  Block one(block, shared_bytes, thread);
  const Signals signals;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        one.run();
      }
    }
  }
}

unsigned char* shared_memory() { return running->shared_begin(); }
size_t shared_size() { return running->shared_bytes(); }
int64_t block_number() { return blocks_run; }
int thread_index() { return running->current().index; }
void fail(const std::string& what) { running->abandon(what); }
void count(const char* event, int64_t number) { counted[event] += number; }

namespace detail {
Meeting& meet(int width, const char* name, void* slot) { return running->meet(width, name, slot); }
void suspend(const char* what, bool (*ready)(void*), void* context) { running->suspend(what, ready, context); }
}  // namespace detail

void barrier_sync(int id, int number, const char* name) { running->barrier(id, number, name, true); }
void barrier_arrive(int id, int number) { running->barrier(id, number, "bar.arrive", false); }

void copy_async(void* shared, const void* global, int bytes, int valid_bytes) {
  auto* to = static_cast<unsigned char*>(shared);
  if (to < running->shared_begin() || to + bytes > running->shared_begin() + running->shared_bytes()) {
    fail("cp.async to outside shared memory");
  }
  const auto misaligned = [bytes](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; };
  if (misaligned(shared) || (valid_bytes && misaligned(global))) fail("cp.async at a misaligned address");
  Copy copy{to, std::vector<unsigned char>(bytes, 0)};
  if (valid_bytes) memcpy(copy.data.data(), global, valid_bytes);
  memset(shared, 0xff, bytes);
  running->current().open.push_back(std::move(copy));
}

void commit_copies() {
  Fiber& fiber = running->current();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_copies(int groups_in_flight) {
  auto& groups = running->current().groups;
  for (; static_cast<int>(groups.size()) > groups_in_flight; groups.pop_front()) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.data.data(), copy.data.size());
  }
}

void set_order(int seed) { order_seed = seed; }

std::map<std::string, int64_t> take_counts() { return std::exchange(counted, {}); }

}  // namespace vatt::emulator
