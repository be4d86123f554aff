// Python bindings of the native code. Arguments are plain integers (addresses, bytes): the callers own the memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "system.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_native, m) {
  m.doc() = "Host memory by direct system calls: pages and the NUMA nodes that hold them.";
  m.def("page_size", &ldft::page_size, "Bytes of a base page.");
  m.def("nodes_of_pages", &ldft::nodes_of_pages, "address"_a, "bytes"_a, nb::call_guard<nb::gil_scoped_release>(),
        "Node of each page of a range, by move_pages(2); -1 where a page has none yet.");
}
