// A CUDA block on the host, for tests: the kernels' own source runs unchanged, one fiber a thread, in one OS thread.
//
// Barriers, shuffles and the matrix instruction switch fibers. Every global access is checked for alignment and against
// the tensors a launch was given, so that one out of bounds is reported here as compute-sanitizer would report it.
#pragma once
#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { unsigned x; };

#define __global__
#define __shared__ static
#define __restrict__ __restrict
#define __launch_bounds__(...)

inline Index blockIdx, blockDim, threadIdx, gridDim;

struct Host {
    struct Range { uintptr_t start, stop; bool writable; };
    struct Fiber {
        ucontext_t context;
        std::vector<char> stack;
        bool done;
        long blocks, warps;  // barriers reached of each kind
    };

    std::vector<Range> ranges;
    std::string error;
    std::vector<Fiber> fibers;
    ucontext_t scheduler;
    unsigned current = 0;
    long progress = 0;
    std::function<void()> body;
    uint32_t words[1024][8];  // what each thread shows its warp

    void fail(const std::string& message) {
        if (error.empty())
            error = message + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")";
    }

    bool check(const void* address, size_t size, bool writes) {
        uintptr_t start = (uintptr_t)address;
        if (start % size) {
            fail("misaligned access of " + std::to_string(size) + " bytes");
            return false;
        }
        for (const Range& range : ranges)
            if (start >= range.start && start + size <= range.stop && (range.writable || !writes)) return true;
        fail((writes ? "write of " : "read of ") + std::to_string(size) + " bytes outside every tensor");
        return false;
    }

    void yield() {
        unsigned self = current;
        swapcontext(&fibers[self].context, &scheduler);
        current = self;
        threadIdx.x = self;
    }

    // Wait until threads [first, last) have each reached as many barriers of a kind as this one.
    void barrier(long Fiber::*kind, unsigned first, unsigned last) {
        long reached = ++(fibers[current].*kind);
        progress++;
        for (;;) {
            bool all = true;
            for (unsigned i = first; i < last; i++) all = all && (fibers[i].done || fibers[i].*kind >= reached);
            if (all || !error.empty()) return;
            yield();
        }
    }

    void warp_barrier() {
        unsigned first = current / 32 * 32, last = first + 32 < fibers.size() ? first + 32 : (unsigned)fibers.size();
        barrier(&Fiber::warps, first, last);
    }

    static void enter();

    void run_block(unsigned threads) {
        fibers.resize(threads);
        for (unsigned i = 0; i < threads; i++) {
            Fiber& fiber = fibers[i];
            fiber.done = false;
            fiber.blocks = fiber.warps = 0;
            fiber.stack.resize(64 << 10);  // kept from block to block: clearing it anew took most of the time
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, &Host::enter, 0);
        }
        for (bool running = true; running;) {
            running = false;
            long before = progress;
            for (unsigned i = 0; i < threads; i++) {
                if (fibers[i].done) continue;
                running = true;
                current = i;
                threadIdx.x = i;
                swapcontext(&scheduler, &fibers[i].context);
            }
            if (running && progress == before) {
                // Only barriers stop a fiber: with no progress, some thread will never arrive.
                fail("threads wait at a barrier that others never reach");
            }
        }
    }
};

inline Host host;

inline void Host::enter() {
    host.body();
    host.fibers[host.current].done = true;  // and holds nobody up any more
    host.progress++;
}

template <class T>
T host_load(const void* address) {
    T value{};
    if (host.check(address, sizeof(T), false)) std::memcpy(&value, address, sizeof(T));
    return value;
}

template <class T>
void host_store(void* address, T value) {
    if (host.check(address, sizeof(T), true)) std::memcpy(address, &value, sizeof(T));
}

inline void __syncthreads() { host.barrier(&Host::Fiber::blocks, 0, (unsigned)host.fibers.size()); }

inline void __syncwarp() { host.warp_barrier(); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
    unsigned self = host.current;
    std::memcpy(&host.words[self][0], &value, 4);
    host.warp_barrier();
    float other;
    std::memcpy(&other, &host.words[self ^ (unsigned)offset][0], 4);
    host.warp_barrier();
    return other;
}

// mma.m16n8k16 with bf16 operands, fragments as PTX lays them out; products summed in double.
inline void host_mma(float* acc, const uint32_t* a, uint32_t b0, uint32_t b1) {
    unsigned self = host.current, warp = self / 32 * 32, lane = self % 32;
    for (int i = 0; i < 4; i++) host.words[self][i] = a[i];
    host.words[self][4] = b0;
    host.words[self][5] = b1;
    host.warp_barrier();
    auto element = [&](unsigned of_lane, int word, int half) {
        uint32_t bits = host.words[warp + of_lane][word];
        bits = half ? bits & 0xFFFF0000u : bits << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return (double)value;
    };
    for (int i = 0; i < 4; i++) {
        unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        double sum = acc[i];
        for (unsigned k = 0; k < 16; k++) {
            unsigned pair = (k % 8) / 2, upper = k / 8;
            sum += element(row % 8 * 4 + pair, (int)(row / 8 + 2 * upper), k % 2) *
                   element(column * 4 + pair, (int)(4 + upper), k % 2);
        }
        acc[i] = (float)sum;
    }
    host.warp_barrier();
}
