// Decoding of GGML blocks to float32, bit-equal to gguf.quants.dequantize. Layouts: llama.cpp ggml-common.h.
//
// A block is decoded by `tasks` threads. A task decodes two runs of eight consecutive weights, at `first` and `second`
// within the block, so that a thread writes 16 bytes of bf16 (or 32 of float32) at a time.
#pragma once
#include "bits.cuh"

struct Octets {
    int first, second;
    float values[16];  // the eight weights from `first`, then the eight from `second`
};

// Where a tensor's blocks are: packed bytes, and how many blocks in all (a repacked layout needs it).
struct Blocks {
    const u8* packed;
    i64 count;
};

// Eight bytes in two words, from an address aligned to 8, to 4 or only to 2.
template <int alignment>
Q4KD_INLINE uint2 load_eight(const u8* address) {
    if constexpr (alignment == 8) {
        return load<uint2>(address);
    } else if constexpr (alignment == 4) {
        return uint2{load<u32>(address), load<u32>(address + 4)};
    } else {
        return uint2{load<u16>(address) | ((u32)load<u16>(address + 2) << 16),
                     load<u16>(address + 4) | ((u32)load<u16>(address + 6) << 16)};
    }
}

Q4KD_INLINE u32 byte_of(uint2 words, int index) {
    return ((index < 4 ? words.x : words.y) >> (8 * (index & 3))) & 0xFFu;
}

// scale * (q - offset), the form without a minimum. `low` and `high` hold one quant a byte.
Q4KD_INLINE void scale_quants(Octets& out, uint2 low, uint2 high, float low_scale, float high_scale, int offset) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        out.values[i] = multiply(low_scale, small_to_float(byte_of(low, i), offset));
        out.values[8 + i] = multiply(high_scale, small_to_float(byte_of(high, i), offset));
    }
}

// Scales and minimums of two neighbouring sub-blocks of 32, already multiplied by d and dmin.
struct ScalePair {
    float scale[2], minimum[2];
};

// The 16 bytes that open Q4_K and Q5_K blocks:  | d: f16 | dmin: f16 | scales: 12 bytes |
//
// scales, as bits (A-D: scale 0-3, E-H: scale 4-7, a-d / e-h: the minimums; six bits each)
//  0 EEAAAAAA   4 eeaaaaaa    8 eeeeEEEE
//  1 FFBBBBBB   5 ffbbbbbb    9 ffffFFFF
//  2 GGCCCCCC   6 ggcccccc   10 ggggGGGG
//  3 HHDDDDDD   7 hhdddddd   11 hhhhHHHH
//
// `chunk` 0..3 chooses sub-blocks 2 chunk and 2 chunk + 1; all four of a word are unpacked at once, then two are taken.
Q4KD_INLINE ScalePair unpack_scales(uint4 header, int chunk) {
    float d = f16_to_float(header.x & 0xFFFFu), dmin = f16_to_float(header.x >> 16);
    u32 scales = header.y & 0x3F3F3F3Fu, minimums = header.z & 0x3F3F3F3Fu;
    if (chunk >= 2) {
        scales = (header.w & 0x0F0F0F0Fu) | ((header.y >> 2) & 0x30303030u);
        minimums = ((header.w >> 4) & 0x0F0F0F0Fu) | ((header.z >> 2) & 0x30303030u);
    }
    int shift = 16 * (chunk & 1);
    scales >>= shift;
    minimums >>= shift;
    ScalePair pair;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        pair.scale[i] = multiply(d, small_to_float((scales >> (8 * i)) & 0xFFu, 0));
        pair.minimum[i] = multiply(dmin, small_to_float((minimums >> (8 * i)) & 0xFFu, 0));
    }
    return pair;
}

