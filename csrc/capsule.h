// Hands a region to a tensor library: a DLPack capsule over bytes, whose last user frees the memory.
#pragma once

#include <Python.h>

#include <memory>

#include "region.h"

namespace ldft {

// A new reference to a "dltensor" capsule: a vector of region->bytes() uint8 on the CPU. The region lives until the
// consumer (or, when nothing consumes it, the capsule) is gone. `before_release`, when not null, is called with the
// address before the memory is freed, except at interpreter exit and in forked children: there the memory
// is left to the kernel. Returns null with a Python error set if the capsule cannot be made.
PyObject* make_capsule(std::unique_ptr<Region> region, PyObject* before_release);

// Call when the interpreter is exiting: regions with a before_release are then left to the kernel.
void note_exit() noexcept;

}  // namespace ldft
