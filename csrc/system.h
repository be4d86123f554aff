// What the kernel says about pages and NUMA nodes, by direct system calls (no libnuma).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ldft {

// Bytes of a base page.
std::size_t page_size();

// Node of each page in [address, address + bytes), read with move_pages(2). Pages that nothing has touched yet, and
// pages that are the shared zero page, have no node: they are reported as -1. Throws std::system_error when the query
// itself fails.
std::vector<int> nodes_of_pages(std::uintptr_t address, std::size_t bytes);

}  // namespace ldft
