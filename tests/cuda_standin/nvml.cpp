// A stand-in for libnvidia-ml.so.1: what PyTorch's allocator asks before it maps memory of expandable segments.
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) { static int only; *device = &only; return 0; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, void*) { return 3; }   // NVML_ERROR_NOT_SUPPORTED
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return 3; }
int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) { *count = 0; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = 13000; return 0; }
}
