#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <exception>

namespace ldft {

void Threads::start(std::size_t count, std::function<void(std::size_t)> work) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    threads_.reserve(threads_.size() + count);
    for (std::size_t t = 0; t < count; ++t) threads_.emplace_back([work, t] { work(t); });
  } catch (const std::exception&) {  // a limit on processes or memory: the threads already started do all the work
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Threads::join() {
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void run_threads(std::size_t count, std::size_t own, const std::function<void(std::size_t)>& work) {
  Threads others;
  const std::size_t wanted = own < count ? count - 1 : count;
  others.start(wanted, [&work, own](std::size_t t) { work(t < own ? t : t + 1); });
  if (own < count) {
    work(own);
  } else if (others.count() == 0 && count > 0) {
    work(0);
  }
}

}  // namespace ldft
