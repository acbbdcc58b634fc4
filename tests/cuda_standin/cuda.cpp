// A stand-in for libcuda.so.1: virtual memory by memfd and mmap, so that touching what is not mapped ends the process;
// modules and launches that do nothing, for Triton; a name for every error.
#include <cuda.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "state.h"

namespace {
std::mutex& lock() { static auto& m = *new std::mutex; return m; }
#define LOCKED std::lock_guard<std::mutex> held(lock())
const size_t grain = 2 << 20;
struct Memory { int file; size_t nbytes; ~Memory() { close(file); standin::give(nbytes); } };
struct Mapping { std::shared_ptr<Memory> memory; size_t nbytes; bool access; };
auto& memories = *new std::map<CUmemGenericAllocationHandle, std::shared_ptr<Memory>>;
auto& reserved = *new std::map<CUdeviceptr, size_t>;
auto& mapped = *new std::map<CUdeviceptr, Mapping>;
int context;
CUcontext now_current = (CUcontext)&context;
bool inside(CUdeviceptr a, size_t n) {
  auto it = reserved.upper_bound(a);
  if (it == reserved.begin()) return false;
  --it;
  return a + n <= it->first + it->second;
}
bool whole(CUdeviceptr a, size_t n) {  // the range is made of whole mappings
  CUdeviceptr end = a + n;
  while (a < end) {
    auto it = mapped.find(a);
    if (it == mapped.end()) return false;
    a += it->second.nbytes;
  }
  return a == end;
}
}  // namespace

