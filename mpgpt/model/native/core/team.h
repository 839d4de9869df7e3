// Threads that play together: they spin for work for a while, then sleep, and meet at barriers between operations.
//
// Knows: threads and how they wait. Must not know: what is computed.
#pragma once
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

constexpr int SPINS = 4096;  // some 50 to 200 microseconds: longer than a rank's pause between two steps in a full ring
constexpr int MEETING_SPINS = 1024;

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Denormal numbers as they are and rounding to nearest, whatever a library has set for the calling thread.
class ExactFloats {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();

   public:
    ExactFloats() { _mm_setcsr(0x1f80); }
    ~ExactFloats() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;

   public:
    ExactFloats() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"((uint64_t)0));
    }
    ~ExactFloats() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#else
   public:
    ExactFloats() {}
#endif
    ExactFloats(const ExactFloats&) = delete;
    ExactFloats& operator=(const ExactFloats&) = delete;
};

// `count` threads, the caller's among them. One call of run() at a time.
class Team {
   public:
    typedef void (*Job)(void* with, int thread);

    explicit Team(int count) : count_(count) {
        for (int i = 1; i < count; i++) threads_.emplace_back([this, i] { serve(i); });
    }
    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            over_ = true;
            round_.fetch_add(1);
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int count() const { return count_; }

    // job(with, i) on thread i, for all of them; returns when all have returned.
    void run(Job job, void* with) {
        if (count_ > 1) {
            job_ = job, with_ = with;
            bool anyone;
            {
                std::lock_guard<std::mutex> lock(mutex_);
                round_.fetch_add(1);
                anyone = sleeping_ > 0;
            }
            if (anyone) wake_.notify_all();
        }
        job(with, 0);
        meet();
    }

    // Returns when all threads have called it.
    void meet() {
        if (count_ == 1) return;
        const unsigned meeting = meeting_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            meeting_.store(meeting + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; meeting_.load(std::memory_order_acquire) == meeting; spins++)
            if (spins < MEETING_SPINS) pause();
            else sched_yield();  // a thread lost its core: perhaps to this one
    }

   private:
    void serve(int thread) {
        ExactFloats exact;
        for (unsigned seen = 0;;) {
            for (int spins = 0; spins < SPINS && round_.load(std::memory_order_acquire) == seen; spins++) pause();
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_++;
                wake_.wait(lock, [&] { return round_.load() != seen; });
                sleeping_--;
            }
            seen++;
            if (over_.load()) return;
            job_(with_, thread);
            meet();
        }
    }

    const int count_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> round_{0}, meeting_{0};
    std::atomic<int> arrived_{0};
    std::atomic<bool> over_{false};
    int sleeping_ = 0;  // under the mutex
    Job job_ = nullptr;
    void* with_ = nullptr;
};
