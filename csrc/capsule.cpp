#include "capsule.h"

#include <atomic>
#include <cstdint>

namespace ldft {
namespace {

// DLPack's structures, version 0: the binary interface that https://dmlc.github.io/dlpack/latest/c_api.html defines.
struct DLTensor {
  void* data;
  struct {
    std::int32_t type, id;
  } device;
  std::int32_t ndim;
  struct {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* manager;
  void (*deleter)(DLManagedTensor*);
};
constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kUnsigned = 1;
constexpr const char* kFresh = "dltensor";  // the consumer renames the capsule

std::atomic<bool> exiting{false};

struct Owner {
  std::unique_ptr<Region> region;
  PyObject* before_release;
  std::int64_t shape[1], strides[1];
  DLManagedTensor managed;
};

// Runs on the thread that drops the last reference, with or without the GIL. Memory without a before_release does not
// need Python.
void drop(DLManagedTensor* managed) {
  auto* owner = static_cast<Owner*>(managed->manager);
  if (owner->before_release != nullptr) {
    if (owner->region->inherited()) {
      owner->region->release();  // hidden from this process: only forget it
    } else if (exiting || !Py_IsInitialized()) {
      owner->region->abandon();
    } else {
      const PyGILState_STATE state = PyGILState_Ensure();
      PyObject *type, *value, *trace;  // this may run while an exception is propagating
      PyErr_Fetch(&type, &value, &trace);
      PyObject* result =
          PyObject_CallFunction(owner->before_release, "K", static_cast<unsigned long long>(owner->region->address()));
      if (result == nullptr) {
        // The memory may still be registered: a device could write to it, so it must not be reused.
        PyErr_WriteUnraisable(owner->before_release);
        owner->region->abandon();
      }
      Py_XDECREF(result);
      Py_DECREF(owner->before_release);
      PyErr_Restore(type, value, trace);
      PyGILState_Release(state);
    }
  }
  delete owner;  // also deletes the region
}

void drop_unused(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kFresh)) return;  // the consumer owns it
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kFresh));
  managed->deleter(managed);
}

}  // namespace

PyObject* make_capsule(std::unique_ptr<Region> region, PyObject* before_release) {
  auto owner = std::make_unique<Owner>();
  owner->shape[0] = static_cast<std::int64_t>(region->bytes());
  owner->strides[0] = 1;
  DLTensor& tensor = owner->managed.tensor;
  tensor.data = reinterpret_cast<void*>(region->address());
  tensor.device.type = kCpu;
  tensor.device.id = 0;
  tensor.ndim = 1;
  tensor.dtype.code = kUnsigned;
  tensor.dtype.bits = 8;
  tensor.dtype.lanes = 1;
  tensor.shape = owner->shape;
  tensor.strides = owner->strides;
  tensor.byte_offset = 0;
  owner->managed.manager = owner.get();
  owner->managed.deleter = &drop;
  owner->region = std::move(region);
  owner->before_release = nullptr;
  PyObject* capsule = PyCapsule_New(&owner->managed, kFresh, &drop_unused);
  if (capsule == nullptr) return nullptr;
  Py_XINCREF(before_release);
  owner->before_release = before_release;
  owner.release();
  return capsule;
}

void note_exit() noexcept { exiting = true; }

}  // namespace ldft
