// Hands a region to a tensor library: a DLPack capsule over bytes, whose last user gives the memory back.
#pragma once

#include <Python.h>

#include <memory>

#include "region.h"

namespace ldft {

// A new reference to a "dltensor" capsule: a vector of region->bytes() uint8 on the CPU. The region lives until the
// consumer (or, when nothing consumes it, the capsule) is gone. `before_release`, when not null, is called with the
// address before the memory goes back, except at the end of the interpreter and in children by fork: there the memory
// is left to the kernel. Returns null with a Python error set when the capsule cannot be made.
PyObject* make_capsule(std::unique_ptr<Region> region, PyObject* before_release);

// From here on the interpreter is ending: regions with a before_release are left to the kernel.
void note_exit() noexcept;

}  // namespace ldft
