#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastmask {
namespace {

// About 20 us: long enough for the next op of a forward pass, short enough to leave the core to others.
constexpr int kSpins = 1000;

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

struct Pool {
  std::atomic<bool> taken{false};
  std::atomic<uint64_t> generation{0};  // of the job that is posted
  std::atomic<int64_t> next{0};         // task that nobody has begun
  std::atomic<int64_t> running{0};      // workers within the job
  int64_t seats = 0;                    // workers that may still join it
  int64_t workers = 0;
  int64_t tasks = 0;
  void (*body)(void*, int64_t) = nullptr;
  void* context = nullptr;
  std::mutex mutex;
  std::condition_variable posted, left;

  void drain() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, i);
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && generation.load(std::memory_order_acquire) == seen; i++) pause_briefly();
      std::unique_lock<std::mutex> lock(mutex);
      posted.wait(lock, [&] { return generation.load() != seen; });
      seen = generation.load();
      if (seats == 0) continue;
      seats--;
      running.fetch_add(1);
      lock.unlock();
      drain();
      lock.lock();
      if (running.fetch_sub(1) == 1) left.notify_one();
    }
  }

  // Threads are never joined: they wait until the process ends.
  void grow(int64_t wanted) {
    try {
      for (; workers < wanted; workers++) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {
      // A machine that gives no more threads runs the tasks on those there are.
    }
  }

  void run(int64_t count, int64_t threads, void (*function)(void*, int64_t), void* argument) {
    grow(std::min(threads, count) - 1);
    {
      std::lock_guard<std::mutex> lock(mutex);
      tasks = count;
      body = function;
      context = argument;
      next.store(0);
      seats = std::min(threads - 1, count - 1);
      generation.fetch_add(1);
    }
    posted.notify_all();
    drain();
    for (int i = 0; i < kSpins && running.load(std::memory_order_acquire) != 0; i++) pause_briefly();
    std::unique_lock<std::mutex> lock(mutex);
    seats = 0;
    left.wait(lock, [&] { return running.load() == 0; });
  }
};

std::atomic<Pool*> pool{nullptr};

// GOMP_parallel: calls a function with an argument on each thread of a team of at most so many.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> borrowed{nullptr};

// One call's tasks, dealt to threads that are not ours.
struct Dealt {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  void (*body)(void*, int64_t);
  void* context;
  void drain() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, i);
  }
};

Pool* the_pool() {
  static std::mutex making;
  // A child of fork has none of its parent's threads and perhaps its locks: it starts with a pool of its own.
  static const int registered = pthread_atfork(
      [] { making.lock(); }, [] { making.unlock(); },
      [] {
        making.unlock();
        pool.store(nullptr);
      });
  (void)registered;
  Pool* found = pool.load(std::memory_order_acquire);
  if (found != nullptr) return found;
  std::lock_guard<std::mutex> lock(making);
  if (pool.load() == nullptr) pool.store(new Pool);
  return pool.load();
}

}  // namespace

void borrow(uintptr_t parallel) {
  // GNU's runtime waits for ever in a child of fork whose parent had a team: there the pool takes over.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { borrowed.store(nullptr); });
  (void)registered;
  borrowed.store(reinterpret_cast<Parallel>(parallel));
}

void run(int64_t tasks, int64_t threads, void (*body)(void*, int64_t), void* context) {
  if (tasks > 1 && threads > 1) {
    if (Parallel parallel = borrowed.load(std::memory_order_acquire)) {
      Dealt dealt;
      dealt.tasks = tasks;
      dealt.body = body;
      dealt.context = context;
      parallel([](void* all) { static_cast<Dealt*>(all)->drain(); }, &dealt, unsigned(std::min(threads, tasks)), 0);
      return;
    }
    Pool* p = the_pool();
    if (!p->taken.exchange(true, std::memory_order_acquire)) {
      p->run(tasks, threads, body, context);
      p->taken.store(false, std::memory_order_release);
      return;
    }
  }
  for (int64_t i = 0; i < tasks; i++) body(context, i);
}

}  // namespace fastmask
