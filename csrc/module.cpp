// Python bindings of the native code. Addresses and sizes are plain integers; long operations run without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sched.h>

#include <cerrno>
#include <map>
#include <memory>
#include <optional>
#include <system_error>
#include <tuple>

#include "capsule.h"
#include "region.h"
#include "stripes.h"
#include "system.h"
#include "touch.h"
#include "update_job.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using RangeTuple = std::tuple<std::size_t, std::size_t, int>;
using GroupTuple = std::tuple<std::vector<RangeTuple>, std::vector<int>, std::size_t>;

std::vector<ldft::Range> ranges_of(const std::vector<RangeTuple>& tuples) {
  std::vector<ldft::Range> ranges;
  for (const auto& [offset, bytes, node] : tuples) ranges.push_back({offset, bytes, node});
  return ranges;
}

// Python's handle of a region until a capsule takes it over.
struct Handle {
  std::unique_ptr<ldft::Region> region;
  ldft::Region& get() const {
    if (!region) throw std::runtime_error("the region was released or handed over");
    return *region;
  }
  // Ranges from Python must lie inside the region: native code is about to write there.
  std::vector<ldft::Range> inside(const std::vector<RangeTuple>& tuples) const {
    auto ranges = ranges_of(tuples);
    for (const auto& range : ranges) {
      if (range.offset > get().bytes() || range.bytes > get().bytes() - range.offset) {
        throw std::out_of_range("range outside its region");
      }
    }
    return ranges;
  }
};

void touch(const Handle& handle, const std::vector<GroupTuple>& tuples) {
  std::vector<ldft::Group> groups;
  for (const auto& [ranges, cpus, threads] : tuples) groups.push_back({handle.inside(ranges), cpus, threads});
  ldft::touch(handle.get().address(), groups);
}

std::tuple<std::map<int, std::size_t>, std::size_t, std::size_t> census(const Handle& handle,
                                                                        const std::vector<RangeTuple>& ranges,
                                                                        std::size_t threads) {
  const ldft::Census found = ldft::census(handle.get().address(), handle.inside(ranges), threads);
  std::map<int, std::size_t> pages;
  for (std::size_t node = 0; node < found.pages.size(); ++node) {
    if (found.pages[node] > 0) pages[static_cast<int>(node)] = found.pages[node];
  }
  return {pages, found.absent, found.misplaced};
}

nb::object capsule(Handle& handle, nb::object before_release) {
  if (before_release.is_none()) return nb::steal(ldft::make_capsule((handle.get(), std::move(handle.region)), nullptr));
  return nb::steal(ldft::make_capsule((handle.get(), std::move(handle.region)), before_release.ptr()));
}

std::vector<RangeTuple> make_stripes(std::size_t bytes, std::size_t stripe, const std::vector<int>& nodes,
                                     const std::vector<std::uint64_t>& weights) {
  std::vector<RangeTuple> tuples;
  for (const auto& range : ldft::make_stripes(bytes, ldft::page_size(), stripe, nodes, weights)) {
    tuples.emplace_back(range.offset, range.bytes, range.node);
  }
  return tuples;
}

// An update and the Python object that owns the memory it works on, which is released after it.
struct Update {
  nb::object owner;
  ldft::UpdateJob job;
};

