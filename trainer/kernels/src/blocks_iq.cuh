// Decoding of the IQ types, whose weights are points of a grid: as blocks.cuh, bit-equal to gguf.quants.dequantize.
//
// A task decodes octets `task` and 16 + `task` of a block of 256 weights, eight each, so that the sixteen tasks of a
// block write 256 bytes side by side. Octet o is in sub-block o / 4 of 32 weights and in group o / 2 of 16.
//
// A grid lies in shared memory as in grids.cuh: 16 bits a point of eight levels, which arithmetic spreads, or, in IQ3,
// the four values of a point as bf16, 64 bits. The largest grid takes 4 KiB. The bit layouts, all fields aligned to 2:
//
//          0    2                  34               66          74                106         110
// IQ3_S    | d  | qs: 64 bytes                      | qh: 8     | signs: 32 bytes | scales: 4 |
// IQ3_XXS  | d  | qs: 64 bytes                      | 8 x u32: signs 4 x 7, scale 4           | (98)
// IQ2_S    | d  | qs: 32 bytes     | signs: 32      | qh: 8     | scales: 8 |                   (82)
// IQ2_XS   | d  | 32 x u16: point 9, signs 7        | scales: 8 |                               (74)
// IQ2_XXS  | d  | 8 x (4 points of 8, then u32: signs 4 x 7, scale 4) |                         (66)
// IQ1_S    | d  | qs: 32 bytes     | 8 x u16: 4 high parts of 3, scale 3, shift 1 |             (50)
//
//          0                32             48                  56     begins at a multiple of 8
// IQ1_M    | qs: 32 bytes   | qh: 16 bytes | scales: 4 x u16   |   four scales of 3, then four bits of d each
#pragma once
#include "blocks.cuh"
#include "grids.cuh"

// Four two-bit levels, the first lowest, to four bytes.
Q4KD_INLINE u32 spread_pairs(u32 levels) {
    levels = (levels | (levels << 12)) & 0x000F000Fu;
    return (levels | (levels << 6)) & 0x03030303u;
}

// Levels 0, 1, 2 of IQ2 are worth 8, 25 and 43.
Q4KD_INLINE u32 iq2_values(u32 levels) { return 0x08080808u + 17u * levels + ((levels >> 1) & 0x01010101u); }

Q4KD_INLINE uint2 iq2_point(u32 code) {
    return uint2{iq2_values(spread_pairs(code & 0xFFu)), iq2_values(spread_pairs(code >> 8))};
}

// Seven signs and the eighth, which makes the number of ones even.
Q4KD_INLINE u32 even_signs(u32 seven) {
    u32 parity = seven ^ (seven >> 4);
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return seven | ((parity & 1u) << 7);
}

// Byte `index` of two words plus 2^23 as float32, in one instruction on the device.
Q4KD_INLINE float biased_byte(uint2 words, int index) {
#ifdef __CUDA_ARCH__
    return as_float(__byte_perm(index < 4 ? words.x : words.y, 0x4B000000u, 0x7440u | (index & 3)));
#else
    return as_float(0x4B000000u | byte_of(words, index));
#endif
}

// Four magnitudes below 64, a byte each, to 64 plus or minus them: minus where one of four bits is set.
Q4KD_INLINE u32 sign_bytes(u32 magnitudes, u32 signs) {
    u32 mask = ((signs * 0x00204081u) & 0x01010101u) * 0xFFu;  // bit i to all of byte i
    return 0x40404040u + magnitudes - 2u * (magnitudes & mask);
}

// scale * magnitude, negative where a bit of `signs` is set.
Q4KD_INLINE void scale_signed(float* values, uint2 magnitudes, float scale, u32 signs) {
    uint2 biased = {sign_bytes(magnitudes.x, signs & 15u), sign_bytes(magnitudes.y, (signs >> 4) & 15u)};
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = multiply(scale, subtract(biased_byte(biased, i), 8388608.0f + 64.0f));
}

