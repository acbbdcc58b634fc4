// A stand-in for libcudart.so.13: one device whose memory is host memory. Copies on side streams run late: when
// something waits for them. Kernels cannot run: launching one is an error, which names it (operators.cpp is there so that none is).
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "state.h"

namespace standin {
static int64_t setting(const char* name, int64_t otherwise) {
  const char* s = getenv(name);
  return s ? strtoll(s, nullptr, 0) : otherwise;
}
static std::recursive_mutex& lock() { static auto& m = *new std::recursive_mutex; return m; }
#define LOCKED std::lock_guard<std::recursive_mutex> held(lock())

static const size_t total = setting("STANDIN_GIB", 24) << 30;
static const size_t context = 500u << 20;  // what a context takes
static const bool late = setting("STANDIN_LATE", 1);
static size_t taken = 0;
static thread_local cudaError_t last = cudaSuccess;
static cudaError_t said(cudaError_t e) { if (e) last = e; return e; }

// ------------------------------------------------------------------ memory
struct Known { size_t nbytes; int kind; };
static auto& ranges = *new std::map<uintptr_t, Known>;
static const Known* find(uintptr_t a, uintptr_t* begin = nullptr) {
  auto it = ranges.upper_bound(a);
  if (it == ranges.begin()) return nullptr;
  --it;
  if (a >= it->first + it->second.nbytes) return nullptr;
  if (begin) *begin = it->first;
  return &it->second;
}
bool take(size_t n) { LOCKED; if (taken + n + context > total) return false; taken += n; return true; }
void give(size_t n) { LOCKED; taken -= n; }
void know(uintptr_t a, size_t n, int kind) { LOCKED; if (kind) ranges[a] = {n, kind}; else ranges.erase(a); }
static bool fits(const void* p, size_t n) {  // all of it lies in one known range
  uintptr_t b, a = (uintptr_t)p;
  for (const Known* k; (k = find(a, &b)); a = b + k->nbytes) {  // several mappings may lie side by side
    if ((uintptr_t)p + n <= b + k->nbytes) return true;
  }
  return false;
}

// --------------------------------------------------- streams, events, graphs
struct Graph { std::vector<std::function<void()>> nodes; std::vector<std::pair<cudaHostFn_t, void*>> kept;
  ~Graph() { for (auto& [f, d] : kept) f(d); } };
struct Marker { bool done = false; double ms = 0; struct Stream* on = nullptr; Graph* graph = nullptr; int asked = 0; };
struct Stream { std::deque<std::function<void()>> queue; Graph* graph = nullptr; unsigned long long id = 0; int priority = 0;
  unsigned flags = 0; cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal; bool origin = false; bool broken = false; };
struct Event { std::shared_ptr<Marker> marker; unsigned flags = 0; };
static Stream main_stream;
static auto& streams = *new std::set<Stream*>{&main_stream};
static auto& events = *new std::set<Event*>;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static Stream* of(void* s) {
  if (!s || s == cudaStreamLegacy || s == cudaStreamPerThread) return &main_stream;
  return streams.count((Stream*)s) ? (Stream*)s : nullptr;
}
static double now() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
static void run(Stream* s) { while (!s->queue.empty()) { auto f = std::move(s->queue.front()); s->queue.pop_front(); f(); } }
static void run_until(Marker& m) {
  while (!m.done && !m.on->queue.empty()) { auto f = std::move(m.on->queue.front()); m.on->queue.pop_front(); f(); }
}
static void run_all() { for (auto* s : streams) run(s); }
void drain(void* s) { LOCKED; if (auto* t = of(s)) run(t); }
bool capturing(void* s) { LOCKED; auto* t = of(s); return t && t->graph; }
void node(void* s, std::function<void()> f) { LOCKED; if (auto* t = of(s); t && t->graph) t->graph->nodes.push_back(std::move(f)); }
static bool forbidden() {  // what must not be called while something is being captured
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  bool any = false;
  for (auto* s : streams) if (s->graph && s->mode == cudaStreamCaptureModeGlobal) s->broken = any = true;
  return any;
}
static cudaError_t put(Stream* s, bool later, std::function<void()> f) {
  if (s->graph) { s->graph->nodes.push_back(f); f(); return cudaSuccess; }
  if (later && late && s != &main_stream) s->queue.push_back(std::move(f)); else { run(s); f(); }
  return cudaSuccess;
}
static cudaError_t copy(void* d, const void* s, size_t n, Stream* st, bool async) {
  if (!st) return said(cudaErrorInvalidResourceHandle);
  if (!n) return cudaSuccess;
  bool device = false, pageable = false;
  for (auto p : {(const void*)d, s}) {
    auto* k = find((uintptr_t)p);
    if (!k) { pageable = true; continue; }
    if (!fits(p, n)) return said(cudaErrorInvalidValue);
    device |= k->kind == 2;
  }
  if (!device && !pageable) {}
  if (!async && st->graph) return said(cudaErrorStreamCaptureUnsupported);
  put(st, async && !pageable, [=] { memmove(d, s, n); });
  if (!async) run(st);
  return cudaSuccess;
}
}  // namespace standin
using namespace standin;

