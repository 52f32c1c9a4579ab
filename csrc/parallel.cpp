#include "parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace tbf {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Whether this is a child that was forked after the module was loaded; ops/native.py says so of one
// that loads it only then.
std::atomic<bool> forked{false};
#if defined(__linux__)
const bool watched = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;
#else
const bool watched = false;
#endif

// The entry of the OpenMP runtime that is in this process, torch's as a rule, or null. Its threads
// spin for a while after torch's own work, and threads of ours would share the cores with them.
// Not in a forked child, where it would wait for threads that only the parent has.
Parallel openmp() {
#if defined(__linux__)
  if (!watched || forked) return nullptr;
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

}  // namespace

void mark_forked() { forked = true; }

void run_parts(int parts, const std::function<void(int)>& part) {
  std::exception_ptr error;
  std::mutex guard;
  std::atomic<int> next{0};
  auto work = [&] {
    for (int n = next++; n < parts; n = next++) {
      try {
        part(n);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(guard);
        if (!error) error = std::current_exception();
      }
    }
  };
  const Parallel parallel = parts > 1 ? openmp() : nullptr;
  if (parallel != nullptr) {
    parallel([](void* run) { (*static_cast<decltype(work)*>(run))(); }, &work, unsigned(parts), 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (int n = 1; n < parts; ++n) others.emplace_back(work);
    } catch (const std::system_error&) {  // no more to be had: those that are do it all
    }
    work();
    for (std::thread& other : others) other.join();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace tbf
