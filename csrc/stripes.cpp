#include "stripes.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace ldft {
namespace {

void append(std::vector<Range>& ranges, std::size_t bytes, int node) {
  if (bytes == 0) return;
  if (!ranges.empty() && ranges.back().node == node) {
    ranges.back().bytes += bytes;
    return;
  }
  const std::size_t offset = ranges.empty() ? 0 : ranges.back().offset + ranges.back().bytes;
  ranges.push_back({offset, bytes, node});
}

}  // namespace

std::vector<std::size_t> apportion(std::size_t pages, const std::vector<std::uint64_t>& weights) {
  const std::uint64_t sum = std::accumulate(weights.begin(), weights.end(), std::uint64_t{0});
  if (sum == 0) throw std::invalid_argument("weights sum to zero");
  std::vector<std::size_t> share(weights.size());
  std::vector<std::size_t> order(weights.size());
  std::size_t given = 0;
  const auto remainder = [&](std::size_t i) { return static_cast<std::uint64_t>(pages % sum) * weights[i] % sum; };
  for (std::size_t i = 0; i < weights.size(); ++i) {
    // pages * weight without overflow: whole cycles first, then the partial cycle.
    share[i] = pages / sum * weights[i] + pages % sum * weights[i] / sum;
    given += share[i];
    order[i] = i;
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return remainder(a) > remainder(b); });
  for (std::size_t i = 0; given < pages; ++i, ++given) ++share[order[i]];
  return share;
}

std::size_t stripe_bytes(std::size_t bytes, std::size_t unit, std::size_t max_ranges) {
  std::size_t stripe = unit;
  while (bytes / stripe > max_ranges) stripe *= 2;
  return stripe;
}

// Every node first gets its exact number of pages, then as many whole stripes as fit in that number. The whole stripes
// are mixed; the rest of each node's pages, less than a stripe, follows at the end as one piece per node. So
// shares are exact to one page whatever the stripe, and the stripe decides only how fine the mixture is.
//
// The order of the stripes is Tijdeman's solution of the chairman assignment problem (R. Tijdeman, "The chairman
// assignment problem", Discrete Mathematics 32, 1980): after k stripes every node has its share of k to less than one
// stripe. Plain "largest deficit first" does not promise that for three or more nodes.
std::vector<Range> make_stripes(std::size_t bytes, std::size_t page, std::size_t stripe, const std::vector<int>& nodes,
                                const std::vector<std::uint64_t>& weights) {
  if (nodes.empty() || nodes.size() != weights.size()) throw std::invalid_argument("one weight per node is needed");
  if (page == 0 || bytes % page != 0 || stripe < page || stripe % page != 0)
    throw std::invalid_argument("not a whole number of pages");
  const std::vector<std::size_t> pages = apportion(bytes / page, weights);
  const std::size_t n = nodes.size();
  std::vector<std::int64_t> quota(n), used(n, 0);
  std::int64_t total = 0;
  for (std::size_t i = 0; i < n; ++i) {
    quota[i] = static_cast<std::int64_t>(pages[i] * page / stripe);
    total += quota[i];
  }
  std::vector<Range> ranges;
  const std::int64_t m = std::max<std::int64_t>(1, 2 * static_cast<std::int64_t>(n) - 2);
  for (std::int64_t k = 1; k <= total; ++k) {
    std::size_t best = n;
    double earliest = 0;
    for (std::size_t i = 0; i < n; ++i) {
      if (used[i] == quota[i]) continue;
      const std::int64_t behind = quota[i] * k - used[i] * total;  // stripes behind, times total
      if (n > 1 && m * behind < total) continue;                   // not its turn yet
      const double deadline = static_cast<double>((m - 1) * total - m * behind) / static_cast<double>(quota[i]);
      if (best == n || deadline < earliest) {
        best = i;
        earliest = deadline;
      }
    }
    if (best == n) throw std::logic_error("no node is due a stripe");
    ++used[best];
    append(ranges, stripe, nodes[best]);
  }
  for (std::size_t i = 0; i < n; ++i) append(ranges, pages[i] * page - quota[i] * stripe, nodes[i]);
  return ranges;
}

}  // namespace ldft
