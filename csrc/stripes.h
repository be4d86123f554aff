// Divides a range of pages among NUMA nodes by weight, without help from the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ldft {

// `bytes` bytes from `offset` on, requested on `node`.
struct Range {
  std::size_t offset;
  std::size_t bytes;
  int node;
};

// Divide `pages` by `weights`: whole pages that sum to `pages`, each within one page of its exact share (largest
// remainder).
std::vector<std::size_t> apportion(std::size_t pages, const std::vector<std::uint64_t>& weights);

// Bytes of a stripe: `unit` (a huge page) doubled until at most `max_ranges` ranges are needed.
std::size_t stripe_bytes(std::size_t bytes, std::size_t unit, std::size_t max_ranges);

// Cut `bytes` (whole pages of `page` bytes) into ranges, in the order of their offsets and without gaps, such that each
// node gets its share by weight exact to one page. Neighbours on the same node are one range.
std::vector<Range> make_stripes(std::size_t bytes, std::size_t page, std::size_t stripe, const std::vector<int>& nodes,
                                const std::vector<std::uint64_t>& weights);

}  // namespace ldft