extern "C" {
// ----------------------------------------------------------------- the device
cudaError_t cudaGetDeviceCount(int* n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int d) { return said(d == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaDriverGetVersion(int* v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  if (d) return said(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stand-in (no GPU)");
  p->major = 9; p->minor = 0; p->totalGlobalMem = total; p->multiProcessorCount = 132; p->warpSize = 32;
  p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048; p->regsPerBlock = 65536; p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 48 << 10; p->sharedMemPerMultiprocessor = 228 << 10; p->sharedMemPerBlockOptin = 227 << 10;
  p->l2CacheSize = 50 << 20; p->memoryBusWidth = 5120; p->unifiedAddressing = 1; p->asyncEngineCount = 3;
  p->canMapHostMemory = 1; p->concurrentKernels = 1; p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch ((int)a) {
    case cudaDevAttrComputeCapabilityMajor: *v = 9; break;
    case cudaDevAttrMultiProcessorCount: *v = 132; break;
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 227 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 48 << 10; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrClockRate: *v = 1980000; break;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrHostRegisterSupported: case cudaDevAttrCanUseHostPointerForRegisteredMem:
      *v = 1; break;
    default: *v = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int) { snprintf(s, n, "0000:01:00.0"); return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* l, int* g) { if (l) *l = 0; if (g) *g = -5; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) { *v = 0; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return said(cudaErrorPeerAccessUnsupported); }
cudaError_t cudaDeviceSynchronize() { LOCKED; if (forbidden()) return said(cudaErrorStreamCaptureUnsupported); run_all(); return cudaSuccess; }
cudaError_t cudaGetLastError() { auto e = last; last = cudaSuccess; return e; }
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
#define N(x) case x: return #x;
    N(cudaSuccess) N(cudaErrorInvalidValue) N(cudaErrorMemoryAllocation) N(cudaErrorNotReady) N(cudaErrorInvalidDevice)
    N(cudaErrorHostMemoryAlreadyRegistered) N(cudaErrorHostMemoryNotRegistered) N(cudaErrorStreamCaptureUnsupported)
    N(cudaErrorStreamCaptureIsolation) N(cudaErrorStreamCaptureInvalidated) N(cudaErrorInvalidResourceHandle)
    N(cudaErrorNotSupported) N(cudaErrorInvalidDeviceFunction) N(cudaErrorStreamCaptureUnjoined)
    default: return "cudaError (stand-in)";
  }
}
const char* cudaGetErrorString(cudaError_t e) { return cudaGetErrorName(e); }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* r) {
  static void* lib = dlopen("libcuda.so.1", RTLD_NOW);
  auto proc = (CUresult(*)(const char*, void**, int, cuuint64_t, void*))dlsym(lib, "cuGetProcAddress_v2");
  *f = nullptr;
  auto e = proc ? proc(name, f, 13000, 0, nullptr) : CUDA_ERROR_NOT_FOUND;
  if (!*f) *f = (void*)(CUresult (*)())[] { return CUDA_ERROR_NOT_SUPPORTED; }, e = CUDA_SUCCESS;
  if (r) *r = e ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// --------------------------------------------------------------------- memory
cudaError_t cudaMalloc(void** p, size_t n) {
  LOCKED;
  if (forbidden()) return said(cudaErrorStreamCaptureUnsupported);
  *p = nullptr;
  if (!n) return cudaSuccess;
  if (!take(n)) return said(cudaErrorMemoryAllocation);
  void* m = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) { give(n); return said(cudaErrorMemoryAllocation); }
  know((uintptr_t)m, n, 2);
  *p = m;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  LOCKED;
  if (!p) return cudaSuccess;
  if (forbidden()) return said(cudaErrorStreamCaptureUnsupported);
  run_all();
  auto it = ranges.find((uintptr_t)p);
  if (it == ranges.end() || it->second.kind != 2) return said(cudaErrorInvalidValue);
  munmap(p, it->second.nbytes);
  give(it->second.nbytes);
  ranges.erase(it);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) { LOCKED; *f = total - context - taken; *t = total; return cudaSuccess; }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  LOCKED;
  if (forbidden()) return said(cudaErrorStreamCaptureUnsupported);
  void* m = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (m == MAP_FAILED) return said(cudaErrorMemoryAllocation);
  know((uintptr_t)m, n, 1);
  *p = m;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  LOCKED;
  if (!p) return cudaSuccess;
  run_all();
  auto it = ranges.find((uintptr_t)p);
  if (it == ranges.end() || it->second.kind != 1) return said(cudaErrorInvalidValue);
  munmap(p, it->second.nbytes);
  ranges.erase(it);
  return cudaSuccess;
}
static size_t pinned = 0;
static auto& registered = *new std::map<uintptr_t, size_t>;
cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
  LOCKED;
  static const size_t most = setting("STANDIN_PIN_LIMIT", 1ll << 50);
  if (!p || !n) return said(cudaErrorInvalidValue);
  if (forbidden()) return said(cudaErrorStreamCaptureUnsupported);
  uintptr_t a = (uintptr_t)p & ~4095ul, b = ((uintptr_t)p + n + 4095) & ~4095ul;  // pages, as the real one
  auto it = registered.lower_bound(a);
  if (it != registered.begin()) { auto before = std::prev(it); if (before->first + before->second > a) it = before; }
  if (it != registered.end() && it->first < b) return said(cudaErrorHostMemoryAlreadyRegistered);
  if (find((uintptr_t)p) || pinned + n > most) return said(find((uintptr_t)p) ? cudaErrorInvalidValue : cudaErrorMemoryAllocation);
  registered[a] = b - a;
  pinned += n;
  know((uintptr_t)p, n, 1);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  LOCKED;
  auto it = registered.find((uintptr_t)p & ~4095ul);
  if (it == registered.end() || !ranges.count((uintptr_t)p)) return said(cudaErrorHostMemoryNotRegistered);
  run_all();
  pinned -= ranges[(uintptr_t)p].nbytes;
  registered.erase(it);
  know((uintptr_t)p, 0, 0);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  LOCKED;
  memset(a, 0, sizeof *a);
  auto* k = find((uintptr_t)p);
  a->device = k ? 0 : -2;
  a->type = !k ? cudaMemoryTypeUnregistered : k->kind == 2 ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  if (k) a->devicePointer = (void*)p;
  if (k && k->kind == 1) a->hostPointer = (void*)p;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t st) { LOCKED; return copy(d, s, n, of(st), true); }
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
  LOCKED;
  if (forbidden()) return said(cudaErrorStreamCaptureUnsupported);
  return copy(d, s, n, &main_stream, false);
}
cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t st) { LOCKED; return copy(d, s, n, of(st), true); }
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t st) {
  LOCKED;
  if (!fits(d, n)) return said(cudaErrorInvalidValue);
  return put(of(st), false, [=] { memset(d, v, n); });
}
cudaError_t cudaMemset(void* d, int v, size_t n) { return cudaMemsetAsync(d, v, n, nullptr); }
static int pool;
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) { *p = (cudaMemPool_t)&pool; return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* v) { *(uint64_t*)v = 0; return cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* v) { *(uint64_t*)v = 0; return cudaSuccess; }
cudaError_t cudaDeviceSetGraphMemAttribute(int, cudaGraphMemAttributeType, void*) { return cudaSuccess; }
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return said(cudaErrorNotSupported); }
cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return said(cudaErrorNotSupported); }
cudaError_t cudaIpcCloseMemHandle(void*) { return said(cudaErrorNotSupported); }
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) { return said(cudaErrorNotSupported); }
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) { return said(cudaErrorNotSupported); }