// Four words of two bf16, negative where bits 2 `pair` and 2 `pair` + 1 of eight signs are set. The product copies the
// signs so that these two lie at bits 15 and 31; the copies do not overlap.
template <int pair>
Q4KD_INLINE u32 sign_pair(u32 word, u32 signs) {
    constexpr u32 copies = (1u << (15 - 2 * pair)) + (1u << (30 - 2 * pair));
    return word ^ ((signs * copies) & 0x80008000u);
}

// scale * magnitude for two points of four bf16, negative where a bit of `signs` is set.
Q4KD_INLINE void scale_points(float* values, uint2 first, uint2 second, float scale, u32 signs) {
    u32 words[4] = {sign_pair<0>(first.x, signs), sign_pair<1>(first.y, signs), sign_pair<2>(second.x, signs),
                    sign_pair<3>(second.y, signs)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = multiply(scale, as_float(words[i] << 16));
        values[2 * i + 1] = multiply(scale, as_float(words[i] & 0xFFFF0000u));
    }
}

// scale / 8 * (8 point + shift): IQ1's points are -1, 0 or 1, shifted by an eighth, down where `down` is 1.
Q4KD_INLINE void scale_shifted(float* values, u32 code, float scale, u32 down) {
    uint2 eighths = {8u * spread_pairs(code & 0xFFu), 8u * spread_pairs(code >> 8)};
    float offset = 8388608.0f + (down ? 9.0f : 7.0f), eighth = multiply(scale, 0.125f);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = multiply(eighth, subtract(biased_byte(eighths, i), offset));
}

Q4KD_INLINE float odd_scale(float d, u32 scale) { return multiply(d, small_to_float(2u * scale + 1u, 0)); }
// d * (1/2 + scale) * unit, each step exact.
Q4KD_INLINE float half_scale(float d, u32 scale, float unit) {
    return multiply(multiply(d, small_to_float(2u * scale + 1u, 0)), multiply(0.5f, unit));
}
Q4KD_INLINE u32 nibble(const u8* bytes, int index) {
    return ((u32)load<u8>(bytes + (index >> 1)) >> (4 * (index & 1))) & 15u;
}
Q4KD_INLINE u32 word_of(const u8* address) { return load<u16>(address) | ((u32)load<u16>(address + 2) << 16); }
Q4KD_INLINE float leading_half(const u8* block) { return f16_to_float(load<u16>(block)); }

// A type with grid `table`: `octet` writes the eight weights of octet o.
template <class Type, int block_bytes, int points, class GridPoint = u16>
struct GridBlocks {
    using Point = GridPoint;
    static constexpr int weights = 256, bytes = block_bytes, tasks = 16, grid_bytes = points * sizeof(Point);
    const Point* grid;  // of `points`, in shared memory

    Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) const {
        const u8* base = blocks.packed + block * bytes;
        Octets out;
        out.first = 8 * task;
        out.second = 128 + 8 * task;
        Type::octet(grid, base, task, out.values);
        Type::octet(grid, base, 16 + task, out.values + 8);
        return out;
    }
};

struct IQ3_S : GridBlocks<IQ3_S, 110, 512, uint2> {
    static Q4KD_INLINE const u16* table() { return GRID_IQ3_S; }
    static Q4KD_INLINE void octet(const uint2* grid, const u8* base, int o, float* values) {
        u32 low = load<u16>(base + 2 + 2 * o), high = load<u8>(base + 66 + o / 4) >> (2 * (o & 3));
        float scale = odd_scale(leading_half(base), nibble(base + 106, o / 4));
        scale_points(values, grid[(low & 0xFFu) | ((high & 1u) << 8)], grid[(low >> 8) | ((high & 2u) << 7)], scale,
                     load<u8>(base + 74 + o));
    }
};