extern "C" {
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* v) { *v = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* n) { *n = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* d, int i) { *d = i; return i ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS; }
CUresult cuDeviceGetName(char* s, int n, CUdevice) { strncpy(s, "stand-in (no GPU)", n); return CUDA_SUCCESS; }
CUresult cuDeviceTotalMem_v2(size_t* n, CUdevice) { *n = 24ull << 30; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
  switch ((int)a) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *v = 9; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *v = 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *v = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *v = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *v = 1980000; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *v = 2619000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *v = 5120; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *v = 1024; break;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: *v = 1; break;
    default: *v = 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) { *c = (CUcontext)&context; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* f, int* active) { *f = 0; *active = 1; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* c) { *c = now_current; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* v, CUlimit) { *v = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuCtxSynchronize() { auto f = (int (*)())dlsym(RTLD_DEFAULT, "cudaDeviceSynchronize"); return f ? (CUresult)f() : CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char** s) { static thread_local std::string t; t = "driver error " + std::to_string((int)e) + " (stand-in)"; *s = t.c_str(); return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult e, const char** s) { return cuGetErrorString(e, s); }
CUresult cuPointerGetAttribute(void* v, CUpointer_attribute a, CUdeviceptr p) {
  if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)v = p;
  else if (a == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) *(int*)v = 0;
  else if (a == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(int*)v = CU_MEMORYTYPE_DEVICE;
  else return CUDA_ERROR_NOT_SUPPORTED;
  return CUDA_SUCCESS;
}
// ------------------------------------------------------------- virtual memory
CUresult cuMemGetAllocationGranularity(size_t* g, const CUmemAllocationProp* p, CUmemAllocationGranularity_flags) {
  if (p->type != CU_MEM_ALLOCATION_TYPE_PINNED || p->location.type != CU_MEM_LOCATION_TYPE_DEVICE || p->location.id) return CUDA_ERROR_INVALID_VALUE;
  *g = grain;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr* a, size_t n, size_t align, CUdeviceptr, unsigned long long flags) {
  LOCKED;
  if (!n || n % grain || flags || (align && align & (align - 1))) return CUDA_ERROR_INVALID_VALUE;
  auto m = (char*)mmap(nullptr, n + grain, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  auto at = ((uintptr_t)m + grain - 1) / grain * grain;
  if (at > (uintptr_t)m) munmap(m, at - (uintptr_t)m);
  munmap((void*)(at + n), (uintptr_t)m + grain - at);
  reserved[at] = n;
  *a = at;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr a, size_t n) {
  LOCKED;
  auto it = reserved.find(a);
  if (it == reserved.end() || it->second != n) return CUDA_ERROR_INVALID_VALUE;
  auto m = mapped.lower_bound(a);
  if (m != mapped.end() && m->first < a + n) return CUDA_ERROR_INVALID_VALUE;
  munmap((void*)a, n);
  reserved.erase(it);
  return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* h, size_t n, const CUmemAllocationProp* p, unsigned long long flags) {
  LOCKED;
  static CUmemGenericAllocationHandle next = 1;
  if (!n || n % grain || flags || p->type != CU_MEM_ALLOCATION_TYPE_PINNED || p->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  if (!standin::take(n)) return CUDA_ERROR_OUT_OF_MEMORY;
  int f = memfd_create("device", 0);
  if (f < 0 || ftruncate(f, n)) { standin::give(n); return CUDA_ERROR_OUT_OF_MEMORY; }
  memories[*h = next++] = std::shared_ptr<Memory>(new Memory{f, n});
  return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle h) { LOCKED; return memories.erase(h) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuMemMap(CUdeviceptr a, size_t n, size_t offset, CUmemGenericAllocationHandle h, unsigned long long flags) {
  LOCKED;
  auto it = memories.find(h);
  if (it == memories.end() || offset || flags || !n || n != it->second->nbytes || a % grain || !inside(a, n)) return CUDA_ERROR_INVALID_VALUE;
  auto m = mapped.upper_bound(a);
  if (m != mapped.begin()) { auto before = std::prev(m); if (before->first + before->second.nbytes > a) return CUDA_ERROR_INVALID_VALUE; }
  if (m != mapped.end() && m->first < a + n) return CUDA_ERROR_INVALID_VALUE;
  mmap((void*)a, n, PROT_NONE, MAP_SHARED | MAP_FIXED, it->second->file, 0);
  mapped[a] = {it->second, n, false};
  return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr a, size_t n, const CUmemAccessDesc* d, size_t count) {
  LOCKED;
  if (!whole(a, n) || count != 1 || d->location.type != CU_MEM_LOCATION_TYPE_DEVICE || d->location.id) return CUDA_ERROR_INVALID_VALUE;
  mprotect((void*)a, n, d->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE ? PROT_READ | PROT_WRITE : PROT_NONE);
  for (auto it = mapped.find(a); it != mapped.end() && it->first < a + n; ++it) standin::know(it->first, it->second.nbytes, 2);
  return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr a, size_t n) {
  LOCKED;
  if (!whole(a, n)) return CUDA_ERROR_INVALID_VALUE;
  mmap((void*)a, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  for (auto at = a; at < a + n;) { auto it = mapped.find(at); at += it->second.nbytes; standin::know(it->first, 0, 0); mapped.erase(it); }
  return CUDA_SUCCESS;
}
// --------------------------------------------------- modules, which do nothing
CUresult cuModuleLoadData(CUmodule* m, const void*) { static int x; *m = (CUmodule)&x; return CUDA_SUCCESS; }
CUresult cuModuleLoadDataEx(CUmodule* m, const void* d, unsigned, CUjit_option*, void**) { return cuModuleLoadData(m, d); }
CUresult cuModuleLoad(CUmodule* m, const char*) { return cuModuleLoadData(m, nullptr); }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char*) { static int x; *f = (CUfunction)&x; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) { *v = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0; return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**) { return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig*, CUfunction, void**, void**) { return CUDA_SUCCESS; }
CUresult cuLaunchCooperativeKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**) { return CUDA_SUCCESS; }
CUresult no_cuLinkAddData_v2() __asm__("cuLinkAddData_v2");
CUresult no_cuLinkAddData_v2() { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult no_cuLinkComplete() __asm__("cuLinkComplete");
CUresult no_cuLinkComplete() { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult no_cuLinkCreate_v2() __asm__("cuLinkCreate_v2");
CUresult no_cuLinkCreate_v2() { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) { *n = 2; return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { *n = 1; return CUDA_SUCCESS; }
CUresult no_cuTensorMapEncodeTiled() __asm__("cuTensorMapEncodeTiled");
CUresult no_cuTensorMapEncodeTiled() { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuGetProcAddress_v2(const char* name, void** f, int, cuuint64_t, CUdriverProcAddressQueryResult* r) {
  static void* self = dlopen("libcuda.so.1", RTLD_NOW);
  *f = nullptr;
  for (auto* end : {"_v3", "_v2", ""}) if (!*f) *f = dlsym(self, (std::string(name) + end).c_str());
  if (r) *r = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult plain_proc(const char*, void**, int, cuuint64_t) __asm__("cuGetProcAddress");
CUresult plain_proc(const char* name, void** f, int v, cuuint64_t flags) { return cuGetProcAddress_v2(name, f, v, flags, nullptr); }
}
