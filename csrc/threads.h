// Runs one piece of work on several threads.
#pragma once

#include <cstddef>
#include <functional>

namespace ldft {

// Call work(0) to work(count - 1) concurrently and return when all have ended: work(own) on the calling thread, the
// others on a new one; with own >= count, the caller only waits. If no more threads can be started, fewer calls are
// made, and at least one, so each call must go on until nothing is left to do. `work` must not throw.
void run_threads(std::size_t count, std::size_t own, const std::function<void(std::size_t)>& work);

}  // namespace ldft
