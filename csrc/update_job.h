// An update of many parameters by threads beside the program, which waits for single parameters.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <vector>

#include "threads.h"
#include "update.h"

namespace ldft {

// Used by one thread of the program: add(), start(), then wait() and the others. The parameters' memory must stay until
// this object ends.
class UpdateJob {
 public:
  struct Progress {
    double seconds = 0;      // from the start to the end of the last piece, without pauses
    double waited_s = 0;     // of the program in wait() and finish()
    std::size_t bytes = 0;   // read and written so far
    std::size_t beside = 0;  // those of them that were moved while the program did not wait
  };

  UpdateJob() = default;
  ~UpdateJob() { cancel(); }

  // One more parameter, after those that are there: parameters are updated in this order. Returns its number.
  std::size_t add(const Rule& rule, const Partition& partition);

  // Start up to `threads` threads at this nice value; with 0 threads, wait() and finish() do all work.
  void start(std::size_t threads, int nice);

  // Return when a parameter, or all of them, are updated and their new values visible to this thread. Meanwhile the
  // calling thread takes part in the work. Ends a pause.
  void wait(std::size_t parameter);
  void finish();

  // Stop after the pieces in progress, and return when these have ended; go on.
  void pause();
  void resume();

  // Stop for good: what is not updated yet stays as it is.
  void cancel();

  bool done();
  Progress progress();

 private:
  using Clock = std::chrono::steady_clock;
  struct Task {
    Rule rule;
    Partition partition;
    std::size_t pieces;  // not finished
  };
  struct Piece {
    std::size_t task, from, end;
  };

  bool take(Piece& piece, bool waits);
  void process(const Piece& piece);
  void work();
  template <typename Condition>
  void help_until(Condition reached);

  std::vector<Task> tasks_;
  std::vector<Piece> pieces_;
  std::mutex mutex_;  // for everything below
  std::condition_variable changed_;
  std::size_t next_ = 0, unfinished_ = 0, active_ = 0;
  bool paused_ = false, cancelled_ = false, started_ = false;
  Clock::time_point running_since_;
  Progress progress_;
  std::size_t waited_bytes_ = 0;  // moved while the program waited
  Threads threads_;
};

}  // namespace ldft
