// The threads behind `#pragma omp`: the process's OpenMP runtime where it has one (as with torch), else threads of our own.
//
// These are the functions that GCC calls for parallel regions, barriers and dynamic loops; nobody outside of this library sees them.
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Region = void (*)(void*);

void pause_once() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

constexpr int SPINS = 2000;  // about 50 microseconds, after which a waiting thread gives its processor away

// The threads of one parallel region.
struct Team {
  int size = 1;
  std::atomic<int> arrived{0};
  std::atomic<unsigned> phase{0};
  std::atomic<long> next{0};  // of a dynamic loop
  std::atomic<unsigned> loops{0};
  long end = 0, step = 1, chunk = 1;
  std::mutex starting;

  void wait() {
    const unsigned now = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(now + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; phase.load(std::memory_order_acquire) == now; ++i) i < SPINS ? pause_once() : (void)sched_yield();
  }
};

thread_local Team* own_team = nullptr;
thread_local int own_rank = 0;
thread_local unsigned own_loops = 0;

void enter(Team& team, int rank, Region region, void* data) {
  Team* const before = own_team;
  const int before_rank = own_rank;
  const unsigned before_loops = own_loops;
  own_team = &team, own_rank = rank, own_loops = 0;
  region(data);
  own_team = before, own_rank = before_rank, own_loops = before_loops;
}

// Workers that wait for a region; one region at a time has them, whoever comes meanwhile works alone.
class Pool {
 public:
  void run(Region region, void* data, int size) {
    Team team;
    if (size < 2 || own_team || gone_.load()) return enter(team, 0, region, data);
    std::unique_lock<std::mutex> turn(busy_, std::try_to_lock);
    if (!turn.owns_lock()) return enter(team, 0, region, data);
    team.size = 1 + grow(size - 1);
    pthread_mutex_lock(&mutex_);
    region_ = region, data_ = data, team_ = &team;
    left_.store(team.size - 1, std::memory_order_release);
    call_.fetch_add(1, std::memory_order_release);
    pthread_cond_broadcast(&woken_);
    pthread_mutex_unlock(&mutex_);
    enter(team, 0, region, data);
    for (int i = 0; left_.load(std::memory_order_acquire) > 0; ++i) i < SPINS ? pause_once() : (void)sched_yield();
    pthread_mutex_lock(&mutex_);
    pthread_mutex_unlock(&mutex_);
  }
  // In a child of fork there are no workers, and locks may be held by threads that are not there.
  void forget() { gone_.store(true); }

 private:
  struct Worker {
    Pool* pool;
    int rank;
    unsigned seen;
  };

  int grow(int wanted) {
    while (int(workers_) < wanted) {
      auto worker = std::make_unique<Worker>(Worker{this, int(workers_) + 1, call_.load(std::memory_order_relaxed)});
      pthread_t thread;
      if (pthread_create(&thread, nullptr, &Pool::work, worker.get()) != 0) break;
      pthread_detach(thread);
      worker.release();
      ++workers_;
    }
    return std::min(int(workers_), wanted);
  }

  static void* work(void* given) {
    const std::unique_ptr<Worker> own(static_cast<Worker*>(given));
    Pool& pool = *own->pool;
    for (unsigned seen = own->seen;;) {
      for (int i = 0; i < SPINS && pool.call_.load(std::memory_order_acquire) == seen; ++i) pause_once();
      pthread_mutex_lock(&pool.mutex_);
      while (pool.call_.load(std::memory_order_acquire) == seen) pthread_cond_wait(&pool.woken_, &pool.mutex_);
      seen = pool.call_.load(std::memory_order_relaxed);
      // A worker that this region does not need may come late, when it is over.
      Team* const team = pool.left_.load(std::memory_order_acquire) > 0 ? pool.team_ : nullptr;
      const bool needed = team && own->rank < team->size;
      const Region region = pool.region_;
      void* const data = pool.data_;
      pthread_mutex_unlock(&pool.mutex_);
      if (!needed) continue;
      enter(*team, own->rank, region, data);
      pthread_mutex_lock(&pool.mutex_);  // for those who watch threads from outside: atomics of ours they do not see
      pool.left_.fetch_sub(1, std::memory_order_acq_rel);
      pthread_mutex_unlock(&pool.mutex_);
    }
  }