float* floats(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

template <typename Rule>
std::size_t add(Update& self, const Rule& rule, std::uintptr_t weights, std::uintptr_t gradients,
                ldft::Type gradient_type, std::uintptr_t momentum, std::uintptr_t variance, std::uintptr_t copy,
                ldft::Type copy_type, std::size_t count) {
  return self.job.add(rule, {floats(weights), reinterpret_cast<const void*>(gradients), gradient_type, floats(momentum),
                             floats(variance), reinterpret_cast<void*>(copy), copy_type, count});
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Host memory by direct system calls: reserve, place, touch, verify, release. Kernel errors raise OSError.";
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const std::system_error& e) {
      errno = e.code().value();
      PyErr_SetFromErrnoWithFilename(PyExc_OSError, e.what());
    }
  });
  using no_gil = nb::call_guard<nb::gil_scoped_release>;

  m.def("page_size", &ldft::page_size, "Bytes of a base page.");
  m.def("huge_page_size", &ldft::huge_page_size, "Bytes of a transparent huge page; 0 where there are none for us.");
  m.def("nodes_of_pages", &ldft::nodes_of_pages, "address"_a, "bytes"_a, no_gil(),
        "Node of each page of a range, by move_pages(2); -1 for a page without memory yet.");
  m.def("thread_policy", &ldft::thread_policy,
        "(policy with flags, nodes) of the calling thread, by get_mempolicy(2).");
  m.def("set_thread_policy", &ldft::set_thread_policy, "policy"_a, "nodes"_a,
        "Set the calling thread's policy, and that of threads that it starts later, by set_mempolicy(2).");
  m.def("apportion", &ldft::apportion, "pages"_a, "weights"_a, "Divide pages by weights, exact to one page.");
  m.def("stripe_bytes", &ldft::stripe_bytes, "bytes"_a, "unit"_a, "max_ranges"_a,
        "Bytes of a stripe: unit doubled until max_ranges suffice.");
  m.def("make_stripes", &make_stripes, "bytes"_a, "stripe"_a, "nodes"_a, "weights"_a,
        "Ranges (offset, bytes, node) that divide a region by weight, exact to one page.");
  m.def(
      "usage",
      [] {
        const ldft::Usage now = ldft::usage();
        return std::make_tuple(now.regions, now.bytes, now.ranges);
      },
      "(regions, bytes, mappings) reserved in this process now.");
  m.def("is_live", &ldft::is_live, "address"_a, "Whether a region that starts there is reserved now.");
  m.def("current_cpu", [] { return sched_getcpu(); }, "CPU that the calling thread runs on now; -1 when unknown.");
  m.def("note_exit", &ldft::note_exit, "The interpreter is ending: leave registered memory to the kernel.");
  nb::enum_<ldft::Type>(m, "Type", "Format of an array's elements.")
      .value("fp32", ldft::Type::fp32)
      .value("bf16", ldft::Type::bf16)
      .value("fp16", ldft::Type::fp16);
  nb::class_<ldft::AdamW>(m, "AdamW", "Scalars of one step of AdamW; see csrc/update.h.")
      .def(nb::init<float, float, float, float, float, float, float>(), "gradient_factor"_a, "beta1"_a, "beta2"_a,
           "epsilon"_a, "inverse_bias2"_a, "step"_a, "decay"_a);
  nb::class_<ldft::Lion>(m, "Lion", "Scalars of one step of Lion.")
      .def(nb::init<float, float, float, float, float>(), "gradient_factor"_a, "beta1"_a, "beta2"_a, "rate"_a,
           "weight_decay"_a);
  const char* add_text =
      "Add a parameter, after those that are there: addresses of fp32 weights, gradients, fp32 moments (variance: 0 "
      "for "
      "Lion), and of the copy of the new weights (0: none). Returns its number.";
  nb::class_<Update>(m, "Update", "One step of the optimizer, by threads beside the program.")
      .def(
          "__init__", [](Update* self, nb::object owner) { new (self) Update{std::move(owner), {}}; }, "owner"_a.none(),
          "owner: kept alive as long as this object, for the memory.")
      .def("add", &add<ldft::AdamW>, "rule"_a, "weights"_a, "gradients"_a, "gradient_type"_a, "momentum"_a,
           "variance"_a, "copy"_a, "copy_type"_a, "count"_a, add_text)
      .def("add", &add<ldft::Lion>, "rule"_a, "weights"_a, "gradients"_a, "gradient_type"_a, "momentum"_a, "variance"_a,
           "copy"_a, "copy_type"_a, "count"_a)
      .def(
          "start", [](Update& self, std::size_t threads, int nice) { self.job.start(threads, nice); }, "threads"_a,
          "nice"_a, "Start threads at this nice value; without threads, whoever waits does all work.")
      .def(
          "wait", [](Update& self, std::size_t parameter) { self.job.wait(parameter); }, "parameter"_a, no_gil(),
          "Return when a parameter is updated; the calling thread helps meanwhile.")
      .def(
          "finish", [](Update& self) { self.job.finish(); }, no_gil(), "Return when all are.")
      .def(
          "pause", [](Update& self) { self.job.pause(); }, no_gil(), "Stop until resume() or the next wait.")
      .def(
          "resume", [](Update& self) { self.job.resume(); }, no_gil(), "Go on.")
      .def_prop_ro(
          "progress",
          [](Update& self) {
            const auto now = self.job.progress();
            return std::make_tuple(now.seconds, now.waited_s, now.bytes, now.beside);
          },
          "(seconds without pauses, seconds waited for it, bytes moved, bytes of them moved while nobody waited)");

  nb::class_<Handle>(m, "Region", "Reserved memory, freed when released or dropped, unless a capsule takes it over.")
      .def(
          "__init__",
          [](Handle* self, std::size_t bytes, bool huge) {
            new (self) Handle{std::make_unique<ldft::Region>(bytes, huge)};
          },
          "bytes"_a, "huge"_a)
      .def_prop_ro("address", [](const Handle& self) { return self.get().address(); })
      .def_prop_ro(
          "bytes", [](const Handle& self) { return self.get().bytes(); }, "Whole pages.")
      .def_prop_ro(
          "huge", [](const Handle& self) { return self.get().huge(); }, "Huge pages were asked for and agreed to.")
      .def(
          "place", [](Handle& self, int policy, const std::vector<int>& nodes) { self.get().place(policy, nodes); },
          "policy"_a, "nodes"_a, "Set one policy for all of it, by mbind(2).")
      .def(
          "place_ranges",
          [](Handle& self, const std::vector<RangeTuple>& ranges) { self.get().place_ranges(ranges_of(ranges)); },
          "ranges"_a, no_gil(), "Let each range (offset, bytes, node) prefer its node, by one mbind(2) each.")
      .def("touch", &touch, "groups"_a, no_gil(),
           "Write one byte of every page: groups of ([(offset, bytes, node)], cpus, threads). Only for memory not yet "
           "in use.")
      .def("census", &census, "ranges"_a, "threads"_a, no_gil(), "({node: pages}, absent, misplaced) of the ranges.")
      .def(
          "bring_home",
          [](const Handle& self, const std::vector<RangeTuple>& ranges) {
            ldft::bring_home(self.get().address(), self.inside(ranges));
          },
          "ranges"_a, no_gil(), "Move pages that are elsewhere than their range wants, as far as there is room.")
      .def(
          "hide_from_children", [](Handle& self) { self.get().hide_from_children(); },
          "Do not map it in forked children.")
      .def("capsule", &capsule, "before_release"_a.none(),
           "Hand the memory over to a DLPack capsule of uint8. before_release(address) is called before it is freed.")
      .def("release", [](Handle& self) { self.region.reset(); }, no_gil(), "Give it back now.");
}
