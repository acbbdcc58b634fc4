// The happens-before checker: vector clocks over streams, events and host waits find every access to device memory
// that a real accelerator could run in the wrong order, also where the simulation happened to run it in the right
// one. The model is that of torch/cuda/_sanitizer.py, on byte ranges, with the lifetime of allocations added.
// prefetch_offload/hazards.py states the same rules in Python, on whole buffers; tests/test_hazards.py holds the two
// against each other.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace sim {

using Clocks = std::map<int64_t, int64_t>;  // stream -> its latest operation known
inline void merge(Clocks& into, const Clocks& from) {
  for (auto& [st, c] : from) {
    auto& x = into[st];
    if (c > x) x = c;
  }
}

class Order {
 public:
  // A new operation of a stream; its accesses follow.
  void tick(int64_t st) { Lock l(mu); ++now[st]; }

  // What an event recorded on the stream now will stand for.
  Clocks snapshot(int64_t st) { Lock l(mu); return knows(st); }
  void stream_waits(int64_t st, const Clocks& c) { Lock l(mu); merge(seen[st], c); }
  void host_waits(const Clocks& c) { Lock l(mu); merge(host, c); }
  void host_waits_stream(int64_t st) { Lock l(mu); merge(host, Clocks(knows(st))); }
  void host_waits_all() { Lock l(mu); merge(host, now); }

  // Memory [p, p + n) is allocated by a stream. That counts as a write: on a real device earlier kernels of this
  // stream may still use memory that a caching allocator gives out again.
  void born(uintptr_t p, size_t n, int64_t st) {
    Lock l(mu);
    auto& b = blocks[p] = Block{n, st, {}, {}};
    b.last[Range{p, p + n, st, true}] = {++now[st], "allocation"};
  }

  // Memory is freed, in the order of the stream that allocated it. Returns the streams whose work queued so far the
  // memory must outlive: that stream and the ones recorded.
  std::set<int64_t> died(uintptr_t p) {
    Lock l(mu);
    auto it = blocks.find(p);
    if (it == blocks.end()) return {};
    auto& b = it->second;
    auto& k = knows(b.stream);
    for (auto& [range, by] : b.last)
      if (range.stream != b.stream && !b.recorded.count(range.stream) && k[range.stream] < by.clock)
        hazard("freed while in use: memory of stream " + std::to_string(b.stream) + " freed before it waits for " +
               by.what + " on stream " + std::to_string(range.stream));
    auto outlive = std::move(b.recorded);
    outlive.insert(b.stream);
    blocks.erase(it);
    return outlive;
  }

  void recorded(uintptr_t a, int64_t st) {
    Lock l(mu);
    if (auto* b = find(a)) b->recorded.insert(st);
  }

  // The current operation of a stream reads or writes [lo, hi).
  void access(uintptr_t lo, uintptr_t hi, int64_t st, bool write, const std::string& what) {
    Lock l(mu);
    auto* b = find(lo);
    if (!b) return;
    auto& k = knows(st);
    for (auto& [range, by] : b->last)
      if (range.stream != st && (write || range.write) && range.lo < hi && lo < range.hi && k[range.stream] < by.clock)
        hazard(std::string(write ? "write" : "read") + " by " + what + " on stream " + std::to_string(st) +
               " is not ordered after the " + (range.write ? "write" : "read") + " by " + by.what + " on stream " +
               std::to_string(range.stream));
    b->last[Range{lo, hi, st, write}] = {now[st], what};
  }

  int64_t count() { Lock l(mu); return total; }
  std::vector<std::string> messages() { Lock l(mu); return hazards; }
  void forget_hazards() { Lock l(mu); total = 0; hazards.clear(); }

 private:
  using Lock = std::lock_guard<std::mutex>;
  struct Range {
    uintptr_t lo, hi;
    int64_t stream;
    bool write;
    bool operator<(const Range& o) const {
      return std::tie(lo, hi, stream, write) < std::tie(o.lo, o.hi, o.stream, o.write);
    }
  };
  struct By { int64_t clock; std::string what; };
  struct Block { size_t n; int64_t stream; std::set<int64_t> recorded; std::map<Range, By> last; };

  Clocks& knows(int64_t st) {
    auto& k = seen[st];
    merge(k, host);
    k[st] = now[st];
    return k;
  }
  Block* find(uintptr_t a) {
    auto it = blocks.upper_bound(a);
    if (it == blocks.begin()) return nullptr;
    --it;
    return a < it->first + it->second.n ? &it->second : nullptr;
  }
  void hazard(const std::string& m) {
    total++;
    if (hazards.size() < 50) hazards.push_back(m);
  }

  std::mutex mu;
  Clocks now, host;                // each stream's clock; what the host has waited for
  std::map<int64_t, Clocks> seen;  // what each stream is ordered after
  std::map<uintptr_t, Block> blocks;
  std::vector<std::string> hazards;
  int64_t total = 0;
};
inline Order& order = *new Order;  // leaked, as is all that worker threads use: they may outlive static destruction

}  // namespace sim
