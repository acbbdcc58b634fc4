// What the stand-in's runtime and driver share: one device's memory, streams that run late, and who may touch what.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace standin {
__attribute__((visibility("default"))) bool take(size_t nbytes);       // device memory, counted; false: there is no more
__attribute__((visibility("default"))) void give(size_t nbytes);
__attribute__((visibility("default"))) void know(uintptr_t address, size_t nbytes, int kind);  // 1 host, 2 device, 0 nothing
__attribute__((visibility("default"))) void drain(void* stream);       // run what is queued on it
__attribute__((visibility("default"))) bool capturing(void* stream);
__attribute__((visibility("default"))) void node(void* stream, std::function<void()> run);  // of the graph being captured
}  // namespace standin
