// One reservation of anonymous memory and its lifetime: reserve, place, (touch, verify: touch.h), release.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stripes.h"

namespace ldft {

// Bytes of a transparent huge page; 0 if the kernel offers none (switched off, or not built in).
std::size_t huge_page_size();

class Region {
 public:
  // Reserve `bytes`, rounded up to whole pages, all of them zero once touched (the kernel clears a page before it hands
  // it out). With `huge`, the region starts on a huge-page boundary and huge pages are requested; huge() tells
  // whether the kernel accepted. Throws std::system_error (ENOMEM: address space, overcommit or rlimit).
  Region(std::size_t bytes, bool huge);
  ~Region() { release(); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::uintptr_t address() const { return address_; }
  std::size_t bytes() const { return bytes_; }
  bool huge() const { return huge_; }

  // Set one policy for the whole region, or a preferred node for each range. Throws std::system_error; the region stays
  // valid.
  void place(int policy, const std::vector<int>& nodes);
  void place_ranges(const std::vector<Range>& ranges);

  // Do not map the region in children of this process. For pinned memory: the copies that fork makes of pages under
  // DMA would double the memory at once, and the child could not use CUDA anyway. Other regions are copy-on-write, as
  // all memory is.
  void hide_from_children();

  // Free the memory. Later calls do nothing. In a child of the process that reserved it, memory hidden from
  // children is not mapped (something else may be at its address by now), so nothing is done.
  void release() noexcept;

  // Forget the memory without freeing it, for process exit, when CUDA may still hold it.
  void abandon() noexcept;

  // True in a forked child of the process that reserved it.
  bool inherited() const noexcept;

 private:
  void count(std::ptrdiff_t sign) noexcept;

  std::uintptr_t address_ = 0;
  std::size_t bytes_ = 0;
  std::size_t ranges_ = 1;  // upper bound of the kernel's mappings (VMAs) for it
  unsigned generation_ = 0;
  bool huge_ = false;
  bool hidden_ = false;
};

// Totals over the regions now reserved in this process.
struct Usage {
  std::size_t regions, bytes, ranges;
};
Usage usage() noexcept;

// Whether a region that starts at `address` is now reserved.
bool is_live(std::uintptr_t address);

}  // namespace ldft
