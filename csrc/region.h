// One reservation of anonymous memory and its life: reserve, place, (touch, verify: touch.h), release.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stripes.h"

namespace ldft {

// Bytes of a transparent huge page; 0 where the kernel has none for us (switched off, or not built in).
std::size_t huge_page_size();

class Region {
 public:
  // Reserve `bytes`, rounded up to whole pages, all of them zero once touched (the kernel clears a page before it hands
  // it out, so nothing here has to). With `huge`, from a huge page's boundary on, and huge pages asked for; huge() says
  // whether the kernel agreed. Throws std::system_error (ENOMEM: address space, overcommit or rlimit).
  Region(std::size_t bytes, bool huge);
  ~Region() { release(); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::uintptr_t address() const { return address_; }
  std::size_t bytes() const { return bytes_; }
  bool huge() const { return huge_; }

  // One policy for all of it, or every range preferring its node. Throws std::system_error; the region stays valid.
  void place(int policy, const std::vector<int>& nodes);
  void place_ranges(const std::vector<Range>& ranges);

  // Take the region out of the children of this process. For pinned memory: the copies that fork makes of pages under
  // DMA would double the memory at once, and the child could not use CUDA anyway. Other regions are copied on write, as
  // all memory is.
  void hide_from_children();

  // Give the memory back. Once; later calls do nothing. In a child of the process that reserved it, memory hidden from
  // children is not there (something else may live at its address by now), so nothing is done.
  void release() noexcept;

  // Forget the memory without giving it back, for the end of the process when CUDA may still hold it.
  void abandon() noexcept;

  // True in a child, by fork, of the process that reserved it.
  bool inherited() const noexcept;

 private:
  void count(std::ptrdiff_t sign) noexcept;

  std::uintptr_t address_ = 0;
  std::size_t bytes_ = 0;
  std::size_t ranges_ = 1;  // mappings (VMAs) that the kernel keeps for it, at most
  unsigned generation_ = 0;
  bool huge_ = false;
  bool hidden_ = false;
};

// What is reserved in this process now.
struct Usage {
  std::size_t regions, bytes, ranges;
};
Usage usage() noexcept;

// Whether a region that starts at `address` is reserved now.
bool is_live(std::uintptr_t address);

}  // namespace ldft