// --------------------------------------------------------- streams and events
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned f, int p) {
  LOCKED;
  static unsigned long long n = 0;
  auto* t = new Stream;
  t->id = ++n; t->priority = p; t->flags = f;
  streams.insert(t);
  *s = (cudaStream_t)t;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) { return cudaStreamCreateWithPriority(s, f, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { LOCKED; if (auto* t = of(s)) { run(t); streams.erase(t); } return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* p) { *p = of(s)->priority; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  LOCKED;
  if (forbidden()) return said(cudaErrorStreamCaptureUnsupported);
  auto* t = of(s);
  if (!t) return said(cudaErrorInvalidResourceHandle);
  run(t);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
  LOCKED;
  if (forbidden()) return said(cudaErrorStreamCaptureUnsupported);
  auto* t = of(s);
  if (t->queue.empty()) return cudaSuccess;
  run(t);  // by the next time
  return said(cudaErrorNotReady);
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* d, unsigned) { LOCKED; return put(of(s), false, [=] { f(s, cudaSuccess, d); }); }
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* d) { LOCKED; return put(of(s), false, [=] { f(d); }); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) { LOCKED; auto* t = new Event; t->flags = f; events.insert(t); *e = (cudaEvent_t)t; return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
static Event* event(cudaEvent_t e) { return events.count((Event*)e) ? (Event*)e : nullptr; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { LOCKED; if (!event(e)) return said(cudaErrorInvalidResourceHandle); events.erase((Event*)e); delete (Event*)e; return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) {
  LOCKED;
  auto* t = of(s); auto* ev = event(e);
  if (!t || !ev) return said(cudaErrorInvalidResourceHandle);
  auto m = ev->marker = std::make_shared<Marker>();
  m->on = t;
  if (t->graph && !(f & cudaEventRecordExternal)) { m->graph = t->graph; return cudaSuccess; }
  auto mark = [m] { m->done = true; m->ms = now(); };
  if (t->queue.empty()) mark(); else t->queue.push_back(mark);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
cudaError_t cudaEventQuery(cudaEvent_t e) {
  LOCKED;
  auto* ev = event(e);
  if (!ev) return said(cudaErrorInvalidResourceHandle);
  if (forbidden()) return said(cudaErrorStreamCaptureUnsupported);
  auto m = ev->marker;
  if (!m || m->done) return cudaSuccess;
  if (m->graph) return said(cudaErrorCapturedEvent);
  if (++m->asked > 2) run_until(*m);
  return m->done ? cudaSuccess : said(cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  LOCKED;
  auto* ev = event(e);
  if (!ev) return said(cudaErrorInvalidResourceHandle);
  if (forbidden()) return said(cudaErrorStreamCaptureUnsupported);
  if (ev->marker && ev->marker->graph) return said(cudaErrorCapturedEvent);
  if (ev->marker) run_until(*ev->marker);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  LOCKED;
  auto *x = event(a), *y = event(b);
  if (!x || !y || !x->marker || !y->marker || (x->flags | y->flags) & cudaEventDisableTiming) return said(cudaErrorInvalidResourceHandle);
  if (x->marker->graph || y->marker->graph) return said(cudaErrorCapturedEvent);
  if (!x->marker->done || !y->marker->done) return said(cudaErrorNotReady);
  *ms = float(y->marker->ms - x->marker->ms);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) {
  LOCKED;
  auto* t = of(s); auto* ev = event(e);
  if (!t || !ev) return said(cudaErrorInvalidResourceHandle);
  auto m = ev->marker;
  if (!m) return cudaSuccess;
  if (m->graph) {
    bool live = false;
    for (auto* o : streams) live |= o->graph == m->graph;
    if (!live) return cudaSuccess;
    if (t->graph && t->graph != m->graph) return said(cudaErrorStreamCaptureIsolation);
    if (!t->graph) { t->graph = m->graph; t->mode = m->on->mode; }  // it joins the capture
    return cudaSuccess;
  }
  if (t->graph && !(f & cudaEventWaitExternal)) { t->broken = true; return said(cudaErrorStreamCaptureIsolation); }
  if (!m->done) run_until(*m);
  return cudaSuccess;
}

// --------------------------------------------------------------------- graphs
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
  LOCKED;
  auto* t = of(s);
  if (t == &main_stream) return said(cudaErrorStreamCaptureUnsupported);
  if (t->graph) return said(cudaErrorIllegalState);
  run(t);
  t->graph = new Graph; t->mode = mode; t->origin = true; t->broken = false;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t, cudaGraph_t, const cudaGraphNode_t*, const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode) { return said(cudaErrorNotSupported); }
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
  LOCKED;
  auto* t = of(s);
  *g = nullptr;
  if (!t->graph) return said(cudaErrorIllegalState);
  auto* made = t->graph;
  bool broken = false;
  for (auto* o : streams) if (o->graph == made) { broken |= o->broken; o->graph = nullptr; o->origin = o->broken = false; }
  if (broken) return said(cudaErrorStreamCaptureInvalidated);
  *g = (cudaGraph_t)made;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* st) {
  LOCKED;
  auto* t = of(s);
  if (t == &main_stream && forbidden()) return said(cudaErrorStreamCaptureImplicit);
  *st = !t->graph ? cudaStreamCaptureStatusNone : t->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* st, unsigned long long* id, cudaGraph_t* g, const cudaGraphNode_t** d, const cudaGraphEdgeData** e, size_t* n) {
  LOCKED;
  auto* t = of(s);
  *st = t->graph ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = (unsigned long long)t->graph;
  if (g) *g = (cudaGraph_t)t->graph;
  if (d) *d = nullptr;
  if (e) *e = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) { std::swap(*m, thread_mode); return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, size_t* n) { *n = ((Graph*)g)->nodes.size(); return cudaSuccess; }
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* n) { *n = 0; return cudaSuccess; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* x, cudaGraph_t g, unsigned long long) { *x = (cudaGraphExec_t)new std::vector<std::function<void()>>(((Graph*)g)->nodes); return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) { LOCKED; auto* n = (std::vector<std::function<void()>>*)x; return put(of(s), false, [n] { for (auto& f : *n) f(); }); }
cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete (Graph*)g; return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) { delete (std::vector<std::function<void()>>*)x; return cudaSuccess; }
cudaError_t cudaGraphAddNode(cudaGraphNode_t*, cudaGraph_t, const cudaGraphNode_t*, const cudaGraphEdgeData*, size_t, cudaGraphNodeParams*) { return said(cudaErrorNotSupported); }
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle*, cudaGraph_t, unsigned, unsigned) { return said(cudaErrorNotSupported); }
cudaError_t cudaUserObjectCreate(cudaUserObject_t* o, void* p, cudaHostFn_t f, unsigned, unsigned) { *o = (cudaUserObject_t)new std::pair<cudaHostFn_t, void*>(f, p); return cudaSuccess; }
cudaError_t cudaGraphRetainUserObject(cudaGraph_t g, cudaUserObject_t o, unsigned, unsigned) { ((Graph*)g)->kept.push_back(*(std::pair<cudaHostFn_t, void*>*)o); return cudaSuccess; }
cudaError_t cudaUserObjectRelease(cudaUserObject_t o, unsigned) { delete (std::pair<cudaHostFn_t, void*>*)o; return cudaSuccess; }

