#include "system.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace ldft {

std::size_t page_size() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

std::vector<int> nodes_of_pages(std::uintptr_t address, std::size_t bytes) {
  const std::size_t page = page_size();
  const std::uintptr_t first = address / page * page;
  const std::size_t count = bytes == 0 ? 0 : (address + bytes - first + page - 1) / page;
  std::vector<int> nodes(count);
  // The kernel copies pointers and answers in small batches anyway; a bounded one here keeps our own memory small.
  constexpr std::size_t kBatch = 1 << 16;
  std::vector<void*> pages(std::min(count, kBatch));
  for (std::size_t done = 0; done < count; done += kBatch) {
    const std::size_t n = std::min(kBatch, count - done);
    for (std::size_t i = 0; i < n; ++i) pages[i] = reinterpret_cast<void*>(first + (done + i) * page);
    if (syscall(SYS_move_pages, 0, n, pages.data(), nullptr, nodes.data() + done, 0) < 0) {
      throw std::system_error(errno, std::generic_category(), "move_pages");
    }
    // A page without a node answers with a negative errno (-ENOENT: not touched; -EFAULT: zero page or no mapping).
    for (std::size_t i = 0; i < n; ++i) nodes[done + i] = std::max(nodes[done + i], -1);
  }
  return nodes;
}

}  // namespace ldft
