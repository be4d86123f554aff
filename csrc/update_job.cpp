#include "update_job.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace ldft {
namespace {

double seconds_between(std::chrono::steady_clock::time_point from, std::chrono::steady_clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

std::size_t UpdateJob::add(const Rule& rule, const Partition& partition) {
  if (started_) throw std::logic_error("the update has started");
  const std::size_t pieces = (partition.count + kPiece - 1) / kPiece;
  tasks_.push_back({rule, partition, pieces});
  for (std::size_t from = 0; from < partition.count; from += kPiece) {
    pieces_.push_back({tasks_.size() - 1, from, std::min(partition.count, from + kPiece)});
  }
  unfinished_ = pieces_.size();
  return tasks_.size() - 1;
}

void UpdateJob::start(std::size_t threads, int nice) {
  if (started_) throw std::logic_error("the update has started");
  started_ = true;
  running_since_ = Clock::now();
  threads_.start(std::min(threads, pieces_.size()), [this, nice](std::size_t) {
    if (nice != 0) setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), nice);
    work();
  });
}

// The next piece to work on. `waits`: if the job pauses, wait until it goes on. False: there is none.
bool UpdateJob::take(Piece& piece, bool waits) {
  std::unique_lock lock(mutex_);
  if (waits) changed_.wait(lock, [this] { return !paused_ || cancelled_; });
  if (cancelled_ || paused_ || next_ == pieces_.size()) return false;
  piece = pieces_[next_++];
  ++active_;
  return true;
}

void UpdateJob::process(const Piece& piece) {
  Task& task = tasks_[piece.task];
  update(task.rule, task.partition, piece.from, piece.end);
  const std::lock_guard lock(mutex_);
  progress_.bytes += traffic(task.rule, task.partition, piece.end - piece.from);
  --active_;
  // Only finished pieces count: whoever sees 0 here sees all new values.
  --task.pieces;
  if (--unfinished_ == 0) progress_.seconds += seconds_between(running_since_, Clock::now());
  if (task.pieces == 0 || active_ == 0) changed_.notify_all();
}

void UpdateJob::work() {
  for (Piece piece; take(piece, true);) process(piece);
}

template <typename Condition>
void UpdateJob::help_until(Condition reached) {
  std::size_t bytes;
  {
    const std::lock_guard lock(mutex_);
    if (!started_ || cancelled_) throw std::logic_error("the update has not started, or was cancelled");
    if (reached()) return;
    bytes = progress_.bytes;
  }
  resume();
  const Clock::time_point began = Clock::now();
  Piece piece;
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (reached()) break;
    }
    if (!take(piece, false)) break;
    process(piece);
  }
  std::unique_lock lock(mutex_);
  changed_.wait(lock, reached);
  progress_.waited_s += seconds_between(began, Clock::now());
  waited_bytes_ += progress_.bytes - bytes;
}

void UpdateJob::wait(std::size_t parameter) {
  help_until([this, parameter] { return tasks_.at(parameter).pieces == 0; });
}

void UpdateJob::finish() {
  help_until([this] { return unfinished_ == 0; });
  threads_.join();
}

void UpdateJob::pause() {
  std::unique_lock lock(mutex_);
  if (paused_ || unfinished_ == 0) return;
  paused_ = true;
  changed_.wait(lock, [this] { return active_ == 0; });
  if (unfinished_ > 0) progress_.seconds += seconds_between(running_since_, Clock::now());
}

void UpdateJob::resume() {
  const std::lock_guard lock(mutex_);
  if (!paused_) return;
  paused_ = false;
  running_since_ = Clock::now();
  changed_.notify_all();
}

void UpdateJob::cancel() {
  {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
    changed_.notify_all();
  }
  threads_.join();
}

bool UpdateJob::done() {
  const std::lock_guard lock(mutex_);
  return unfinished_ == 0;
}

UpdateJob::Progress UpdateJob::progress() {
  const std::lock_guard lock(mutex_);
  Progress now = progress_;
  if (started_ && !paused_ && unfinished_ > 0) now.seconds += seconds_between(running_since_, Clock::now());
  now.beside = now.bytes - waited_bytes_;
  return now;
}

}  // namespace ldft
