// Decoding of the remaining GGML blocks of two to five bits to float32, bit-equal to gguf.quants.dequantize; `Octets`
// and the order in which tasks take a block are those of blocks.cuh. Layouts: llama.cpp ggml-common.h.
#pragma once
#include "blocks.cuh"

// Two f16 that open a block of 32 weights, as the scale of both octets and what is added to them.
Q4KD_INLINE ScalePair scale_and_addend(const u8* base) {
    u32 both = load<u32>(base);
    float d = f16_to_float(both & 0xFFFFu), m = f16_to_float(both >> 16);
    return ScalePair{{d, d}, {-m, -m}};  // x - (-m) is x + m, to the last bit
}

// Q4_1, 20 bytes for 32 weights:  | d: f16 | m: f16 | qs: 16 bytes |
// weight[l] = d * (qs[l] & 15) + m, weight[16 + l] = d * (qs[l] >> 4) + m
struct Q4_1 {
    static constexpr int weights = 32, bytes = 20, tasks = 2;

    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        uint2 quants = load_eight<4>(base + 4 + 8 * task);
        Octets out;
        out.first = 8 * task;
        out.second = out.first + 16;
        uint2 low = {quants.x & 0x0F0F0F0Fu, quants.y & 0x0F0F0F0Fu};
        uint2 high = {(quants.x >> 4) & 0x0F0F0F0Fu, (quants.y >> 4) & 0x0F0F0F0Fu};
        scale_and_shift(out, low, high, scale_and_addend(base));
        return out;
    }
};

// Q5_1, 24 bytes for 32 weights:  | d: f16 | m: f16 | qh: u32 | qs: 16 bytes |     bit i of qh is the fifth of weight i
// weight[l] = d * (qs[l] & 15 | bit l << 4) + m, weight[16 + l] = d * (qs[l] >> 4 | bit (16 + l) << 4) + m
struct Q5_1 {
    static constexpr int weights = 32, bytes = 24, tasks = 2;

    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        uint2 quants = load_eight<8>(base + 8 + 8 * task);
        u32 fifth = load<u32>(base + 4);
        Octets out;
        out.first = 8 * task;
        out.second = out.first + 16;
        u32 low_bits = fifth >> (8 * task), high_bits = fifth >> (16 + 8 * task);
        uint2 low = {(quants.x & 0x0F0F0F0Fu) | Q5_0::fifth_bits(low_bits),
                     (quants.y & 0x0F0F0F0Fu) | Q5_0::fifth_bits(low_bits >> 4)};
        uint2 high = {((quants.x >> 4) & 0x0F0F0F0Fu) | Q5_0::fifth_bits(high_bits),
                      ((quants.y >> 4) & 0x0F0F0F0Fu) | Q5_0::fifth_bits(high_bits >> 4)};
        scale_and_shift(out, low, high, scale_and_addend(base));
        return out;
    }
};

// Where in Q2_K and Q3_K a task finds its quants: eight bytes of `half`, two of their four pairs of bits. For l = 0..31:
//   q at position 128 half + 32 r + l  =  qs[32 half + l] >> 2r & 3
// A task takes the quarters r = column and r = column + 2 of lane's eight bytes.
struct PairTask {
    int half, column, lane, first, second;
};

Q4KD_INLINE PairTask pair_task(int task) {
    int half = task >> 3, column = (task >> 2) & 1, lane = task & 3;
    int first = 128 * half + 32 * column + 8 * lane;
    return PairTask{half, column, lane, first, first + 64};
}

Q4KD_INLINE uint2 pairs_of(uint2 quants, int quarter) {
    return uint2{(quants.x >> (2 * quarter)) & 0x03030303u, (quants.y >> (2 * quarter)) & 0x03030303u};
}

// Q2_K, 84 bytes for 256 weights in 16 sub-blocks of 16, aligned to 4:
// 0                  16                          80       82          84
// | scales: 16 bytes | qs: 64 bytes              | d: f16 | dmin: f16 |
// weight = (d * (scales[j] & 15)) * q - dmin * (scales[j] >> 4), j = position / 16
struct Q2_K {
    static constexpr int weights = 256, bytes = 84, tasks = 16;

    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        PairTask at = pair_task(task);
        uint2 quants = load_eight<4>(base + 16 + 32 * at.half + 8 * at.lane);
        u32 both = load<u32>(base + 80);
        float d = f16_to_float(both & 0xFFFFu), dmin = f16_to_float(both >> 16);
        Octets out;
        out.first = at.first;
        out.second = at.second;
        u32 scales[2] = {load<u8>(base + (at.first >> 4)), load<u8>(base + (at.second >> 4))};
        ScalePair pair;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            pair.scale[i] = multiply(d, small_to_float(scales[i] & 15u, 0));
            pair.minimum[i] = multiply(dmin, small_to_float(scales[i] >> 4, 0));
        }
        scale_and_shift(out, pairs_of(quants, at.column), pairs_of(quants, at.column + 2), pair);
        return out;
    }
};

