// Work on many pages by many threads: the first touch, the check of where pages are, and giving them back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stripes.h"

namespace ldft {

// Ranges whose pages are worked on by threads that run on `cpus` (empty: wherever the caller may run), one thread a
// CPU, at most `threads`. The calling thread is one of them where it runs on such a CPU; it is not bound.
struct Group {
  std::vector<Range> ranges;  // offsets count from the base address given beside it
  std::vector<int> cpus;
  std::size_t threads;
};

// Write one byte of every page, so that each gets its memory, by the policy of its range. A thread whose group is done
// helps the others. The memory must not be in use: the byte is set to zero.
void touch(std::uintptr_t base, const std::vector<Group>& groups);

// Where the pages of `ranges` are.
struct Census {
  std::vector<std::size_t> pages;  // by node
  std::size_t absent = 0;          // pages without memory
  std::size_t misplaced = 0;       // pages elsewhere than their range wants (a range of node -1 wants nothing)
};
Census census(std::uintptr_t base, const std::vector<Range>& ranges, std::size_t threads);

// Move pages that are elsewhere than their range wants. Gives up at the first stretch of which none could be moved.
void bring_home(std::uintptr_t base, const std::vector<Range>& ranges);

// Give the pages back to the kernel; reading them again gives zeros. Best effort: for speed, before munmap.
void discard(std::uintptr_t address, std::size_t bytes) noexcept;

}  // namespace ldft
