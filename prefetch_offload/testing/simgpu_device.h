// The simulated device without PyTorch's operators: counters and settings, streams and events, device memory, pinned
// and registered host memory. Locks: memory_mu and the one inside `order` are leaves, held for no longer than a
// look-up or 1 MiB of copying; nothing sleeps while it holds one.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <thread>
#include "simgpu_order.h"

namespace sim {
using Clock = std::chrono::steady_clock;

// ------------------------------------------------------- counters and settings
using Count = std::atomic<int64_t>;
struct Counters {
  Count allocated{0}, peak{0}, high_water{0}, live{0}, allocs{0};  // device memory: rounded bytes, blocks
  Count pinned{0}, peak_pinned{0};                                 // host memory, pinned or registered: exact bytes
  Count h2d{0}, d2h{0}, d2d{0}, h2d_async{0}, d2h_async{0}, h2d_calls{0};
  Count h2d_pinned{0}, h2d_pageable{0}, d2h_pinned{0}, d2h_pageable{0};
  Count violations{0};
} C;
struct Settings {
  Count capacity{int64_t(1) << 50}, pin_limit{-1}, op_delay_us{0};
  std::atomic<double> h2d_gbps{0}, d2h_gbps{0}, pageable_gbps{0};  // 0: unpaced
} S;
inline void raise_to(Count& peak, int64_t value) {
  int64_t old = peak;
  while (value > old && !peak.compare_exchange_weak(old, value)) {}
}

// ------------------------------------------------------------- the device's own clock
// Off: operators and copies take real time. On: they take none, and only advance these times, as they would on a device
// whose host runs as far ahead as it can and costs nothing. So the times of events, and what a query answers, follow from
// the order of the calls alone, and are the same on every machine. All in seconds.
class DeviceClock {
 public:
  bool on() const { return running; }
  // It never goes back: what was before has happened.
  void run(bool yes) {
    Lock l(mu);
    running = yes;
    for (auto& kv : streams) host = std::max(host, kv.second);
  }
  double now() { Lock l(mu); return host; }
  // Work of so long is put on a stream: it starts behind what is there, and not before the host has come to it.
  void add(int64_t st, double seconds) { if (!running) return; Lock l(mu); at(st) += seconds; }
  double record(int64_t st) { if (!running) return 0; Lock l(mu); return at(st); }
  void stream_waits(int64_t st, double until) { if (!running) return; Lock l(mu); auto& t = at(st); t = std::max(t, until); }
  void host_waits(double until) { if (!running) return; Lock l(mu); host = std::max(host, until); }
  void host_waits_stream(int64_t st) { if (!running) return; Lock l(mu); host = std::max(host, streams[st]); }
  void host_waits_all() { if (!running) return; Lock l(mu); for (auto& kv : streams) host = std::max(host, kv.second); }
  bool past(double when) { Lock l(mu); return when <= host; }

