#include "touch.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "region.h"
#include "system.h"
#include "threads.h"

namespace ldft {
namespace {

// Small enough that the last pieces end together, large enough that handing them out costs nothing: for touching, a
// huge page of the most common size (0.2 ms); for work that takes less time per byte, more.
constexpr std::size_t kTouchPiece = std::size_t{2} << 20;
constexpr std::size_t kPiece = std::size_t{8} << 20;
// Starting a thread takes about as long as clearing this many bytes.
constexpr std::size_t kWorthAThread = std::size_t{2} << 20;

struct Piece {
  std::uintptr_t address;
  std::size_t bytes;
  int node;
};

std::vector<Piece> cut(std::uintptr_t base, const std::vector<Range>& ranges, std::size_t size) {
  std::vector<Piece> pieces;
  for (const Range& range : ranges) {
    for (std::size_t done = 0; done < range.bytes; done += size) {
      pieces.push_back({base + range.offset + done, std::min(size, range.bytes - done), range.node});
    }
  }
  return pieces;
}

// A thread that cannot be bound (CPU taken offline, or outside the cpuset) works where it is: slower, but equally
// correct.
void run_on(const std::vector<int>& cpus) {
  if (cpus.empty()) return;
  const int highest = *std::max_element(cpus.begin(), cpus.end());
  cpu_set_t* set = CPU_ALLOC(highest + 1);
  if (set == nullptr) return;
  const std::size_t size = CPU_ALLOC_SIZE(highest + 1);
  CPU_ZERO_S(size, set);
  for (int cpu : cpus) CPU_SET_S(cpu, size, set);
  sched_setaffinity(0, size, set);
  CPU_FREE(set);
}

bool may_run_here(const std::vector<int>& cpus) {
  return cpus.empty() || std::find(cpus.begin(), cpus.end(), sched_getcpu()) != cpus.end();
}

struct Queue {
  std::vector<Piece> pieces;
  std::atomic<std::size_t> next{0};
};

// Calls work(thread, piece) for every piece of every group, of at most `size` bytes, and returns when all is done.
// Throws what the first failing call threw. If threads cannot be started, fewer do the work, down to the calling one.
using Work = std::function<void(std::size_t, const Piece&)>;
void share_out(std::uintptr_t base, const std::vector<Group>& groups, std::size_t size, const Work& work) {
  std::vector<std::unique_ptr<Queue>> queues;
  std::vector<std::size_t> home;  // the group of each thread
  for (std::size_t g = 0; g < groups.size(); ++g) {
    queues.push_back(std::make_unique<Queue>());
    queues[g]->pieces = cut(base, groups[g].ranges, size);
    std::size_t bytes = 0;
    for (const Piece& piece : queues[g]->pieces) bytes += piece.bytes;
    const std::size_t useful = std::min({groups[g].threads, bytes / kWorthAThread, queues[g]->pieces.size()});
    if (bytes > 0) home.insert(home.end(), std::max<std::size_t>(1, useful), g);
  }
  std::mutex failing;
  std::exception_ptr failure;
  const auto serve = [&](std::size_t thread) {
    try {
      for (std::size_t turn = 0; turn < queues.size(); ++turn) {
        Queue& queue = *queues[(home[thread] + turn) % queues.size()];
        for (std::size_t i = queue.next++; i < queue.pieces.size(); i = queue.next++) work(thread, queue.pieces[i]);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failing);
      if (!failure) failure = std::current_exception();
    }
  };
  // If the caller already runs on one of their CPUs, it is one of the threads: a waiting caller would only be woken
  // last. It does everything if there is too little work for threads: the policy decides placement, not the CPU.
  std::size_t own = 0;
  while (home.size() > 1 && own < home.size() && !may_run_here(groups[home[own]].cpus)) ++own;
  const std::thread::id caller = std::this_thread::get_id();
  run_threads(home.size(), own, [&](std::size_t thread) {
    if (std::this_thread::get_id() != caller) run_on(groups[home[thread]].cpus);
    serve(thread);
  });
  if (failure) std::rethrow_exception(failure);
}

std::size_t total(const std::vector<Range>& ranges) {
  std::size_t bytes = 0;
  for (const Range& range : ranges) bytes += range.bytes;
  return bytes;
}

}  // namespace

void touch(std::uintptr_t base, const std::vector<Group>& groups) {
  const std::size_t page = page_size();
  share_out(base, groups, kTouchPiece, [page](std::size_t, const Piece& piece) {
    auto* byte = reinterpret_cast<volatile unsigned char*>(piece.address);
    for (std::size_t at = 0; at < piece.bytes; at += page) byte[at] = 0;
  });
}

Census census(std::uintptr_t base, const std::vector<Range>& ranges, std::size_t threads) {
  const std::size_t page = page_size();
  const std::size_t huge = huge_page_size();
  const HugeScan scan;
  threads = std::max<std::size_t>(1, std::min(threads, total(ranges) / kPiece));
  std::vector<Census> parts(threads);
  share_out(base, {Group{ranges, {}, threads}}, kPiece, [&](std::size_t thread, const Piece& piece) {
    // Query every page, or of a huge page only the first base page, which represents the rest.
    std::vector<void*> pages;
    std::vector<std::size_t> counts;
    const auto ask = [&](std::uintptr_t from, std::uintptr_t to, std::size_t step) {
      for (; from < to; from += step) {
        pages.push_back(reinterpret_cast<void*>(from));
        counts.push_back(std::min(step, to - from) / page);
      }
    };
    std::uintptr_t at = piece.address;
    const std::uintptr_t end = piece.address + piece.bytes;
    if (huge > 0 && piece.bytes >= huge) {
      for (const auto& [start, stop] : scan.find(piece.address, piece.bytes)) {
        const std::uintptr_t first = std::max(at, (start + huge - 1) / huge * huge);
        const std::uintptr_t last = std::min(stop, end) / huge * huge;
        if (first >= last) continue;
        ask(at, first, page);
        ask(first, last, huge);
        at = last;
      }
    }
    ask(at, end, page);
    std::vector<int> nodes(pages.size());
    query_pages(pages.data(), pages.size(), nodes.data());
    Census& part = parts[thread];
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      if (nodes[i] < 0) {
        part.absent += counts[i];
        continue;
      }
      const auto node = static_cast<std::size_t>(nodes[i]);
      if (node >= part.pages.size()) part.pages.resize(node + 1);
      part.pages[node] += counts[i];
      if (piece.node >= 0 && nodes[i] != piece.node) part.misplaced += counts[i];
    }
  });
  Census sum;
  for (const Census& part : parts) {
    sum.absent += part.absent;
    sum.misplaced += part.misplaced;
    if (part.pages.size() > sum.pages.size()) sum.pages.resize(part.pages.size());
    for (std::size_t node = 0; node < part.pages.size(); ++node) sum.pages[node] += part.pages[node];
  }
  return sum;
}

