#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <exception>
#include <thread>
#include <vector>

namespace ldft {

void run_threads(std::size_t count, std::size_t own, const std::function<void(std::size_t)>& work) {
  std::vector<std::thread> started;
  // Leave signals to the program's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    started.reserve(count);
    for (std::size_t t = 0; t < count; ++t) {
      if (t != own) started.emplace_back([&work, t] { work(t); });
    }
  } catch (const std::exception&) {  // a limit on processes or memory: the threads already started do all the work
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (own < count) {
    work(own);
  } else if (started.empty() && count > 0) {
    work(0);
  }
  for (std::thread& thread : started) thread.join();
}

}  // namespace ldft
