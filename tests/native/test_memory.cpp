// Tests the native memory code without Python: built with sanitizers and run by test_sanitizers.py.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <system_error>
#include <thread>

#include "check.h"
#include "region.h"
#include "stripes.h"
#include "system.h"
#include "touch.h"

namespace {

using ldft::Range;
using ldft::Region;

const std::size_t kPage = ldft::page_size();

// Whether the kernel has a mapping at the address: asked of the kernel, not of our bookkeeping.
bool mapped(std::uintptr_t address) {
  unsigned char vec;
  return mincore(reinterpret_cast<void*>(address), kPage, &vec) == 0;
}

std::vector<int> my_nodes() {
  std::vector<int> nodes;
  for (int node = 0; node < 64; ++node) {
    char path[64];
    std::snprintf(path, sizeof path, "/sys/devices/system/node/node%d", node);
    if (access(path, F_OK) == 0) nodes.push_back(node);
  }
  return nodes;
}

void shares_are_exact_to_one_page() {
  std::mt19937_64 random(1);
  for (int round = 0; round < 2000; ++round) {
    const std::size_t pages = random() % 100000;
    std::vector<std::uint64_t> weights(1 + random() % 6);
    for (auto& weight : weights) weight = random() % 300;
    weights[random() % weights.size()] += 1;
    const auto parts = ldft::apportion(pages, weights);
    const std::uint64_t sum = std::accumulate(weights.begin(), weights.end(), std::uint64_t{0});
    CHECK(std::accumulate(parts.begin(), parts.end(), std::size_t{0}) == pages);
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const double exact = static_cast<double>(pages) * static_cast<double>(weights[i]) / static_cast<double>(sum);
      CHECK(std::abs(static_cast<double>(parts[i]) - exact) < 1.0);
    }
  }
}

void stripes_cover_and_mix() {
  const std::vector<std::vector<std::uint64_t>> all = {
      {1}, {1, 2}, {5, 2}, {1, 2, 3}, {255, 1}, {7, 0, 3}, {1, 1, 1, 1}, {9, 7, 5, 3, 2, 1}, {1, 1000000}};
  for (const auto& weights : all) {
    std::vector<int> nodes(weights.size());
    std::iota(nodes.begin(), nodes.end(), 0);
    for (const std::size_t pages : {0UL, 1UL, 5UL, 511UL, 4096UL, 4097UL, 65536UL}) {
      const std::size_t stripe = 16 * kPage;
      const auto ranges = ldft::make_stripes(pages * kPage, kPage, stripe, nodes, weights);
      const auto exact = ldft::apportion(pages, weights);
      std::vector<std::size_t> got(nodes.size(), 0);
      std::size_t at = 0;
      std::size_t whole = 0;  // stripes in the mixed part: the remainders follow it
      for (const std::size_t part : exact) whole += part / 16;
      for (const Range& range : ranges) {
        CHECK(range.offset == at && range.bytes > 0 && range.bytes % kPage == 0);
        // While stripes are mixed, no node is a whole stripe off its share of what is laid out so far.
        for (std::size_t done = 0; done < range.bytes; done += stripe) {
          const std::size_t laid = (range.offset + done) / stripe;
          if (laid >= whole) break;
          for (std::size_t i = 0; i < nodes.size(); ++i) {
            const double due =
                static_cast<double>(laid) * static_cast<double>(exact[i] / 16) / static_cast<double>(whole);
            const std::size_t here = got[i] + (nodes[i] == range.node ? done : 0);
            CHECK(std::abs(static_cast<double>(here) / static_cast<double>(stripe) - due) < 1.0);
          }
        }
        got[range.node] += range.bytes;
        at += range.bytes;
      }
      CHECK(at == pages * kPage);
      for (std::size_t i = 0; i < nodes.size(); ++i) CHECK(got[i] == exact[i] * kPage);
    }
  }
}

void stripe_count_is_bounded() {
  const std::size_t unit = std::size_t{2} << 20;
  for (const std::size_t gib : {1UL, 8UL, 64UL, 512UL, 4096UL}) {
    const std::size_t bytes = gib << 30;
    const std::size_t stripe = ldft::stripe_bytes(bytes, unit, 4096);
    CHECK(bytes / stripe <= 4096 && stripe % unit == 0 && (stripe == unit || bytes / stripe > 2048));
    CHECK(ldft::make_stripes(bytes, kPage, stripe, {0, 3}, {1, 2}).size() <= 4096 + 2);
  }
}

