// As decode.cu, for the types of blocks_iq.cuh and blocks_small.cuh: a module of its own, which few files need.
#include "blocks_iq.cuh"
#include "blocks_small.cuh"
#include "decode.cuh"

#define GRID_KERNELS(name, Format, suffix, Out)                                                                      \
    KERNEL decode_##name##_##suffix(const u8* __restrict__ packed, i64 blocks, i64 first_block, i64 count,           \
                                    Out* __restrict__ out) {                                                         \
        __shared__ uint4 grid[Format::grid_bytes / 16];                                                              \
        decode_blocks(with_grid<Format>(grid), Blocks{packed, blocks}, first_block, count, out);                     \
    }                                                                                                                \
    KERNEL gather_##name##_##suffix(const u8* __restrict__ packed, i64 blocks, i64 blocks_per_row,                   \
                                    const i64* __restrict__ ids, i64 count, Out* __restrict__ out) {                 \
        __shared__ uint4 grid[Format::grid_bytes / 16];                                                              \
        gather_blocks(with_grid<Format>(grid), Blocks{packed, blocks}, blocks_per_row, ids, count, out);             \
    }

// No embedding has a scale of its own, so rows by id take none.
#define NVFP4_KERNELS(name, Format, suffix, Out)                                                                     \
    KERNEL decode_##name##_##suffix(const u8* __restrict__ packed, i64 blocks, i64 first_block, i64 count,           \
                                    Out* __restrict__ out, float scale) {                                            \
        decode_blocks(Format{scale}, Blocks{packed, blocks}, first_block, count, out);                               \
    }                                                                                                                \
    KERNEL gather_##name##_##suffix(const u8* __restrict__ packed, i64 blocks, i64 blocks_per_row,                   \
                                    const i64* __restrict__ ids, i64 count, Out* __restrict__ out) {                 \
        gather_blocks(Format{1.0f}, Blocks{packed, blocks}, blocks_per_row, ids, count, out);                        \
    }

BOTH(GRID_KERNELS, iq3_s, IQ3_S)
BOTH(GRID_KERNELS, iq3_xxs, IQ3_XXS)
BOTH(GRID_KERNELS, iq2_s, IQ2_S)
BOTH(GRID_KERNELS, iq2_xs, IQ2_XS)
BOTH(GRID_KERNELS, iq2_xxs, IQ2_XXS)
BOTH(GRID_KERNELS, iq1_s, IQ1_S)
BOTH(GRID_KERNELS, iq1_m, IQ1_M)
BOTH(BLOCK_KERNELS, mxfp4, MXFP4)
BOTH(NVFP4_KERNELS, nvfp4, NVFP4)
BOTH(BLOCK_KERNELS, tq1_0, TQ1_0)
BOTH(BLOCK_KERNELS, tq2_0, TQ2_0)
