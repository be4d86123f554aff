// Queries and sets pages, NUMA nodes and policies by direct system calls (no libnuma).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace ldft {

// Memory policies of <linux/mempolicy.h>, which older headers do not have in full.
enum Policy : int {
  kDefault = 0,
  kPreferred = 1,
  kBind = 2,
  kInterleave = 3,
  kLocal = 4,
  kPreferredMany = 5,       // Linux 5.15
  kWeightedInterleave = 6,  // Linux 6.9
};

// Bytes of a base page.
std::size_t page_size();

// Set the policy of [address, address + bytes) with mbind(2). Throws std::system_error; EINVAL also if the kernel
// does not know the policy or the cpuset forbids every node.
void bind_range(std::uintptr_t address, std::size_t bytes, int policy, const std::vector<int>& nodes);

// Set the policy of the calling thread, and of threads that it starts later, with set_mempolicy(2).
void set_thread_policy(int policy, const std::vector<int>& nodes);

// Policy (with its mode flags) and nodes of the calling thread, with get_mempolicy(2).
std::pair<int, std::vector<int>> thread_policy();

// Node of each of `pages`, as move_pages(2) reports it: a negative errno if it has none (-ENOENT: not touched yet;
// -EFAULT: the shared zero page or no mapping). With `targets`, the pages are first moved there; one that could not be
// moved stays. Throws std::system_error if the call itself fails.
void query_pages(void** pages, std::size_t count, int* nodes);
void move_pages_to(void** pages, std::size_t count, const int* targets);

// Which parts of a range are mapped by huge pages, by the PAGEMAP_SCAN ioctl (Linux 6.7). Then one base page represents
// its whole huge page, and querying nodes costs a fraction.
class HugeScan {
 public:
  HugeScan();
  ~HugeScan();
  HugeScan(const HugeScan&) = delete;
  HugeScan& operator=(const HugeScan&) = delete;
  // [start, end) pairs in order. Empty if the kernel cannot tell.
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> find(std::uintptr_t address, std::size_t bytes) const;

 private:
  int pagemap_;
};

// Node of each page in [address, address + bytes); -1 for a page without memory.
std::vector<int> nodes_of_pages(std::uintptr_t address, std::size_t bytes);

}  // namespace ldft