// Q3_K, 110 bytes for 256 weights in 16 sub-blocks of 16, aligned only to 2:
// 0                 32                        96                  108      110
// | hmask: 32 bytes | qs: 64 bytes            | scales: 12 bytes  | d: f16 |
// weight = (d * (scale[j] - 32)) * (q + 4 * bit - 4), j = position / 16; position p has bit p / 32 of hmask[p % 32]
//
// scales, as bits (A-P: scale 0-15, six bits each)
//  0 IIIIAAAA   1 JJJJBBBB   ...   7 PPPPHHHH
//  8 MMIIEEAA   9 NNJJFFBB   10 OOKKGGCC   11 PPLLHHDD
struct Q3_K {
    static constexpr int weights = 256, bytes = 110, tasks = 16;

    static Q4KD_INLINE u32 scale(const u8* scales, int j) {
        u32 low = load<u8>(scales + (j & 7)) >> (4 * (j >> 3)), high = load<u8>(scales + 8 + (j & 3)) >> (2 * (j >> 2));
        return (low & 15u) | ((high & 3u) << 4);
    }
    static Q4KD_INLINE u32 third_bits(u32 word, int bit) { return ((word >> bit) & 0x01010101u) << 2; }

    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        PairTask at = pair_task(task);
        uint2 quants = load_eight<2>(base + 32 + 32 * at.half + 8 * at.lane);
        uint2 mask = load_eight<2>(base + 8 * at.lane);
        float d = f16_to_float(load<u16>(base + 108));
        Octets out;
        out.first = at.first;
        out.second = at.second;
        uint2 first = pairs_of(quants, at.column), second = pairs_of(quants, at.column + 2);
        int bit = 4 * at.half + at.column;
        first = uint2{first.x | third_bits(mask.x, bit), first.y | third_bits(mask.y, bit)};
        second = uint2{second.x | third_bits(mask.x, bit + 2), second.y | third_bits(mask.y, bit + 2)};
        float first_scale = multiply(d, small_to_float(scale(base + 96, at.first >> 4), 32));
        float second_scale = multiply(d, small_to_float(scale(base + 96, at.second >> 4), 32));
        scale_quants(out, first, second, first_scale, second_scale, 4);
        return out;
    }
};

// The levels of four nibbles, one a byte: those of IQ4_NL and IQ4_XS (ggml's kvalues_iq4nl, which the format fixes),
//   -127 -104 -83 -65   -49 -35 -22 -10   1 13 25 38   53 69 89 113
// each plus 128. The table stays in registers: the three low bits of a nibble choose a byte among eight levels, and its
// highest bit chooses between the two halves of the table.
Q4KD_INLINE u32 levels_of(u32 nibbles) {
    u32 four = select_bytes(nibbles | (nibbles >> 4), 0, 0x4420u);  // the nibbles beside each other, in 16 bits
    u32 low = select_bytes(0x3F2D1801u, 0x766A5D4Fu, four);
    u32 high = select_bytes(0xA6998D81u, 0xF1D9C5B5u, four);
    return select_bytes(low, high, 0x3210u | ((four & 0x8888u) >> 1));
}

// Eight bytes of quants as the levels of their low nibbles and of their high ones, both scaled alike.
Q4KD_INLINE void scale_levels(Octets& out, uint2 quants, float scale) {
    uint2 low = {levels_of(quants.x & 0x0F0F0F0Fu), levels_of(quants.y & 0x0F0F0F0Fu)};
    uint2 high = {levels_of((quants.x >> 4) & 0x0F0F0F0Fu), levels_of((quants.y >> 4) & 0x0F0F0F0Fu)};
    scale_quants(out, low, high, scale, scale, 128);
}

// IQ4_NL, 18 bytes for 32 weights:  | d: f16 | qs: 16 bytes |
// weight[l] = d * level[qs[l] & 15], weight[16 + l] = d * level[qs[l] >> 4]
struct IQ4_NL {
    static constexpr int weights = 32, bytes = 18, tasks = 2;

    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        Octets out;
        out.first = 8 * task;
        out.second = out.first + 16;
        scale_levels(out, load_eight<2>(base + 2 + 8 * task), f16_to_float(load<u16>(base)));
        return out;
    }
};

// IQ4_XS, 136 bytes for 256 weights in 8 sub-blocks of 32, aligned to 8:
// 0        2               4                  8                                    136
// | d: f16 | scales_h: u16 | scales_l: 4 x u8 | qs: 128 bytes, 16 for a sub-block  |
// scale[j] = (scales_l[j / 2] >> 4 (j % 2)) & 15 | ((scales_h >> 2j) & 3) << 4; weight = (d * (scale[j] - 32)) * level
struct IQ4_XS {
    static constexpr int weights = 256, bytes = 136, tasks = 16;

    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        int j = task >> 1, half = task & 1;
        uint2 header = load<uint2>(base);
        u32 scale = ((header.y >> (4 * j)) & 15u) | (((header.x >> (16 + 2 * j)) & 3u) << 4);
        Octets out;
        out.first = 32 * j + 8 * half;
        out.second = out.first + 16;
        float d = f16_to_float(header.x & 0xFFFFu);
        scale_levels(out, load<uint2>(base + 8 + 16 * j + 8 * half), multiply(d, small_to_float(scale, 32)));
        return out;
    }
};
