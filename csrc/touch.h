// Multi-threaded work on many pages: first touch, checking where pages are, and freeing them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stripes.h"

namespace ldft {

// Ranges whose pages are processed by threads on `cpus` (empty: wherever the caller may run), one thread per CPU, at
// most `threads`. The calling thread is one of them if it runs on such a CPU; it is not bound.
struct Group {
  std::vector<Range> ranges;  // offsets are relative to the base address passed with it
  std::vector<int> cpus;
  std::size_t threads;
};

// Write one byte of every page, so that each gets memory by its range's policy. A thread whose group is done
// helps the others. The memory must not be in use: the byte is set to zero.
void touch(std::uintptr_t base, const std::vector<Group>& groups);

// Where the pages of `ranges` are.
struct Census {
  std::vector<std::size_t> pages;  // by node
  std::size_t absent = 0;          // pages without memory
  std::size_t misplaced = 0;       // pages on another node than their range's (node -1: any node will do)
};
Census census(std::uintptr_t base, const std::vector<Range>& ranges, std::size_t threads);

// Move misplaced pages to their range's node. Gives up at the first stretch of which no page could be moved.
void bring_home(std::uintptr_t base, const std::vector<Range>& ranges);

// Return the pages to the kernel; reading them again gives zeros. Best effort: for speed, before munmap.
void discard(std::uintptr_t address, std::size_t bytes) noexcept;

}  // namespace ldft
