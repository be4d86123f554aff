// Threads for one piece of work each.
#pragma once

#include <cstddef>
#include <functional>

namespace ldft {

// Call work(0) to work(count - 1) at once and return when all have ended: work(own) on the calling thread, each other
// on a new one; with own >= count, the caller only waits. Where no more threads can be started, fewer calls are made,
// and at least one, so each call must go on until nothing is left to do. `work` must not throw.
void run_threads(std::size_t count, std::size_t own, const std::function<void(std::size_t)>& work);

}  // namespace ldft