Q4KD_INLINE void scale_and_shift(Octets& out, uint2 low, uint2 high, const ScalePair& pair) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        out.values[i] = subtract(multiply(pair.scale[0], small_to_float(byte_of(low, i), 0)), pair.minimum[0]);
        out.values[8 + i] = subtract(multiply(pair.scale[1], small_to_float(byte_of(high, i), 0)), pair.minimum[1]);
    }
}

// Q4_K, 144 bytes for 256 weights:
// 0                 16                                              144
// | header: 16      | qs: 128 bytes, 4 chunks of 32                |
// weight[64c + l]      = (d * scale[2c])     * (qs[32c + l] & 15) - dmin * minimum[2c]
// weight[64c + 32 + l] = (d * scale[2c + 1]) * (qs[32c + l] >> 4) - dmin * minimum[2c + 1]
struct Q4_K {
    static constexpr int weights = 256, bytes = 144, tasks = 16;

    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        int chunk = task >> 2, lane = task & 3;
        uint4 header = load<uint4>(base);
        uint2 quants = load<uint2>(base + 16 + 32 * chunk + 8 * lane);
        Octets out;
        out.first = 64 * chunk + 8 * lane;
        out.second = out.first + 32;
        uint2 low = {quants.x & 0x0F0F0F0Fu, quants.y & 0x0F0F0F0Fu};
        uint2 high = {(quants.x >> 4) & 0x0F0F0F0Fu, (quants.y >> 4) & 0x0F0F0F0Fu};
        scale_and_shift(out, low, high, unpack_scales(header, chunk));
        return out;
    }
};

// Q5_K, 176 bytes for 256 weights: Q4_K with a fifth bit. Bit j of qh[l] belongs to sub-block j.
// 0                 16              48                             176
// | header: 16      | qh: 32 bytes  | qs: 128 bytes, as in Q4_K   |
struct Q5_K {
    static constexpr int weights = 256, bytes = 176, tasks = 16;

    static Q4KD_INLINE u32 fifth_bits(u32 word, int sub_block) { return ((word >> sub_block) & 0x01010101u) << 4; }

    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        int chunk = task >> 2, lane = task & 3;
        uint4 header = load<uint4>(base);
        uint2 fifth = load<uint2>(base + 16 + 8 * lane);
        uint2 quants = load<uint2>(base + 48 + 32 * chunk + 8 * lane);
        Octets out;
        out.first = 64 * chunk + 8 * lane;
        out.second = out.first + 32;
        uint2 low = {(quants.x & 0x0F0F0F0Fu) | fifth_bits(fifth.x, 2 * chunk),
                     (quants.y & 0x0F0F0F0Fu) | fifth_bits(fifth.y, 2 * chunk)};
        uint2 high = {((quants.x >> 4) & 0x0F0F0F0Fu) | fifth_bits(fifth.x, 2 * chunk + 1),
                      ((quants.y >> 4) & 0x0F0F0F0Fu) | fifth_bits(fifth.y, 2 * chunk + 1)};
        scale_and_shift(out, low, high, unpack_scales(header, chunk));
        return out;
    }
};

// Where the four parts of a Q6_K superblock are.
struct Q6Parts {
    const u8 *low, *high, *scales, *d;
};

// Four quants, one a byte: four low bits from the nibbles of `low`, two high bits from `high` at bit 2 * quarter.
Q4KD_INLINE u32 six_bits(u32 low, u32 high, int quarter) {
    return ((low >> (4 * (quarter >> 1))) & 0x0F0F0F0Fu) | (((high >> (2 * quarter)) & 0x03030303u) << 4);
}

Q4KD_INLINE float signed_to_float(u32 byte) { return small_to_float(byte ^ 0x80u, 128); }

