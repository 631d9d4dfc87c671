// Sums and maxima over the threads of a warp or a block.
#pragma once
#include "bits.cuh"

static constexpr u32 FULL_WARP = 0xFFFFFFFFu;

// Sum over `lanes` (a power of two) neighbouring lanes; all of a warp's threads must call it.
Q4KD_DEVICE float sum_lanes(float value, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}

Q4KD_DEVICE float max_lanes(float value) {
    for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, offset));
    return value;
}

// `count` sums or maxima at once over a block of 256 threads, the same in all of them. `partial` must not be in use.
template <int count, bool maximum>
Q4KD_DEVICE void reduce_block(float* values, float (*partial)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) {
        values[i] = maximum ? max_lanes(values[i]) : sum_lanes(values[i], 32);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; i++) {
        float total = partial[0][i];
        for (int warp = 1; warp < 8; warp++)
            total = maximum ? fmaxf(total, partial[warp][i]) : total + partial[warp][i];
        values[i] = total;
    }
}
