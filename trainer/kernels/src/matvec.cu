// y[M, R] = x[M, K] @ W[R, K]^T for up to 16 tokens, straight from Q4_K or repacked Q6_K blocks.
//
// A warp multiplies 16 rows of W (the m of mma.m16n8k16) by 8 or 16 tokens. The quants alone enter the matrix units,
// as bf16 integers, which are exact; the products of a sub-block then are scaled in float32. So no weight is rounded:
//   Q4_K:  y += d scale * sum(q x) - dmin minimum * sum(x)     (the second sum from a matrix of ones)
//   Q6_K:  y += d scale * sum((q - 32) x)
// Warps of a block split K and add their sums in shared memory, in a fixed order.
#include "blocks.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(256, 2)

static constexpr u32 ONES = 0x3F803F80u;  // two bf16 ones

struct Fragment {
    u32 pairs[4];
};

// acc += A[16, 16] @ B[16, 8]. With g = lane / 4, t = lane % 4, a lane holds, as pairs of bf16:
//   A: (row g, k 2t..), (row g + 8, k 2t..), (row g, k 8 + 2t..), (row g + 8, k 8 + 2t..)
//   B: (k 2t.., column g), (k 8 + 2t.., column g)
//   acc: row g columns 2t, 2t + 1; row g + 8 columns 2t, 2t + 1
// Which weight is "k" is free as long as A and B agree: below, lane t supplies consecutive weights.
Q4KD_DEVICE void multiply_fragments(float* acc, Fragment a, u32 b0, u32 b1) {
#ifdef __CUDA_ARCH__
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a.pairs[0]), "r"(a.pairs[1]), "r"(a.pairs[2]), "r"(a.pairs[3]), "r"(b0), "r"(b1));
#else
    host_mma(acc, a.pairs, b0, b1);
#endif
}

// Two integers 0..127 in the halves of a word to bf16, less an offset: 0x4300 is 128, whose last mantissa bit is worth
// 1, so OR-ing an integer in adds it. `negated_offset` holds -(128 + offset) as bf16, twice; the sum is exact.
Q4KD_DEVICE u32 integers_to_bf16(u32 pair, u32 negated_offset) {
    u32 biased = pair | 0x43004300u;
#ifdef __CUDA_ARCH__
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(biased), "r"(ONES), "r"(negated_offset));
    return result;
#else
    return round_to_bf16x2(as_float(biased << 16) + as_float(negated_offset << 16),
                           as_float(biased & 0xFFFF0000u) + as_float(negated_offset & 0xFFFF0000u));
#endif
}

// The low, or the high, halves of two words.
Q4KD_DEVICE u32 low_halves(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
    return __byte_perm(a, b, 0x5410);
#else
    return (a & 0xFFFFu) | (b << 16);
#endif
}
Q4KD_DEVICE u32 high_halves(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
    return __byte_perm(a, b, 0x7632);
#else
    return (a >> 16) | (b & 0xFFFF0000u);
#endif
}

// What a lane of a warp works on: rows g and g + 8 of its tile, tokens g and g + 8.
struct Tile {
    Blocks blocks;
    i64 row_blocks[2];  // first superblock of each of the two rows
    const bf16* tokens[2];  // start of each of the two tokens; null beyond M
    int lane4;  // t
};

struct Q4_K_Product {
    template <int tiles>
    static Q4KD_DEVICE void accumulate(const Tile& tile, i64 superblock, float (*acc)[4]) {
        const u8* base[2];
        uint4 header[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            base[r] = tile.blocks.packed + (tile.row_blocks[r] + superblock) * Q4_K::bytes;
            header[r] = load<uint4>(base[r]);
        }
#pragma unroll
        for (int chunk = 0; chunk < 4; chunk++) {
            uint2 quants[2];
            ScalePair scales[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                quants[r] = load<uint2>(base[r] + 16 + 32 * chunk + 8 * tile.lane4);
                scales[r] = unpack_scales(header[r], chunk);
            }
#pragma unroll
            for (int nibble = 0; nibble < 2; nibble++) {
                // Lane t holds weights 8t..8t+7 of the sub-block; a fragment takes four, as (0, 2) and (1, 3).
                Fragment a[2];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    u32 words[2] = {quants[r].x >> (4 * nibble), quants[r].y >> (4 * nibble)};
#pragma unroll
                    for (int f = 0; f < 2; f++) {
                        a[f].pairs[r] = integers_to_bf16(words[f] & 0x000F000Fu, 0xC300C300u);
                        a[f].pairs[2 + r] = integers_to_bf16((words[f] >> 8) & 0x000F000Fu, 0xC300C300u);
                    }
                }
#pragma unroll
                for (int n = 0; n < tiles; n++) {
                    uint4 x = {0, 0, 0, 0};
                    if (tile.tokens[n])
                        x = load<uint4>(tile.tokens[n] + 256 * superblock + 32 * (2 * chunk + nibble) + 8 * tile.lane4);
                    u32 b[4] = {low_halves(x.x, x.y), high_halves(x.x, x.y), low_halves(x.z, x.w),
                                high_halves(x.z, x.w)};
                    float products[4] = {0, 0, 0, 0}, sums[4] = {0, 0, 0, 0};
                    Fragment ones = {{ONES, ONES, ONES, ONES}};
                    multiply_fragments(products, a[0], b[0], b[1]);
                    multiply_fragments(products, a[1], b[2], b[3]);
                    multiply_fragments(sums, ones, b[0], b[1]);
                    multiply_fragments(sums, ones, b[2], b[3]);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const ScalePair& pair = scales[i / 2];
                        acc[n][i] = fmaf(pair.scale[nibble], products[i], acc[n][i]);
                        acc[n][i] = fmaf(-pair.minimum[nibble], sums[i], acc[n][i]);
                    }
                }
            }
        }
    }
};

