// Packed rows to dense bf16 or float32: a range of rows (decode_*), rows by id (gather_*), and the Q6_K repacking.
//
// Sixteen threads a superblock, sixteen weights a thread: one 8-byte load of quants (coalesced across the warp), the
// block's header as a broadcast, two 16-byte stores of bf16. Every element of the output range is written.
#include "blocks_low.cuh"
#include "decode.cuh"

// Q8_0 blocks are 34 bytes: alone, they can only be read two bytes at a time. A warp instead copies a run of 32 blocks,
// which is 68 words of 16 bytes, to shared memory, all its loads in flight at once, and decodes it from there, eight
// weights a lane a step. Runs must start on 16 bytes and hold whole words: `first_block` and `count` multiples of 8.
template <class Out>
Q4KD_DEVICE void decode_q8_0_run(const u8* packed, i64 first_block, i64 count, Out* out) {
    constexpr int run = 32, words = run * Q8_0::bytes / 16, loads = (words + 31) / 32;
    __shared__ uint4 staged[8][words];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i64 start = ((i64)blockIdx.x * 8 + warp) * run;
    if (start >= count) return;
    int blocks = count - start < run ? (int)(count - start) : run;
    const u8* source = packed + (first_block + start) * Q8_0::bytes;
    uint4 loaded[loads] = {};
#pragma unroll
    for (int i = 0; i < loads; i++) {
        int word = lane + 32 * i;
        if (word < blocks * Q8_0::bytes / 16) loaded[i] = load<uint4>(source + 16 * word);
    }
#pragma unroll
    for (int i = 0; i < loads; i++) {
        if (lane + 32 * i < words) staged[warp][lane + 32 * i] = loaded[i];
    }
    __syncwarp();
    const u32* bytes = reinterpret_cast<const u32*>(staged[warp]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int octet = 32 * i + lane, block = octet / 4;
        if (block >= blocks) return;
        int base = block * Q8_0::bytes, first = base + 2 + 8 * (octet % 4);
        // Every other block begins in the middle of a word; where none is split, the third word is not needed.
        int odd = (first >> 1) & 1, word = first >> 2;
        u32 low = bytes[word], middle = bytes[word + 1], high = bytes[word + 1 + odd];
        u32 quants[2] = {join_words(low, middle, 16 * odd), join_words(middle, high, 16 * odd)};
        float d = f16_to_float((bytes[base >> 2] >> (8 * (base & 2))) & 0xFFFFu);
        float values[8];
#pragma unroll
        for (int j = 0; j < 8; j++) values[j] = multiply(d, signed_to_float((quants[j / 4] >> (8 * (j % 4))) & 0xFFu));
        write_floats<8>(out + start * Q8_0::weights + 8 * octet, values);
    }
}

// One element a thread, for rows of unquantised types that are not whole 16-byte words.
template <class Element, class Out>
Q4KD_DEVICE void decode_elements(const u8* packed, i64 first, i64 count, Out* out) {
    i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= count) return;
    float value = Element::element(packed + (first + item) * Element::element_bytes);
    write_floats<1>(out + item, &value);
}

template <class Element, class Out>
Q4KD_DEVICE void gather_elements(const u8* packed, i64 rows, i64 cols, const i64* ids, i64 count, Out* out) {
    i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= count * cols) return;
    i64 slot = quotient(item, cols);
    i64 id = load<i64>(ids + slot);
    float value = missing();
    i64 column = item - slot * cols;
    if (id >= 0 && id < rows) value = Element::element(packed + (id * cols + column) * Element::element_bytes);
    write_floats<1>(out + item, &value);
}

#define ELEMENT_KERNELS(name, Element, suffix, Out)                                                                  \
    BLOCK_KERNELS(name, Element, suffix, Out)                                                                        \
    KERNEL decode_##name##_elements_##suffix(const u8* __restrict__ packed, i64 first, i64 count,                    \
                                             Out* __restrict__ out) {                                                \
        decode_elements<Element>(packed, first, count, out);                                                         \
    }                                                                                                                \
    KERNEL gather_##name##_elements_##suffix(const u8* __restrict__ packed, i64 rows, i64 cols,                      \
                                             const i64* __restrict__ ids, i64 count, Out* __restrict__ out) {        \
        gather_elements<Element>(packed, rows, cols, ids, count, out);                                               \
    }

#define RUN_KERNEL(name, Format, suffix, Out)                                                                        \
    KERNEL decode_##name##_run_##suffix(const u8* __restrict__ packed, i64 first_block, i64 count,                   \
                                        Out* __restrict__ out) {                                                     \
        decode_##name##_run(packed, first_block, count, out);                                                        \
    }

BOTH(BLOCK_KERNELS, q4_k, Q4_K)
BOTH(BLOCK_KERNELS, q5_k, Q5_K)
BOTH(BLOCK_KERNELS, q6_k, Q6_K)
BOTH(BLOCK_KERNELS, q6_k_soa, Q6_K_SOA)
BOTH(BLOCK_KERNELS, q8_0, Q8_0)
BOTH(RUN_KERNEL, q8_0, Q8_0)
BOTH(BLOCK_KERNELS, q4_0, Q4_0)
BOTH(BLOCK_KERNELS, q5_0, Q5_0)
BOTH(BLOCK_KERNELS, q4_1, Q4_1)
BOTH(BLOCK_KERNELS, q5_1, Q5_1)
BOTH(BLOCK_KERNELS, q2_k, Q2_K)
BOTH(BLOCK_KERNELS, q3_k, Q3_K)
BOTH(BLOCK_KERNELS, iq4_nl, IQ4_NL)
BOTH(BLOCK_KERNELS, iq4_xs, IQ4_XS)
BOTH(ELEMENT_KERNELS, f16, F16)
BOTH(ELEMENT_KERNELS, bf16, BF16)
BOTH(ELEMENT_KERNELS, f32, F32)

// Superblocks between the file's layout and the structure of arrays: a thread moves one of 105 byte pairs.
Q4KD_INLINE i64 soa_offset(i64 total, i64 block, int byte) {
    if (byte < 128) return 128 * block + byte;
    if (byte < 192) return 128 * total + 64 * block + (byte - 128);
    if (byte < 208) return 192 * total + 16 * block + (byte - 192);
    return 208 * total + 2 * block + (byte - 208);
}

// `count` superblocks in the file's layout become superblocks first_block.. of an array of `total`.
KERNEL repack_q6_k(const u8* __restrict__ packed, i64 count, i64 total, i64 first_block, u8* __restrict__ out) {
    i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 block = item / 105;
    if (block >= count) return;
    int byte = 2 * (int)(item % 105);
    write(out + soa_offset(total, first_block + block, byte), load<u16>(packed + 210 * block + byte));
}

KERNEL unpack_q6_k(const u8* __restrict__ soa, i64 total, u8* __restrict__ out) {
    i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 block = item / 105;
    if (block >= total) return;
    int byte = 2 * (int)(item % 105);
    write(out + 210 * block + byte, load<u16>(soa + soa_offset(total, block, byte)));
}
