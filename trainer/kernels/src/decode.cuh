// Packed rows to dense bf16 or float32, for every type alike: a range of rows (decode_*) and rows by id (gather_*).
//
// A format is a value with `decode(blocks, block, task)`: most hold nothing, those of the IQ types a grid in shared
// memory. Every element of the output range is written.
#pragma once
#include "blocks.cuh"

template <class Format, class Out>
Q4KD_DEVICE void decode_task(Format format, Blocks blocks, i64 block, int task, Out* out_of_block) {
    Octets octets = format.decode(blocks, block, task);
    write_floats<8>(out_of_block + octets.first, octets.values);
    write_floats<8>(out_of_block + octets.second, octets.values + 8);
}

template <class Format, class Out>
Q4KD_DEVICE void decode_blocks(Format format, Blocks blocks, i64 first_block, i64 count, Out* out) {
    i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 block = item / Format::tasks;
    if (block >= count) return;
    decode_task(format, blocks, first_block + block, (int)(item % Format::tasks), out + block * Format::weights);
}

// Quiet NaN for rows that do not exist: an id out of range must be seen, not read out of bounds.
Q4KD_INLINE float missing() { return as_float(0x7FC00000u); }

template <class Format, class Out>
Q4KD_DEVICE void gather_blocks(Format format, Blocks blocks, i64 blocks_per_row, const i64* ids, i64 count,
                               Out* out) {
    i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 target = item / Format::tasks;
    i64 slot = quotient(target, blocks_per_row);
    if (slot >= count) return;
    int task = (int)(item % Format::tasks);
    i64 id = load<i64>(ids + slot);
    Out* out_of_block = out + target * Format::weights;
    if (id < 0 || id >= quotient(blocks.count, blocks_per_row)) {
        constexpr int share = Format::weights / Format::tasks;
        for (int i = 0; i < share; i++) {
            float value = missing();
            write_floats<1>(out_of_block + task * share + i, &value);
        }
        return;
    }
    decode_task(format, blocks, id * blocks_per_row + (target - slot * blocks_per_row), task, out_of_block);
}

// Every thread of a block copies a part of the grid to shared memory, where look-ups of 32 threads meet few conflicts.
template <class Format>
Q4KD_DEVICE Format with_grid(uint4* shared) {
    constexpr int words = Format::grid_bytes / 16;
    const uint4* table = reinterpret_cast<const uint4*>(Format::table());
    for (int i = threadIdx.x; i < words; i += blockDim.x) shared[i] = table[i];
    __syncthreads();
    Format format;
    format.grid = reinterpret_cast<const typename Format::Point*>(shared);
    return format;
}

#define KERNEL extern "C" __global__ void __launch_bounds__(256)

#define BLOCK_KERNELS(name, Format, suffix, Out)                                                                     \
    KERNEL decode_##name##_##suffix(const u8* __restrict__ packed, i64 blocks, i64 first_block, i64 count,           \
                                    Out* __restrict__ out) {                                                         \
        decode_blocks(Format{}, Blocks{packed, blocks}, first_block, count, out);                                    \
    }                                                                                                                \
    KERNEL gather_##name##_##suffix(const u8* __restrict__ packed, i64 blocks, i64 blocks_per_row,                   \
                                    const i64* __restrict__ ids, i64 count, Out* __restrict__ out) {                 \
        gather_blocks(Format{}, Blocks{packed, blocks}, blocks_per_row, ids, count, out);                            \
    }

#define BOTH(MACRO, name, Format) MACRO(name, Format, bf16, bf16) MACRO(name, Format, f32, float)