// Q6_K, 256 weights in 16 sub-blocks of 16: weight = (d * scale[position / 16]) * (q - 32), scales signed.
// ql: 128 bytes, qh: 64 bytes, each in two halves p. For l = 0..31, quarter r = 0..3, column c = r & 1, n = r >> 1:
//   q at position 128p + 32r + l  =  (ql[64p + 32c + l] >> 4n) & 15  |  ((qh[32p + l] >> 2r) & 3) << 4
template <int alignment>
Q4KD_INLINE Octets decode_q6_parts(Q6Parts parts, int task) {
    int half = task >> 3, column = (task >> 2) & 1, lane = task & 3;
    uint2 low = load_eight<alignment>(parts.low + 64 * half + 32 * column + 8 * lane);
    uint2 high = load_eight<alignment>(parts.high + 32 * half + 8 * lane);
    Octets out;
    out.first = 128 * half + 32 * column + 8 * lane;
    out.second = out.first + 64;
    float d = f16_to_float(load<u16>(parts.d));
    float first_scale = multiply(d, signed_to_float(load<u8>(parts.scales + (out.first >> 4))));
    float second_scale = multiply(d, signed_to_float(load<u8>(parts.scales + (out.second >> 4))));
    uint2 first = {six_bits(low.x, high.x, column), six_bits(low.y, high.y, column)};
    uint2 second = {six_bits(low.x, high.x, column + 2), six_bits(low.y, high.y, column + 2)};
    scale_quants(out, first, second, first_scale, second_scale, 32);
    return out;
}

// As in the file, 210 bytes a superblock, aligned only to 2:
// 0                 128            192                208       210
// | ql: 128 bytes   | qh: 64 bytes | scales: 16 x i8  | d: f16  |
struct Q6_K {
    static constexpr int weights = 256, bytes = 210, tasks = 16;

    static Q4KD_INLINE Q6Parts parts(Blocks blocks, i64 block) {
        const u8* base = blocks.packed + block * bytes;
        return Q6Parts{base, base + 128, base + 192, base + 208};
    }
    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        return decode_q6_parts<2>(parts(blocks, block), task);
    }
};

// The same bytes as a structure of arrays over the n superblocks of a tensor; every part's region starts on 16 bytes:
// 0                   128n             192n               208n          210n
// | n x ql            | n x qh         | n x scales       | n x d       |
struct Q6_K_SOA {
    static constexpr int weights = 256, bytes = 210, tasks = 16;

    static Q4KD_INLINE Q6Parts parts(Blocks blocks, i64 block) {
        const u8* base = blocks.packed;
        return Q6Parts{base + 128 * block, base + 128 * blocks.count + 64 * block,
                       base + 192 * blocks.count + 16 * block, base + 208 * blocks.count + 2 * block};
    }
    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        return decode_q6_parts<8>(parts(blocks, block), task);
    }
};

// Q8_0, 34 bytes for 32 weights:  | d: f16 | q: 32 x i8 |      weight = d * q
struct Q8_0 {
    static constexpr int weights = 32, bytes = 34, tasks = 2;

    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        uint2 first = load_eight<2>(base + 2 + 16 * task), second = load_eight<2>(base + 10 + 16 * task);
        float d = f16_to_float(load<u16>(base));
        Octets out;
        out.first = 16 * task;
        out.second = out.first + 8;
        first = uint2{first.x ^ 0x80808080u, first.y ^ 0x80808080u};
        second = uint2{second.x ^ 0x80808080u, second.y ^ 0x80808080u};
        scale_quants(out, first, second, d, d, 128);
        return out;
    }
};

// Q4_0, 18 bytes for 32 weights:  | d: f16 | qs: 16 bytes |
// weight[l] = d * ((qs[l] & 15) - 8), weight[16 + l] = d * ((qs[l] >> 4) - 8)
struct Q4_0 {
    static constexpr int weights = 32, bytes = 18, tasks = 2;

    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        uint2 quants = load_eight<2>(base + 2 + 8 * task);
        float d = f16_to_float(load<u16>(base));
        Octets out;
        out.first = 8 * task;
        out.second = out.first + 16;
        uint2 low = {quants.x & 0x0F0F0F0Fu, quants.y & 0x0F0F0F0Fu};
        uint2 high = {(quants.x >> 4) & 0x0F0F0F0Fu, (quants.y >> 4) & 0x0F0F0F0Fu};
        scale_quants(out, low, high, d, d, 8);
        return out;
    }
};

