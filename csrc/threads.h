// Runs one piece of work on several threads.
#pragma once

#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

namespace ldft {

// Threads that each call one function. They leave signals to the program's own threads, and are joined at the latest
// when this object ends.
class Threads {
 public:
  Threads() = default;
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  ~Threads() { join(); }

  // Start up to `count` threads, the t-th with work(t): fewer where the system refuses more. `work` must not throw, and
  // must go on until nothing is left to do.
  void start(std::size_t count, std::function<void(std::size_t)> work);
  std::size_t count() const { return threads_.size(); }
  void join();

 private:
  std::vector<std::thread> threads_;
};

// Call work(0) to work(count - 1) concurrently and return when all have ended: work(own) on the calling thread, the
// others on a new one; with own >= count, the caller only waits. If no more threads can be started, fewer calls are
// made, and at least one, so each call must go on until nothing is left to do. `work` must not throw.
void run_threads(std::size_t count, std::size_t own, const std::function<void(std::size_t)>& work);

}  // namespace ldft
