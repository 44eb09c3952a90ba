// What the kernels' launching asks of the current CUDA device.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

namespace odn_fast::separable_conv_cuda {

// What is asked of a device once.
struct Device {
  int processors, shared_bytes, major;
};

inline cudaError_t current_device(int& index, Device& device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  if (const cudaError_t error = cudaGetDevice(&index)) return error;
  const std::lock_guard lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) {
    device = found->second;
    return cudaSuccess;
  }
  if (const cudaError_t error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index)) return error;
  known[index] = device;
  return cudaSuccess;
}

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

}  // namespace odn_fast::separable_conv_cuda