// -------------------------------------------------------------------- kernels
static auto& names = *new std::map<const void*, std::string>;
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) { LOCKED; names[host] = name; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* st) { *g = *b = dim3{1, 1, 1}; *s = 0; *(void**)st = nullptr; return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) { *k = (cudaKernel_t)f; return cudaSuccess; }
static cudaError_t launched(const void* f) {
  LOCKED;
  static auto& seen = *new std::set<std::string>;
  auto it = names.find(f);
  std::string name = it == names.end() ? "a kernel" : it->second;
  if (seen.insert(name).second) fprintf(stderr, "stand-in: a kernel was launched and did not run: %s\n", name.c_str());
  return said(cudaErrorInvalidDeviceFunction);
}
cudaError_t cudaLaunchKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t) { return launched(f); }
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3, dim3, void**, size_t, cudaStream_t) { return launched((const void*)f); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* f, void**) { return launched(f); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) { memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024; a->numRegs = 32; a->binaryVersion = a->ptxVersion = 90; a->maxDynamicSharedSizeBytes = 48 << 10; return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 2; return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) { *n = 2; return cudaSuccess; }
char __cudaInitModule(void**) { return 1; }
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t) { return launched(f); }
cudaError_t cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind, cudaStream_t) { return said(cudaErrorNotSupported); }
cudaError_t cudaGetSymbolAddress(void** p, const void* s) { *p = (void*)s; return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
cudaError_t cudaLibraryGetKernel(cudaKernel_t*, cudaLibrary_t, const char*) { return said(cudaErrorNotSupported); }
cudaError_t cudaLibraryLoadData(cudaLibrary_t*, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*, void**, unsigned) { return said(cudaErrorNotSupported); }
cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }
}
