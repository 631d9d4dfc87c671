// The kernels as a shared library for the host; see host_cuda.h. Built and called by host_kernels.py.
#include "decode.cu"
#include "decode_iq.cu"
#ifndef DECODERS_ONLY
#include "experts.cu"
#include "experts_iq.cu"
#undef KERNEL
#include "routing.cu"
#undef KERNEL
#include "states.cu"
#undef KERNEL
#include "elementwise.cu"
#undef KERNEL
#include "matvec.cu"
#include "loss_ce.cu"
#include "loss_forward_kl.cu"
#include "loss_jsd.cu"
#include "loss_reverse_kl.cu"
#endif

// Tell the checker what the next launch may touch.
extern "C" void host_allow(const void* start, i64 bytes, int writable) {
    host.ranges.push_back({(uintptr_t)start, (uintptr_t)start + (uintptr_t)bytes, writable != 0});
}

// Run a kernel, block after block. Its parameters are pointers, 64-bit integers and at most one float: the calling
// conventions of x86-64 and AArch64 pass integers and floats apart and let a function ignore trailing ones, so one
// function type serves all. Returns what went wrong, or an empty string; the ranges are forgotten.
extern "C" const char* host_launch(void* kernel, unsigned grid, unsigned block, const i64* a, float number) {
    using Kernel = void (*)(i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, float);
    static std::string error;
    host.error.clear();
    gridDim.x = grid;
    blockDim.x = block;
    host.body = [=] {
        ((Kernel)kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14],
                         a[15], number);
    };
    for (unsigned i = 0; i < grid && host.error.empty(); i++) {
        blockIdx.x = i;
        host.run_block(block);
    }
    host.ranges.clear();
    error = host.error;
    return error.c_str();
}