 private:
  using Lock = std::lock_guard<std::mutex>;
  double& at(int64_t st) { auto& t = streams[st]; return t = std::max(t, host); }
  std::mutex mu;
  std::atomic<bool> running{false};
  double host = 0;
  std::map<int64_t, double> streams;
};
inline DeviceClock& device_clock = *new DeviceClock;

inline double copy_seconds(int64_t n, double gbps) { return gbps > 0 ? n / (gbps * 1e9) : 0; }
inline void pace(double seconds) {
  if (seconds > 0) std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

// --------------------------------------------------------------------- streams
// The default stream, 0, runs at once on the host thread; every other stream has a worker, which runs its work in
// order.
struct Worker {
  std::mutex mu;
  std::condition_variable cv, idle;
  std::deque<std::function<void()>> q;
  bool busy = false;
  std::thread th;
  Worker() : th([this] { loop(); }) { th.detach(); }
  void loop() {
    for (;;) {
      std::function<void()> f;
      {
        std::unique_lock<std::mutex> l(mu);
        busy = false;
        if (q.empty()) idle.notify_all();
        cv.wait(l, [&] { return !q.empty(); });
        f = std::move(q.front());
        q.pop_front();
        busy = true;
      }
      f();
    }
  }
  void push(std::function<void()> f) {
    std::lock_guard<std::mutex> l(mu);
    q.push_back(std::move(f));
    cv.notify_one();
  }
  void drain() {
    std::unique_lock<std::mutex> l(mu);
    idle.wait(l, [&] { return q.empty() && !busy; });
  }
  bool query() {
    std::lock_guard<std::mutex> l(mu);
    return q.empty() && !busy;
  }
};
std::mutex& streams_mu = *new std::mutex;
std::map<int64_t, Worker*>& workers = *new std::map<int64_t, Worker*>;
std::atomic<int64_t> next_stream{1};
thread_local int64_t current_stream = 0;

static Worker& worker(int64_t id) {
  TORCH_INTERNAL_ASSERT(id != 0);
  std::lock_guard<std::mutex> l(streams_mu);
  auto& w = workers[id];
  if (!w) w = new Worker();
  return *w;
}
static void drain(int64_t st) { if (st) worker(st).drain(); }
static void drain_all() {
  std::vector<Worker*> ws;
  {
    std::lock_guard<std::mutex> l(streams_mu);
    for (auto& kv : workers) ws.push_back(kv.second);
  }
  for (auto* w : ws) w->drain();
}

struct Event {
  std::mutex mu;
  std::condition_variable cv;
  Clocks clocks;
  int64_t recorded = 0, done = 0;
  Clock::time_point at;
  double device_at = 0;  // by the device's own clock

  void record(int64_t st, std::shared_ptr<Event> self) {
    auto c = order.snapshot(st);
    auto when = device_clock.record(st);
    int64_t v;
    { std::lock_guard<std::mutex> l(mu); v = ++recorded; clocks = c; device_at = when; }
    if (st == 0) finish(v);
    else worker(st).push([self, v] { self->finish(v); });
  }
  void block(int64_t st, std::shared_ptr<Event> self) {
    auto [v, c, when] = latest();
    order.stream_waits(st, c);
    device_clock.stream_waits(st, when);
    if (st == 0) wait(v);
    else worker(st).push([self, v = v] { self->wait(v); });
  }
  bool query() {
    auto [v, c, when] = latest();
    if (device_clock.on()) {
      if (!device_clock.past(when)) return false;
      wait(v);
    } else {
      std::lock_guard<std::mutex> l(mu);
      if (done < v) return false;
    }
    order.host_waits(c);
    return true;
  }
  void synchronize() {
    auto [v, c, when] = latest();
    wait(v);
    order.host_waits(c);
    device_clock.host_waits(when);
  }
  // From this event to a later one, both of which have happened.
  double seconds_until(Event& later) {
    if (device_clock.on()) return std::get<2>(later.latest()) - std::get<2>(latest());
    return std::chrono::duration<double>(later.time() - time()).count();
  }

 private:
  std::tuple<int64_t, Clocks, double> latest() { std::lock_guard<std::mutex> l(mu); return {recorded, clocks, device_at}; }
  Clock::time_point time() { std::lock_guard<std::mutex> l(mu); return at; }
  void finish(int64_t v) {
    std::lock_guard<std::mutex> l(mu);
    if (v > done) done = v;
    at = Clock::now();
    cv.notify_all();
  }
  void wait(int64_t v) {
    std::unique_lock<std::mutex> l(mu);
    cv.wait(l, [&] { return done >= v; });
  }
};

// ---------------------------------------------------- host ranges and transfers
struct Transfer { uintptr_t dst, src; size_t n; bool dropped; };
using Ranges = std::map<uintptr_t, size_t>;
std::mutex& memory_mu = *new std::mutex;
Ranges& pinned_blocks = *new Ranges;      // what the pinned allocator gave out
Ranges& registered_blocks = *new Ranges;  // what host_register was given
std::list<Transfer>& pending = *new std::list<Transfer>;
static uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

static bool overlaps(uintptr_t a, size_t n, uintptr_t b, size_t m) { return a < b + m && b < a + n; }
static bool overlaps_any(const Ranges& ranges, uintptr_t a, size_t n) {
  auto it = ranges.lower_bound(a + n);
  return it != ranges.begin() && overlaps(a, n, std::prev(it)->first, std::prev(it)->second);
}
static bool covers(const Ranges& ranges, uintptr_t a, size_t n) {
  auto it = ranges.upper_bound(a);
  if (it == ranges.begin()) return false;
  --it;
  return a + n <= it->first + it->second;
}
// Page-locked host memory, by the first byte, as PyTorch's is_pinned() has it on CUDA too.
static bool is_pinned(const void* p, size_t n = 1) {
  std::lock_guard<std::mutex> l(memory_mu);
  return covers(pinned_blocks, address(p), n) || covers(registered_blocks, address(p), n);
}
// Memory [p, p + n) goes away: pending copies that touch it are violations, and will not run. Holds memory_mu.
static void drop_pending(uintptr_t p, size_t n) {
  for (auto& t : pending)
    if (!t.dropped && (overlaps(t.src, t.n, p, n) || overlaps(t.dst, t.n, p, n))) {
      t.dropped = true;
      C.violations++;
    }
}
static void copy_later(int64_t st, void* dst, const void* src, size_t n, double gbps) {
  auto seconds = copy_seconds(n, gbps);
  bool real = !device_clock.on();
  device_clock.add(st, seconds);
  std::list<Transfer>::iterator t;
  {
    std::lock_guard<std::mutex> l(memory_mu);
    t = pending.insert(pending.end(), Transfer{address(dst), address(src), n, false});
  }
  worker(st).push([=] {
    if (real) pace(seconds);
    constexpr size_t chunk = 1 << 20;
    for (size_t i = 0; i < n; i += chunk) {
      std::lock_guard<std::mutex> l(memory_mu);
      if (t->dropped) break;
      std::memcpy(static_cast<char*>(dst) + i, static_cast<const char*>(src) + i, std::min(chunk, n - i));
    }
    std::lock_guard<std::mutex> l(memory_mu);
    pending.erase(t);
  });
}

// CUDA's error codes, and its last error: a refused call leaves it behind on its thread, until someone asks for it.
enum Error { success = 0, invalid_value = 1, memory_allocation = 2, already_registered = 712, not_registered = 713 };
thread_local int last_error = success;
static int refuse(Error e) { return last_error = e; }
static int take_last_error() { int e = last_error; last_error = success; return e; }

static bool over_pin_limit(size_t n) { return S.pin_limit >= 0 && C.pinned + (int64_t)n > S.pin_limit; }
static void add_pinned(int64_t n) { raise_to(C.peak_pinned, C.pinned += n); }
static int host_register(uintptr_t p, size_t n) {
  if (!p || !n) return refuse(invalid_value);
  std::lock_guard<std::mutex> l(memory_mu);
  if (overlaps_any(registered_blocks, p, n) || overlaps_any(pinned_blocks, p, n)) return refuse(already_registered);
  if (over_pin_limit(n)) return refuse(memory_allocation);
  registered_blocks[p] = n;
  add_pinned(n);
  return success;
}
static int host_unregister(uintptr_t p) {
  std::lock_guard<std::mutex> l(memory_mu);
  auto it = registered_blocks.find(p);
  if (it == registered_blocks.end()) return refuse(not_registered);
  drop_pending(p, it->second);  // the caller may free it next: a copy must not touch it from here on
  C.pinned -= it->second;
  registered_blocks.erase(it);
  return success;
}

struct PinAlloc final : c10::Allocator {
  static void free_block(void* p) {
    if (!p) return;
    std::lock_guard<std::mutex> l(memory_mu);
    auto it = pinned_blocks.find(address(p));
    TORCH_INTERNAL_ASSERT(it != pinned_blocks.end());
    drop_pending(it->first, it->second);
    std::memset(p, 0xFF, it->second);
    C.pinned -= it->second;
    pinned_blocks.erase(it);
    std::free(p);
  }
  c10::DataPtr allocate(size_t n) override {
    if (n == 0) return {nullptr, nullptr, &free_block, c10::Device(c10::kCPU)};
    std::lock_guard<std::mutex> l(memory_mu);
    TORCH_CHECK(!over_pin_limit(n), "simgpu error: out of memory: tried to pin ", n, " bytes of host memory; ",
                C.pinned.load(), " of at most ", S.pin_limit.load(), " pinned");
    void* p = nullptr;
    TORCH_CHECK(posix_memalign(&p, 4096, n) == 0);
    pinned_blocks[address(p)] = n;
    add_pinned(n);
    return {p, p, &free_block, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* d, const void* s, size_t n) const override { std::memcpy(d, s, n); }
};
PinAlloc pin_alloc;

// --------------------------------------------------------------- device memory
// Fresh and freed memory is filled with 0xFF: NaN in every float type. Sizes are rounded as CUDA's caching allocator
// does.
struct DevAlloc final : c10::DeviceAllocator {
  static constexpr size_t granule = 512;
  static constexpr size_t rounded(size_t n) { return (n + granule - 1) / granule * granule; }
  struct Header { size_t n; };  // lies before the block, unseen by tensors
  static Header& header(void* p) { return *reinterpret_cast<Header*>(static_cast<char*>(p) - granule); }

  static void free_block(void* p) {
    if (!p) return;
    auto n = header(p).n;
    C.allocated -= n;
    C.live--;
    // The bytes count as free at once, as on CUDA. The memory itself is held until the streams that may use it have
    // got here.
    std::shared_ptr<void> hold(p, [n](void* q) { release(q, n); });
    for (auto st : order.died(address(p))) if (st) worker(st).push([hold] {});
  }
  static void release(void* p, size_t n) {
    { std::lock_guard<std::mutex> l(memory_mu); drop_pending(address(p), n); }
    std::memset(p, 0xFF, n);
    std::free(&header(p));
  }
  c10::DataPtr allocate(size_t wanted) override {
    if (wanted == 0) return {nullptr, nullptr, &free_block, device()};
    auto n = rounded(wanted);
    TORCH_CHECK_WITH(OutOfMemoryError, !told_to_fail() && C.allocated + (int64_t)n <= S.capacity,
                     "simgpu out of memory. Tried to allocate ", n, " bytes; ", C.allocated.load(), " of ",
                     S.capacity.load(), " in use");
    void* whole = nullptr;
    TORCH_CHECK(posix_memalign(&whole, granule, granule + n) == 0);
    void* p = static_cast<char*>(whole) + granule;
    header(p).n = n;
    std::memset(p, 0xFF, n);
    order.born(address(p), n, current_stream);
    int64_t a = C.allocated += n;
    C.live++;
    C.allocs++;
    raise_to(C.peak, a);
    raise_to(C.high_water, a);
    return {p, p, &free_block, device()};
  }
  // Refuses on demand: allocation number `index` from now, `times` in a row.
  static void fail(int64_t index, int64_t times) { fail_from = index; fail_until = index < 0 ? -1 : index + times; }
  static bool told_to_fail() {
    if (fail_until <= 0) return false;
    fail_until--;
    return fail_from-- <= 0;
  }
  static inline Count fail_from{-1}, fail_until{-1};  // counted down by each allocation
  static c10::Device device() { return c10::Device(c10::kPrivateUse1, 0); }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* d, const void* s, size_t n) const override { std::memcpy(d, s, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  void recordStream(const c10::DataPtr& p, c10::Stream s) override { order.recorded(address(p.get()), s.id()); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats s;
    for (auto* st : {&s.allocated_bytes[0], &s.reserved_bytes[0], &s.active_bytes[0]}) {
      st->current = C.allocated;
      st->peak = C.peak;
      st->allocated = C.allocated;
    }
    return s;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { C.peak = C.allocated.load(); }
  // Overrides nothing before PyTorch 2.10, so it does not say so.
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) {
    return {std::max<int64_t>(0, S.capacity - C.allocated), S.capacity.load()};
  }
};
DevAlloc dev_alloc;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &dev_alloc);

}  // namespace sim
