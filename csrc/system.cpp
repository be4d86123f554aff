#include "system.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace ldft {
namespace {

constexpr int kMaxNodes = 1024;  // the largest configurable number (CONFIG_NODES_SHIFT is at most 10)
constexpr int kBits = 8 * sizeof(unsigned long);
using NodeMask = std::array<unsigned long, kMaxNodes / kBits>;

[[noreturn]] void fail(const char* call) { throw std::system_error(errno, std::generic_category(), call); }

NodeMask mask_of(const std::vector<int>& nodes) {
  NodeMask mask{};
  for (int node : nodes) {
    if (node < 0 || node >= kMaxNodes) throw std::invalid_argument("node number out of range");
    mask[node / kBits] |= 1UL << (node % kBits);
  }
  return mask;
}

// struct pm_scan_arg, struct page_region and their constants in <linux/fs.h>, which headers before Linux 6.7 do not
// have.
struct ScanArgument {
  std::uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  std::uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct ScanRegion {
  std::uint64_t start, end, categories;
};
constexpr std::uint64_t kIsPresent = 1 << 3, kIsHuge = 1 << 6;
constexpr unsigned long kPagemapScan = _IOWR('f', 16, ScanArgument);

}  // namespace

std::size_t page_size() {
  static const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

void bind_range(std::uintptr_t address, std::size_t bytes, int policy, const std::vector<int>& nodes) {
  if (bytes == 0) return;
  const NodeMask mask = mask_of(nodes);
  // The kernel reads one bit less than it is told, hence the + 1.
  if (syscall(SYS_mbind, address, bytes, policy, nodes.empty() ? nullptr : mask.data(),
              nodes.empty() ? 0 : kMaxNodes + 1, 0) < 0) {
    fail("mbind");
  }
}

void set_thread_policy(int policy, const std::vector<int>& nodes) {
  const NodeMask mask = mask_of(nodes);
  if (syscall(SYS_set_mempolicy, policy, nodes.empty() ? nullptr : mask.data(), nodes.empty() ? 0 : kMaxNodes + 1) <
      0) {
    fail("set_mempolicy");
  }
}

std::pair<int, std::vector<int>> thread_policy() {
  int policy = kDefault;
  NodeMask mask{};
  if (syscall(SYS_get_mempolicy, &policy, mask.data(), kMaxNodes + 1, nullptr, 0) < 0) fail("get_mempolicy");
  std::vector<int> nodes;
  for (int node = 0; node < kMaxNodes; ++node) {
    if (mask[node / kBits] >> (node % kBits) & 1UL) nodes.push_back(node);
  }
  return {policy, nodes};
}

void query_pages(void** pages, std::size_t count, int* nodes) {
  if (syscall(SYS_move_pages, 0, count, pages, nullptr, nodes, 0) < 0) fail("move_pages");
}

void move_pages_to(void** pages, std::size_t count, const int* targets) {
  constexpr int kMove = 1 << 1;  // MPOL_MF_MOVE: pages that only this process maps
  std::vector<int> status(count);
  // If a target is full, the kernel returns ENOMEM or a count of pages not moved: not an error, the caller checks
  // again. The kernel allocates on exactly this node (__GFP_THISNODE), so it reclaims page cache there but never starts
  // the OOM killer.
  if (syscall(SYS_move_pages, 0, count, pages, targets, status.data(), kMove) < 0 && errno != ENOMEM &&
      errno != EBUSY) {
    fail("move_pages");
  }
}

HugeScan::HugeScan() : pagemap_(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)) {}

HugeScan::~HugeScan() {
  if (pagemap_ >= 0) close(pagemap_);
}

std::vector<std::pair<std::uintptr_t, std::uintptr_t>> HugeScan::find(std::uintptr_t address, std::size_t bytes) const {
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> found;
  std::array<ScanRegion, 64> regions;
  std::uintptr_t at = address;
  while (pagemap_ >= 0 && at < address + bytes) {
    ScanArgument argument{};
    argument.size = sizeof argument;
    argument.start = at;
    argument.end = address + bytes;
    argument.vec = reinterpret_cast<std::uintptr_t>(regions.data());
    argument.vec_len = regions.size();
    argument.category_mask = kIsPresent | kIsHuge;  // both
    argument.return_mask = kIsHuge;
    const int count = ioctl(pagemap_, kPagemapScan, &argument);
    if (count < 0) return {};
    for (int i = 0; i < count; ++i) found.emplace_back(regions[i].start, regions[i].end);
    if (argument.walk_end <= at) break;
    at = argument.walk_end;
  }
  return found;
}

std::vector<int> nodes_of_pages(std::uintptr_t address, std::size_t bytes) {
  const std::size_t page = page_size();
  const std::uintptr_t first = address / page * page;
  const std::size_t count = bytes == 0 ? 0 : (address + bytes - first + page - 1) / page;
  std::vector<int> nodes(count);
  // The kernel copies pointers and answers in small batches anyway; a bounded batch here keeps memory use small.
  constexpr std::size_t kBatch = 1 << 16;
  std::vector<void*> pages(std::min(count, kBatch));
  for (std::size_t done = 0; done < count; done += kBatch) {
    const std::size_t n = std::min(kBatch, count - done);
    for (std::size_t i = 0; i < n; ++i) pages[i] = reinterpret_cast<void*>(first + (done + i) * page);
    query_pages(pages.data(), n, nodes.data() + done);
    for (std::size_t i = 0; i < n; ++i) nodes[done + i] = std::max(nodes[done + i], -1);
  }
  return nodes;
}

}  // namespace ldft