struct Q6_K_Product {
    template <int tiles>
    static Q4KD_DEVICE void accumulate(const Tile& tile, i64 superblock, float (*acc)[4]) {
        Q6Parts parts[2];
        u32 scale_words[2][4];
        float d[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            parts[r] = Q6_K_SOA::parts(tile.blocks, tile.row_blocks[r] + superblock);
            uint4 scales = load<uint4>(parts[r].scales);
            scale_words[r][0] = scales.x, scale_words[r][1] = scales.y;
            scale_words[r][2] = scales.z, scale_words[r][3] = scales.w;
            d[r] = f16_to_float(load<u16>(parts[r].d));
        }
#pragma unroll
        for (int step = 0; step < 8; step++) {  // (half, column, sixteen): 16 bytes of ql, four a lane
            int half = step >> 2, column = (step >> 1) & 1, sixteen = step & 1;
            u32 low[2], high[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                low[r] = load<u32>(parts[r].low + 64 * half + 32 * column + 16 * sixteen + 4 * tile.lane4);
                high[r] = load<u32>(parts[r].high + 32 * half + 16 * sixteen + 4 * tile.lane4);
            }
#pragma unroll
            for (int nibble = 0; nibble < 2; nibble++) {
                int quarter = 2 * nibble + column, group = 8 * half + 2 * quarter + sixteen;
                Fragment a;
                float scales[2];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    u32 quants = six_bits(low[r], high[r], quarter);
                    a.pairs[r] = integers_to_bf16(quants & 0x00FF00FFu, 0xC320C320u);
                    a.pairs[2 + r] = integers_to_bf16((quants >> 8) & 0x00FF00FFu, 0xC320C320u);
                    u32 scale = (scale_words[r][group >> 2] >> (8 * (group & 3))) & 0xFFu;
                    scales[r] = multiply(d[r], signed_to_float(scale));
                }
#pragma unroll
                for (int n = 0; n < tiles; n++) {
                    uint2 x = {0, 0};
                    if (tile.tokens[n])
                        x = load<uint2>(tile.tokens[n] + 256 * superblock + 16 * group + 4 * tile.lane4);
                    float products[4] = {0, 0, 0, 0};
                    multiply_fragments(products, a, low_halves(x.x, x.y), high_halves(x.x, x.y));
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[n][i] = fmaf(scales[i / 2], products[i], acc[n][i]);
                }
            }
        }
    }
};

// A block of eight warps: `row_tiles` tiles of 16 rows, each by 8 / row_tiles warps that split K. `tiles`: tokens / 8.
// Rows beyond R are computed on row R - 1 and not written; tokens beyond M are zeros and not written.
template <class Product, int row_tiles, int tiles, class Out>
Q4KD_DEVICE void multiply_rows(Blocks blocks, i64 blocks_per_row, const bf16* x, i64 M, i64 R, i64 out_stride,
                               Out* out) {
    constexpr int splits = 8 / row_tiles, columns = 8 * tiles;
    __shared__ float partial[8][16][columns];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    i64 first_row = ((i64)blockIdx.x * row_tiles + warp % row_tiles) * 16;

    Tile tile;
    tile.blocks = blocks;
    tile.lane4 = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        i64 row = first_row + g + 8 * i, token = g + 8 * i;
        tile.row_blocks[i] = (row < R ? row : R - 1) * blocks_per_row;
        tile.tokens[i] = token < M ? x + token * blocks_per_row * 256 : nullptr;
    }
    float acc[tiles][4] = {};
    for (i64 superblock = warp / row_tiles; superblock < blocks_per_row; superblock += splits)
        Product::template accumulate<tiles>(tile, superblock, acc);
#pragma unroll
    for (int n = 0; n < tiles; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) partial[warp][g + 8 * (i / 2)][8 * n + 2 * tile.lane4 + i % 2] = acc[n][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * row_tiles * columns; i += 256) {
        int row_in_block = i % (16 * row_tiles), token = i / (16 * row_tiles);
        i64 row = (i64)blockIdx.x * row_tiles * 16 + row_in_block;
        if (row >= R || token >= M) continue;
        float sum = 0.0f;
        for (int split = 0; split < splits; split++)
            sum += partial[split * row_tiles + row_in_block / 16][row_in_block % 16][token];
        write_floats<1>(out + token * out_stride + row, &sum);
    }
}

#define MATVEC(name, Product, row_tiles, tiles, suffix, Out)                                                         \
    KERNEL matvec_##name##_r##row_tiles##_t##tiles##_##suffix(const u8* __restrict__ packed, i64 blocks,             \
                                                              i64 blocks_per_row, const bf16* __restrict__ x, i64 M, \
                                                              i64 R, i64 out_stride, Out* __restrict__ out) {        \
        multiply_rows<Product, row_tiles, tiles>(Blocks{packed, blocks}, blocks_per_row, x, M, R, out_stride, out);  \
    }
#define SHAPES(name, Product, suffix, Out)                                                                           \
    MATVEC(name, Product, 1, 1, suffix, Out)                                                                         \
    MATVEC(name, Product, 1, 2, suffix, Out)                                                                         \
    MATVEC(name, Product, 4, 1, suffix, Out)                                                                         \
    MATVEC(name, Product, 4, 2, suffix, Out)

SHAPES(q4_k, Q4_K_Product, bf16, bf16)
SHAPES(q4_k, Q4_K_Product, f32, float)
SHAPES(q6_k_soa, Q6_K_Product, bf16, bf16)
SHAPES(q6_k_soa, Q6_K_Product, f32, float)