struct IQ3_XXS : GridBlocks<IQ3_XXS, 98, 256, uint2> {
    static Q4KD_INLINE const u16* table() { return GRID_IQ3_XXS; }
    static Q4KD_INLINE void octet(const uint2* grid, const u8* base, int o, float* values) {
        u32 pair = load<u16>(base + 2 + 2 * o), word = word_of(base + 66 + 4 * (o / 4));
        float scale = half_scale(leading_half(base), word >> 28, 0.5f);
        scale_points(values, grid[pair & 0xFFu], grid[pair >> 8], scale, even_signs((word >> (7 * (o & 3))) & 127u));
    }
};

struct IQ2_S : GridBlocks<IQ2_S, 82, 1024> {
    static Q4KD_INLINE const u16* table() { return GRID_IQ2_S; }
    static Q4KD_INLINE void octet(const u16* grid, const u8* base, int o, float* values) {
        u32 high = (load<u8>(base + 66 + o / 4) >> (2 * (o & 3))) & 3u;
        uint2 point = iq2_point(grid[load<u8>(base + 2 + o) | (high << 8)]);
        float scale = half_scale(leading_half(base), nibble(base + 74, o / 2), 0.25f);
        scale_signed(values, point, scale, load<u8>(base + 34 + o));
    }
};

struct IQ2_XS : GridBlocks<IQ2_XS, 74, 512> {
    static Q4KD_INLINE const u16* table() { return GRID_IQ2_XS; }
    static Q4KD_INLINE void octet(const u16* grid, const u8* base, int o, float* values) {
        u32 word = load<u16>(base + 2 + 2 * o);
        float scale = half_scale(leading_half(base), nibble(base + 66, o / 2), 0.25f);
        scale_signed(values, iq2_point(grid[word & 511u]), scale, even_signs(word >> 9));
    }
};

struct IQ2_XXS : GridBlocks<IQ2_XXS, 66, 256> {
    static Q4KD_INLINE const u16* table() { return GRID_IQ2_XXS; }
    static Q4KD_INLINE void octet(const u16* grid, const u8* base, int o, float* values) {
        const u8* pair = base + 2 + 8 * (o / 4);
        u32 word = word_of(pair + 4);
        float scale = half_scale(leading_half(base), word >> 28, 0.25f);
        scale_signed(values, iq2_point(grid[load<u8>(pair + (o & 3))]), scale,
                     even_signs((word >> (7 * (o & 3))) & 127u));
    }
};

struct IQ1_S : GridBlocks<IQ1_S, 50, 2048> {
    static Q4KD_INLINE const u16* table() { return GRID_IQ1; }
    static Q4KD_INLINE void octet(const u16* grid, const u8* base, int o, float* values) {
        u32 word = load<u16>(base + 34 + 2 * (o / 4)), high = (word >> (3 * (o & 3))) & 7u;
        float scale = odd_scale(leading_half(base), (word >> 12) & 7u);
        scale_shifted(values, grid[load<u8>(base + 2 + o) | (high << 8)], scale, word >> 15);
    }
};

struct IQ1_M : GridBlocks<IQ1_M, 56, 2048> {
    static Q4KD_INLINE const u16* table() { return GRID_IQ1; }
    static Q4KD_INLINE void octet(const u16* grid, const u8* base, int o, float* values) {
        uint2 scales = load<uint2>(base + 48);  // blocks of 56 bytes begin at multiples of 8
        u32 half = ((scales.x >> 12) & 0xFu) | ((scales.x >> 24) & 0xF0u) | ((scales.y >> 4) & 0xF00u) |
                   ((scales.y >> 16) & 0xF000u);
        u32 high = nibble(base + 32, o), group = o / 2;
        u32 scale = ((o < 16 ? scales.x : scales.y) >> (16 * ((group >> 2) & 1) + 3 * (group & 3))) & 7u;
        scale_shifted(values, grid[load<u8>(base + o) | ((high & 7u) << 8)], odd_scale(f16_to_float(half), scale),
                      high >> 3);
    }
};
