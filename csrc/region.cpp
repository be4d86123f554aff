#include "region.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <system_error>

#include "system.h"
#include "touch.h"

namespace ldft {
namespace {

std::atomic<std::size_t> live_regions{0}, live_bytes{0}, live_ranges{0};
std::mutex starts_mutex;
std::set<std::uintptr_t>& starts() {  // never destroyed: regions may be released while the process exits
  static auto* set = new std::set<std::uintptr_t>;
  return *set;
}
std::atomic<unsigned> generation{0};  // number of forks from the first process to this one

// A forked child increments the generation and gets an unlocked mutex. A fork(2) by any library runs this; a bare
// clone(2) does not.
void watch_forks() {
  static const int registered = pthread_atfork([] { starts_mutex.lock(); }, [] { starts_mutex.unlock(); },
                                               [] {
                                                 ++generation;
                                                 starts_mutex.unlock();
                                               });
  if (registered != 0) throw std::system_error(registered, std::generic_category(), "pthread_atfork");
}

// The kernel frees page by page: above this size several threads are faster than one.
constexpr std::size_t kParallelRelease = std::size_t{256} << 20;

}  // namespace

std::size_t huge_page_size() {
  static const std::size_t size = [] {
    char mode[128] = "";
    unsigned long long bytes = 0;
    if (FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r")) {
      if (std::fgets(mode, sizeof mode, file) == nullptr) mode[0] = '\0';
      std::fclose(file);
    }
    if (std::strstr(mode, "[always]") == nullptr && std::strstr(mode, "[madvise]") == nullptr) return std::size_t{0};
    if (FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "r")) {
      if (std::fscanf(file, "%llu", &bytes) != 1) bytes = 0;
      std::fclose(file);
    }
    // Use it only if it is a power of two above the page size, as expected.
    return bytes > page_size() && (bytes & (bytes - 1)) == 0 ? static_cast<std::size_t>(bytes) : std::size_t{0};
  }();
  return size;
}

Region::Region(std::size_t bytes, bool huge) {
  watch_forks();
  const std::size_t page = page_size();
  const std::size_t unit = huge ? huge_page_size() : 0;
  if (bytes == 0 || bytes > SIZE_MAX / 2) throw std::system_error(EINVAL, std::generic_category(), "size of a region");
  bytes_ = (bytes + page - 1) / page * page;
  // Do not align a range that is smaller than a huge page.
  const std::size_t align = unit != 0 && bytes_ >= unit ? unit : page;
  const std::size_t length = bytes_ + align - page;
  void* mapped = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  const auto start = reinterpret_cast<std::uintptr_t>(mapped);
  address_ = (start + align - 1) / align * align;
  // Free the excess reserved for alignment at once, so that bytes() is all that is reserved.
  if (address_ > start) munmap(mapped, address_ - start);
  const std::uintptr_t end = address_ + bytes_;
  if (start + length > end) munmap(reinterpret_cast<void*>(end), start + length - end);
  // Also needed to opt out: if the machine gives every process huge pages, a region must refuse them explicitly.
  const int advice = align > page ? MADV_HUGEPAGE : MADV_NOHUGEPAGE;
  try {
    const std::lock_guard<std::mutex> lock(starts_mutex);
    starts().insert(address_);
  } catch (...) {
    munmap(reinterpret_cast<void*>(address_), bytes_);
    throw;
  }
  huge_ = madvise(reinterpret_cast<void*>(address_), bytes_, advice) == 0 && align > page;
  generation_ = generation;
  count(+1);
}

void Region::count(std::ptrdiff_t sign) noexcept {
  live_regions += static_cast<std::size_t>(sign);
  live_bytes += static_cast<std::size_t>(sign) * bytes_;
  live_ranges += static_cast<std::size_t>(sign) * ranges_;
}

void Region::place(int policy, const std::vector<int>& nodes) { bind_range(address_, bytes_, policy, nodes); }

void Region::place_ranges(const std::vector<Range>& ranges) {
  live_ranges += ranges.size() - ranges_;
  ranges_ = ranges.size();
  for (const Range& range : ranges) {
    if (range.offset > bytes_ || range.bytes > bytes_ - range.offset) {
      throw std::system_error(EINVAL, std::generic_category(), "range outside its region");
    }
    bind_range(address_ + range.offset, range.bytes, kPreferred, {range.node});
  }
}

void Region::hide_from_children() {
  if (madvise(reinterpret_cast<void*>(address_), bytes_, MADV_DONTFORK) != 0) {
    throw std::system_error(errno, std::generic_category(), "madvise(MADV_DONTFORK)");
  }
  hidden_ = true;
}

bool Region::inherited() const noexcept { return generation_ != generation; }

void Region::release() noexcept {
  const std::uintptr_t address = address_;
  const std::size_t bytes = bytes_;
  if (address == 0) return;
  // Forget it first: once it is unmapped, another thread's region may start at the same address.
  abandon();
  if (hidden_ && inherited()) return;
  if (bytes >= kParallelRelease) discard(address, bytes);
  munmap(reinterpret_cast<void*>(address), bytes);
}

void Region::abandon() noexcept {
  if (address_ == 0) return;
  {
    const std::lock_guard<std::mutex> lock(starts_mutex);
    starts().erase(address_);
  }
  count(-1);
  address_ = 0;
  bytes_ = 0;
}

bool is_live(std::uintptr_t address) {
  const std::lock_guard<std::mutex> lock(starts_mutex);
  return starts().count(address) > 0;
}

Usage usage() noexcept { return {live_regions, live_bytes, live_ranges}; }

}  // namespace ldft