void a_region_is_whole_pages_and_zero() {
  const std::size_t huge = ldft::huge_page_size();
  for (const bool want : {false, true}) {
    for (const std::size_t bytes : {std::size_t{1}, kPage, kPage + 1, std::size_t{1} << 20, std::size_t{5 << 20} + 1}) {
      Region region(bytes, want);
      CHECK(region.bytes() == (bytes + kPage - 1) / kPage * kPage);
      CHECK(region.address() % kPage == 0);
      if (want && huge > 0 && bytes >= huge) CHECK(region.address() % huge == 0 && region.huge());
      const std::vector<Range> all = {{0, region.bytes(), -1}};
      CHECK(ldft::census(region.address(), all, 2).absent == region.bytes() / kPage);
      ldft::touch(region.address(), {{all, {}, 3}});
      const ldft::Census census = ldft::census(region.address(), all, 2);
      CHECK(census.absent == 0);
      CHECK(std::accumulate(census.pages.begin(), census.pages.end(), std::size_t{0}) == region.bytes() / kPage);
      const auto* memory = reinterpret_cast<const unsigned char*>(region.address());
      for (std::size_t i = 0; i < region.bytes(); ++i) CHECK(memory[i] == 0);
      std::memset(reinterpret_cast<void*>(region.address()), 0xff, region.bytes());  // all of it is ours to write
    }
  }
}

void nothing_stays_mapped() {
  const ldft::Usage before = ldft::usage();
  for (const std::size_t bytes : {std::size_t{3} * kPage, std::size_t{5} << 20, std::size_t{300} << 20}) {
    Region region(bytes, true);
    const std::uintptr_t first = region.address(), last = first + region.bytes() - kPage;
    ldft::touch(first, {{{{0, std::min(bytes, std::size_t{8} << 20), -1}}, {}, 2}});
    CHECK(mapped(first) && mapped(last) && ldft::is_live(first));
    region.release();
    CHECK(!mapped(first) && !mapped(last) && !ldft::is_live(first));
    region.release();  // again: nothing happens
  }
  const ldft::Usage after = ldft::usage();
  CHECK(after.regions == before.regions && after.bytes == before.bytes && after.ranges == before.ranges);
}

// Address space of the process, in pages, as the kernel counts it.
std::size_t address_space() {
  unsigned long pages = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  CHECK(std::fscanf(file, "%lu", &pages) == 1);
  std::fclose(file);
  return pages;
}

void only_what_is_needed_is_reserved() {
  // Alignment takes more address space for a moment, and gives it back.
  std::vector<std::unique_ptr<Region>> held;
  held.reserve(64);
  const std::size_t bytes = (std::size_t{5} << 20) + kPage;
  held.push_back(std::make_unique<Region>(bytes, true));
  const std::size_t before = address_space();
  for (int i = 0; i < 50; ++i) held.push_back(std::make_unique<Region>(bytes, true));
  const std::size_t grown = address_space() - before;
  // A sanitizer may take some for its own lists; what alignment takes would be 50 times almost 2 MiB.
  CHECK(grown >= 50 * bytes / kPage && grown < 50 * bytes / kPage + 1024);
}

void stripes_are_placed_and_verified() {
  const std::vector<int> nodes = my_nodes();
  const std::vector<std::uint64_t> weights(nodes.size(), 3);
  Region region((std::size_t{24} << 20) + 5 * kPage, true);
  const auto ranges = ldft::make_stripes(region.bytes(), kPage, std::size_t{1} << 20, nodes, weights);
  region.place_ranges(ranges);
  CHECK(ldft::usage().ranges >= ranges.size());
  // Unknown CPUs and more threads than work are no obstacle.
  std::vector<ldft::Group> groups;
  for (const Range& range : ranges) groups.push_back({{range}, {0, 100000}, 50});
  ldft::touch(region.address(), groups);
  ldft::Census census = ldft::census(region.address(), ranges, 4);
  CHECK(census.absent == 0 && census.misplaced == 0);
  // Agrees with the plain query, page by page.
  std::vector<std::size_t> plain(census.pages.size(), 0);
  for (const int node : ldft::nodes_of_pages(region.address(), region.bytes())) ++plain.at(node);
  CHECK(plain == census.pages);
  // A range that wants another node is seen.
  std::vector<Range> elsewhere = ranges;
  elsewhere[0].node = 63;
  CHECK(ldft::census(region.address(), elsewhere, 1).misplaced == elsewhere[0].bytes / kPage);
  ldft::bring_home(region.address(), ranges);
}