// Q5_0, 22 bytes for 32 weights:  | d: f16 | qh: u32 | qs: 16 bytes |     bit i of qh is the fifth bit of weight i
// weight[l] = d * ((qs[l] & 15 | bit l << 4) - 16), weight[16 + l] = d * ((qs[l] >> 4 | bit (16 + l) << 4) - 16)
struct Q5_0 {
    static constexpr int weights = 32, bytes = 22, tasks = 2;

    // Four consecutive bits to bit 4 of four bytes.
    static Q4KD_INLINE u32 fifth_bits(u32 bits) {
        return ((bits & 1u) << 4) | ((bits & 2u) << 11) | ((bits & 4u) << 18) | ((bits & 8u) << 25);
    }
    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        uint2 quants = load_eight<2>(base + 6 + 8 * task);
        u32 fifth = load<u16>(base + 2) | ((u32)load<u16>(base + 4) << 16);
        float d = f16_to_float(load<u16>(base));
        Octets out;
        out.first = 8 * task;
        out.second = out.first + 16;
        u32 low_bits = fifth >> (8 * task), high_bits = fifth >> (16 + 8 * task);
        uint2 low = {(quants.x & 0x0F0F0F0Fu) | fifth_bits(low_bits),
                     (quants.y & 0x0F0F0F0Fu) | fifth_bits(low_bits >> 4)};
        uint2 high = {((quants.x >> 4) & 0x0F0F0F0Fu) | fifth_bits(high_bits),
                      ((quants.y >> 4) & 0x0F0F0F0Fu) | fifth_bits(high_bits >> 4)};
        scale_quants(out, low, high, d, d, 16);
        return out;
    }
};

// Unquantised types: sixteen elements as a "block" for 16-byte accesses, or one element at a time for odd sizes.
template <class Element>
Q4KD_INLINE Octets decode_sixteen(const u8* base) {
    Octets out;
    out.first = 0;
    out.second = 8;
    constexpr int words = Element::bytes / 4, per_word = 16 / words;
#pragma unroll
    for (int i = 0; i < words; i += 4) {
        uint4 four = load<uint4>(base + 4 * i);
        u32 loaded[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int k = 0; k < per_word; k++) {
                u32 bits = per_word == 2 ? (loaded[j] >> (16 * k)) & 0xFFFFu : loaded[j];
                out.values[(i + j) * per_word + k] = Element::widen(bits);
            }
        }
    }
    return out;
}

struct F16 {
    static constexpr int weights = 16, bytes = 32, tasks = 1, element_bytes = 2;
    static Q4KD_INLINE float widen(u32 bits) { return f16_to_float(bits); }
    static Q4KD_INLINE float element(const u8* address) { return widen(load<u16>(address)); }
    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int) {
        return decode_sixteen<F16>(blocks.packed + block * bytes);
    }
};

struct BF16 {
    static constexpr int weights = 16, bytes = 32, tasks = 1, element_bytes = 2;
    static Q4KD_INLINE float widen(u32 bits) { return bf16_to_float(bits); }
    static Q4KD_INLINE float element(const u8* address) { return widen(load<u16>(address)); }
    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int) {
        return decode_sixteen<BF16>(blocks.packed + block * bytes);
    }
};

struct F32 {
    static constexpr int weights = 16, bytes = 64, tasks = 1, element_bytes = 4;
    static Q4KD_INLINE float widen(u32 bits) { return as_float(bits); }
    static Q4KD_INLINE float element(const u8* address) { return widen(load<u32>(address)); }
    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int) {
        return decode_sixteen<F32>(blocks.packed + block * bytes);
    }
};
