// Decodes the experts that some token chose, of a run of experts, each to its place in a slab.
#pragma once
#include "decode.cuh"

// Experts `first`.. of `count` go to out, out + stride, ... `ends` are the first rows behind each expert's: of one that
// no token chose, whose rows are none, nothing is read or written. Null: every expert is decoded.
template <class Format, class Out>
Q4KD_DEVICE void decode_experts(Format format, Blocks blocks, i64 blocks_per_expert, i64 first, i64 count,
                                const int* ends, i64 stride, Out* out) {
    i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 target = item / Format::tasks;
    i64 place = quotient(target, blocks_per_expert), block = target - place * blocks_per_expert;
    if (place >= count) return;
    i64 expert = first + place;
    if (ends && load<int>(ends + expert) == (expert ? load<int>(ends + expert - 1) : 0)) return;
    decode_task(format, blocks, expert * blocks_per_expert + block, (int)(item % Format::tasks),
                out + place * stride + block * Format::weights);
}

#define EXPERT_PARAMETERS(Out)                                                                                       \
    const u8 *__restrict__ packed, i64 blocks, i64 blocks_per_expert, i64 first, i64 count,                          \
        const int *__restrict__ ends, i64 stride, Out *__restrict__ out
#define EXPERT_KERNEL(name, Format, suffix, Out)                                                                     \
    KERNEL experts_##name##_##suffix(EXPERT_PARAMETERS(Out)) {                                                       \
        decode_experts(Format{}, Blocks{packed, blocks}, blocks_per_expert, first, count, ends, stride, out);        \
    }
