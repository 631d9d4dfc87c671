// Decoding of four-bit floats (MXFP4, NVFP4) and of ternary weights (TQ1_0, TQ2_0): as blocks.cuh, bit-equal to
// gguf.quants.dequantize.
#pragma once
#include "blocks.cuh"

// Four E2M1 numbers, one a byte, to 12 plus twice their value (so that minus zero is zero). Twice the magnitudes that
// x = 0..7 stand for are 0, 1, 2, 3, 4, 6, 8 and 12: from 4 on, x + (x & 3) and another 2 for x = 7.
Q4KD_INLINE u32 e2m1_to_bytes(u32 nibbles) {
    u32 x = nibbles & 0x07070707u, large = ((x >> 2) & 0x01010101u) * 3u, rest = x & large;
    u32 magnitude = x + rest + ((rest & (rest >> 1) & 0x01010101u) << 1);
    u32 sign = (nibbles >> 3) & 0x01010101u, mask = (sign << 8) - sign;
    return 0x0C0C0C0Cu + magnitude - ((magnitude & mask) << 1);
}

// Low nibbles, then high ones, of eight bytes.
Q4KD_INLINE void scale_e2m1(Octets& out, uint2 quants, float scale) {
    uint2 low = {e2m1_to_bytes(quants.x & 0x0F0F0F0Fu), e2m1_to_bytes(quants.y & 0x0F0F0F0Fu)};
    uint2 high = {e2m1_to_bytes((quants.x >> 4) & 0x0F0F0F0Fu), e2m1_to_bytes((quants.y >> 4) & 0x0F0F0F0Fu)};
    scale_quants(out, low, high, scale, scale, 12);
}

// MXFP4, 17 bytes for 32 weights:  | e: u8 | qs: 16 bytes |
// weight[l], weight[16 + l] = 2^(e - 128) * twice E2M1 of the low, the high nibble of qs[l]
struct MXFP4 {
    static constexpr int weights = 32, bytes = 17, tasks = 2;

    // 2^(e - 128); the two least are subnormal.
    static Q4KD_INLINE float scale(u32 e) { return as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

    // Eight bytes from any address: of an odd one, the byte before it (which the block holds) is read too.
    static Q4KD_INLINE uint2 eight_bytes(const u8* address) {
        int odd = (int)(reinterpret_cast<unsigned long long>(address) & 1);
        uint2 words = load_eight<2>(address - odd);
        u32 last = odd ? load<u8>(address + 7) : 0u;
        return uint2{join_words(words.x, words.y, 8 * odd), join_words(words.y, last, 8 * odd)};
    }
    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        Octets out;
        out.first = 8 * task;
        out.second = out.first + 16;
        scale_e2m1(out, eight_bytes(base + 1 + 8 * task), scale(load<u8>(base)));
        return out;
    }
};

// NVFP4, 36 bytes for 64 weights:  | d: 4 x UE4M3 | qs: 32 bytes |     sub-block s of 16: d[s], qs[8s .. 8s + 7]
// weight[16s + j], weight[16s + 8 + j] = d[s] / 2 * twice E2M1 of the low, the high nibble of qs[8s + j], times the
// tensor's own scale, which lies beside it in the file
struct NVFP4 {
    static constexpr int weights = 64, bytes = 36, tasks = 4;
    float tensor_scale;

    // Half of 1 + m / 8 times 2^(exponent - 7), or of m / 8 times 2^-6: seven bits moved to float32's places leave the
    // exponent 120 too low, and multiplying by 2^119 corrects that, halves it and normalises. 0x7F is zero.
    static Q4KD_INLINE float scale(u32 byte) {
        if (byte == 0x7Fu) return 0.0f;
        return multiply(as_float((byte & 0x7Fu) << 20), as_float((119u + 127u) << 23));
    }
    Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) const {
        const u8* base = blocks.packed + block * bytes;
        Octets out;
        out.first = 16 * task;
        out.second = out.first + 8;
        scale_e2m1(out, load_eight<2>(base + 4 + 8 * task), scale(load<u8>(base + task)));
#pragma unroll
        for (int i = 0; i < 16; i++) out.values[i] = multiply(out.values[i], tensor_scale);
        return out;
    }
};

// TQ2_0, 66 bytes for 256 weights:  | qs: 64 bytes | d: f16 |
// weight[128h + 32n + m] = d * ((qs[32h + m] >> 2n & 3) - 1)
struct TQ2_0 {
    static constexpr int weights = 256, bytes = 66, tasks = 16;

    static Q4KD_INLINE uint2 pairs(uint2 quants, int shift) {
        return uint2{(quants.x >> shift) & 0x03030303u, (quants.y >> shift) & 0x03030303u};
    }
    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        int shift = 2 * (task >> 2), lane = 8 * (task & 3);
        float d = f16_to_float(load<u16>(base + 64));
        Octets out;
        out.first = 8 * task;
        out.second = out.first + 128;
        uint2 first = load_eight<2>(base + lane), second = load_eight<2>(base + 32 + lane);
        scale_quants(out, pairs(first, shift), pairs(second, shift), d, d, 1);
        return out;
    }
};

// TQ1_0, 54 bytes for 256 weights, five base-3 digits a byte, or four:  | qs: 48 bytes | qh: 4 bytes | d: f16 |
// digit(x, n) = (x * 3^n mod 256) * 3 / 256,  weight = d * (digit - 1)
// weight[32n + m]: qs[m], m < 32;  weight[160 + 16n + m]: qs[32 + m], m < 16;  weight[240 + 4n + m]: qh[m], m < 4
struct TQ1_0 {
    static constexpr int weights = 256, bytes = 54, tasks = 16;

    // Digit n of four bytes. Products of the even and of the odd bytes have 16 bits of room.
    static Q4KD_INLINE u32 digits(u32 four, int n) {
        u32 power = n == 4 ? 81u : (0x1B090301u >> (8 * n)) & 0xFFu;  // 3^n
        u32 even = ((four & 0x00FF00FFu) * power) & 0x00FF00FFu;
        u32 odd = (((four >> 8) & 0x00FF00FFu) * power) & 0x00FF00FFu;
        return ((even * 3u >> 8) & 0x00030003u) | ((odd * 3u) & 0x03000300u);
    }
    // The last two octets take two digits of the same four bytes; every thread does the same, whichever octet it has.
    static Q4KD_INLINE uint2 octet(const u8* base, int o) {
        int from = o < 20 ? 8 * (o & 3) : o < 30 ? 32 + 8 * (o & 1) : 44, last = o >= 30;
        int n = o < 20 ? o / 4 : o < 30 ? (o - 20) / 2 : 2 * (o - 30);
        uint2 eight = load_eight<2>(base + from);
        return uint2{digits(last ? eight.y : eight.x, n), digits(eight.y, n + last)};
    }
    static Q4KD_INLINE Octets decode(Blocks blocks, i64 block, int task) {
        const u8* base = blocks.packed + block * bytes;
        float d = f16_to_float(load<u16>(base + 52));
        Octets out;
        out.first = 8 * task;
        out.second = out.first + 128;
        scale_quants(out, octet(base, task), octet(base, 16 + task), d, d, 1);
        return out;
    }
};