void failures_leave_nothing() {
  const ldft::Usage before = ldft::usage();
  const auto throws = [](auto&& call) {
    try {
      call();
    } catch (const std::exception&) {
      return true;
    }
    return false;
  };
  CHECK(throws([] { Region(std::size_t{1} << 46, false); }));
  CHECK(throws([] { Region(0, false); }));
  CHECK(throws([] { Region(SIZE_MAX, true); }));
  {
    Region region(std::size_t{4} << 20, false);
    CHECK(throws([&] { region.place(ldft::kPreferred, {63}); }));
    CHECK(throws([&] { region.place(ldft::kPreferred, {5000}); }));
    CHECK(throws([&] { region.place(99, {0}); }));
    CHECK(throws([&] { region.place_ranges({{0, region.bytes() + kPage, 0}}); }));
    CHECK(throws([&] { region.place_ranges({{0, kPage, 0}, {SIZE_MAX, 2, 0}}); }));
    CHECK(throws([] { ldft::make_stripes(kPage, kPage, kPage, {0}, {}); }));
    CHECK(throws([] { ldft::make_stripes(kPage, kPage, kPage, {0}, {0}); }));
    CHECK(throws([] { ldft::make_stripes(kPage + 1, kPage, kPage, {0}, {1}); }));
  }
  const ldft::Usage after = ldft::usage();
  CHECK(after.regions == before.regions && after.bytes == before.bytes && after.ranges == before.ranges);
}

void children_do_not_harm() {
  Region hidden(std::size_t{4} << 20, true), shared(std::size_t{4} << 20, true);
  for (Region* region : {&hidden, &shared}) std::memset(reinterpret_cast<void*>(region->address()), 7, region->bytes());
  hidden.hide_from_children();
  const pid_t child = fork();
  if (child == 0) {
    const std::uintptr_t address = hidden.address();
    bool good = hidden.inherited() && !mapped(address) && *reinterpret_cast<char*>(shared.address()) == 7;
    // Something else of the child lives where the parent's region is: releasing must leave it alone.
    void* other = mmap(reinterpret_cast<void*>(address), kPage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    good = good && other != MAP_FAILED;
    hidden.release();
    good = good && mapped(address);
    const std::uintptr_t gone = shared.address();
    shared.release();
    good = good && !mapped(gone);
    Region fresh(kPage, false);  // the child can still allocate for itself
    good = good && !fresh.inherited();
    fresh.release();
    _exit(good ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  for (Region* region : {&hidden, &shared}) {
    const auto* memory = reinterpret_cast<const char*>(region->address());
    for (std::size_t i = 0; i < region->bytes(); i += kPage) CHECK(memory[i] == 7);
  }
}

void many_threads_at_once() {
  const ldft::Usage before = ldft::usage();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      std::mt19937_64 random(t);
      std::vector<std::unique_ptr<Region>> held;
      for (int round = 0; round < 150; ++round) {
        auto region = std::make_unique<Region>(1 + random() % (6 << 20), round % 2 == 0);
        ldft::touch(region->address(), {{{{0, region->bytes(), -1}}, {}, 2}});
        CHECK(ldft::is_live(region->address()));
        if (held.size() > 3) held.erase(held.begin() + static_cast<long>(random() % held.size()));
        held.push_back(std::move(region));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(ldft::usage().regions == before.regions && ldft::usage().bytes == before.bytes);
}

}  // namespace

void test_updates();  // test_update.cpp

int main() {
  shares_are_exact_to_one_page();
  stripes_cover_and_mix();
  stripe_count_is_bounded();
  a_region_is_whole_pages_and_zero();
  nothing_stays_mapped();
  only_what_is_needed_is_reserved();
  stripes_are_placed_and_verified();
  failures_leave_nothing();
  children_do_not_harm();
  many_threads_at_once();
  test_updates();
  std::puts("all native tests passed");
}