  std::mutex busy_;
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t woken_ = PTHREAD_COND_INITIALIZER;
  std::atomic<unsigned> call_{0};
  std::atomic<int> left_{0};
  std::atomic<bool> gone_{false};
  std::atomic<int> workers_{0};
  Region region_ = nullptr;
  void* data_ = nullptr;
  Team* team_ = nullptr;
};

Pool& pool() {
  static Pool* const made = [] {
    Pool* const fresh = new Pool;  // lives as long as its workers do
    pthread_atfork(nullptr, nullptr, [] { pool().forget(); });
    return fresh;
  }();
  return *made;
}

// The functions of the process's own runtime; none where it has not got one.
struct Runtime {
  void (*parallel)(Region, void*, unsigned, unsigned);
  void (*barrier)();
  bool (*start)(long, long, long, long, long*, long*);
  bool (*next)(long*, long*);
  void (*end)();
  void (*end_nowait)();
  int (*rank)();
  int (*size)();

  template <class F>
  static bool find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
    return function != nullptr;
  }
  bool whole() {
    return find(parallel, "GOMP_parallel") && find(barrier, "GOMP_barrier") && find(start, "GOMP_loop_nonmonotonic_dynamic_start") &&
           find(next, "GOMP_loop_nonmonotonic_dynamic_next") && find(end, "GOMP_loop_end") && find(end_nowait, "GOMP_loop_end_nowait") &&
           find(rank, "omp_get_thread_num") && find(size, "omp_get_num_threads");
  }
};

const Runtime* runtime() {
  static const Runtime* const found = [] {
    static Runtime here;
    return here.whole() ? &here : nullptr;
  }();
  return found;
}

}  // namespace

extern "C" {

void GOMP_parallel(Region region, void* data, unsigned threads, unsigned flags) {
  if (const Runtime* theirs = runtime()) return theirs->parallel(region, data, threads, flags);
  pool().run(region, data, int(threads ? threads : 1));
}

void GOMP_barrier() {
  if (const Runtime* theirs = runtime()) return theirs->barrier();
  if (own_team) own_team->wait();
}

// The first of a team to come to a loop sets it up; loops follow each other with a barrier in between.
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* end) {
  if (const Runtime* theirs = runtime()) return theirs->next(first, end);
  Team& team = *own_team;
  const long at = team.next.fetch_add(team.chunk * team.step, std::memory_order_relaxed);
  if (at >= team.end) return false;
  *first = at;
  *end = std::min(team.end, at + team.chunk * team.step);
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long stop, long step, long chunk, long* first, long* end) {
  if (const Runtime* theirs = runtime()) return theirs->start(begin, stop, step, chunk, first, end);
  Team& team = *own_team;
  {
    const std::lock_guard<std::mutex> setting(team.starting);
    if (team.loops.load(std::memory_order_relaxed) == own_loops) {
      team.end = stop, team.step = step, team.chunk = chunk;
      team.next.store(begin, std::memory_order_relaxed);
      team.loops.store(own_loops + 1, std::memory_order_relaxed);
    }
  }
  ++own_loops;
  return GOMP_loop_nonmonotonic_dynamic_next(first, end);
}

void GOMP_loop_end() {
  if (const Runtime* theirs = runtime()) return theirs->end();
  own_team->wait();
}

void GOMP_loop_end_nowait() {
  if (const Runtime* theirs = runtime()) theirs->end_nowait();
}

int omp_get_thread_num() {
  if (const Runtime* theirs = runtime()) return theirs->rank();
  return own_team ? own_rank : 0;
}

int omp_get_num_threads() {
  if (const Runtime* theirs = runtime()) return theirs->size();
  return own_team ? own_team->size : 1;
}
}