void bring_home(std::uintptr_t base, const std::vector<Range>& ranges) {
  const std::size_t page = page_size();
  for (const Piece& piece : cut(base, ranges, kPiece)) {
    if (piece.node < 0) continue;
    const std::vector<int> nodes = nodes_of_pages(piece.address, piece.bytes);
    std::vector<void*> pages;
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      if (nodes[i] >= 0 && nodes[i] != piece.node) pages.push_back(reinterpret_cast<void*>(piece.address + i * page));
    }
    if (pages.empty()) continue;
    const std::vector<int> targets(pages.size(), piece.node);
    move_pages_to(pages.data(), pages.size(), targets.data());
    // Moved pages are on their node, split ones may be gone. If no page changed, the node is full.
    const std::vector<int> now = nodes_of_pages(piece.address, piece.bytes);
    const auto stayed =
        std::count_if(now.begin(), now.end(), [&](int node) { return node >= 0 && node != piece.node; });
    if (static_cast<std::size_t>(stayed) == pages.size()) return;
  }
}

void discard(std::uintptr_t address, std::size_t bytes) noexcept {
  try {
    const std::size_t threads = std::min<std::size_t>(16, std::max(1u, std::thread::hardware_concurrency()));
    share_out(address, {Group{{{0, bytes, -1}}, {}, threads}}, kPiece, [](std::size_t, const Piece& piece) {
      madvise(reinterpret_cast<void*>(piece.address), piece.bytes, MADV_DONTNEED);
    });
  } catch (const std::exception&) {  // no memory for the lists: munmap frees everything
  }
}

}  // namespace ldft
