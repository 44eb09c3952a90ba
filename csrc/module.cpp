// odn_fast._C: importing it loads this library, whose static initialisers register the CPU kernels.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <set>
#include <thread>

#include "instruction_set.h"

namespace py = pybind11;

namespace {

// How many threads at::parallel_for really uses. Compiled without -fopenmp it would quietly be one.
size_t parallel_threads() {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  at::parallel_for(0, 64, 1, [&](int64_t, int64_t) {
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  return threads.size();
}

}  // namespace

// Read from the file by odn_fast/_extension.py before it loads the library: one built against another torch may
// load and then crash.
[[gnu::used]] static const char built_against_torch[] = "odn_fast built against torch " ODN_FAST_TORCH_VERSION;

PYBIND11_MODULE(_C, module) {
  py::dict build;
  build["torch"] = ODN_FAST_TORCH_VERSION;
  build["compiler"] = ODN_FAST_COMPILER;
  build["CUDA"] = ODN_FAST_CUDA_BUILD;  // the compiler's version and architectures, or "left out: " and why
  module.attr("build_information") = build;
  module.def("parallel_threads", &parallel_threads);
  module.def("instruction_sets", &odn_fast::instruction_sets);
  module.def("instruction_set", &odn_fast::instruction_set_name);
  module.def("set_instruction_set", &odn_fast::set_instruction_set);
}
