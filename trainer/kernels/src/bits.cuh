// Types, conversions and memory accesses shared by every kernel.
//
// Compiled by NVRTC for devices and by the host compiler for tests, so no header beyond what NVRTC builds in is used.
// Arithmetic that must equal the CPU decoders to the last bit goes through multiply() and subtract(), which are never
// contracted to a fused multiply-add (on the host: -ffp-contract=off).
#pragma once

#ifdef __CUDACC__
#define Q4KD_INLINE __host__ __device__ __forceinline__
#define Q4KD_DEVICE __device__ __forceinline__
#else
#include "host_cuda.h"
#define Q4KD_INLINE inline
#define Q4KD_DEVICE inline
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct bf16 {
    u16 bits;
};

Q4KD_INLINE float as_float(u32 bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    union { u32 u; float f; } value = {bits};
    return value.f;
#endif
}

Q4KD_INLINE u32 as_bits(float number) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(number);
#else
    union { float f; u32 u; } value = {number};
    return value.u;
#endif
}

Q4KD_INLINE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

Q4KD_INLINE float subtract(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fsub_rn(a, b);
#else
    return a - b;
#endif
}

// Integers 0..2^22 to float32 minus `offset`, exactly: 0x4B000000 is 2^23, whose last mantissa bit is worth 1.
// Conversion instructions run at a quarter of this rate.
Q4KD_INLINE float small_to_float(u32 value, int offset) {
    return subtract(as_float(0x4B000000u | value), 8388608.0f + (float)offset);
}

// f16 (1 sign, 5 exponent, 10 mantissa bits) to float32, exactly. Moving the fields to float32's places leaves the
// exponent 112 too low; multiplying by 2^112 corrects it and normalises subnormals. Infinities and NaN are put back.
Q4KD_INLINE float f16_to_float(u32 half) {
    u32 magnitude = (half & 0x7FFFu) << 13;
    u32 bits = as_bits(multiply(as_float(magnitude), as_float(0x77800000u)));
    if (magnitude >= 0x0F800000u) bits = magnitude | 0x7F800000u;
    return as_float(bits | ((half & 0x8000u) << 16));
}

Q4KD_INLINE float bf16_to_float(u32 bits) { return as_float(bits << 16); }
Q4KD_INLINE float to_float(bf16 value) { return bf16_to_float(value.bits); }
Q4KD_INLINE float to_float(float value) { return value; }

// float32 to bf16, round to nearest even; NaN stays NaN (quieted, sign and high payload kept).
Q4KD_INLINE bf16 round_to_bf16(float value) {
    u32 bits = as_bits(value);
    u32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) rounded = (bits >> 16) | 0x40u;
    return bf16{(u16)rounded};
}

// The same rounding of two values, `low` in the low half: one instruction on the device, where NaN becomes 0x7FFF.
Q4KD_INLINE u32 round_to_bf16x2(float low, float high) {
#ifdef __CUDA_ARCH__
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return (u32)round_to_bf16(low).bits | ((u32)round_to_bf16(high).bits << 16);
#endif
}

// The word that begins `shift` bits (0..31) into two neighbouring ones.
Q4KD_INLINE u32 join_words(u32 low, u32 high, int shift) {
    return (u32)((((unsigned long long)high << 32) | low) >> shift);
}

// Four of the eight bytes of two words: a selector's lowest three bits in each of the low four nibbles of `selectors`.
Q4KD_INLINE u32 select_bytes(u32 low, u32 high, u32 selectors) {
#ifdef __CUDA_ARCH__
    return __byte_perm(low, high, selectors & 0x7777u);
#else
    unsigned long long both = ((unsigned long long)high << 32) | low;
    u32 selected = 0;
    for (int i = 0; i < 4; i++) selected |= ((u32)(both >> (8 * ((selectors >> (4 * i)) & 7u))) & 0xFFu) << (8 * i);
    return selected;
#endif
}

// a / b for a >= 0, b > 0. A 64-bit division is a call of about a hundred instructions; sizes rarely need it.
Q4KD_INLINE i64 quotient(i64 a, i64 b) {
    if (((a | b) >> 32) == 0) return (i64)((u32)a / (u32)b);
    return a / b;
}

// Loads and stores of whole naturally aligned words. The host build checks each against the tensors it was given.
template <class T>
Q4KD_INLINE T load(const void* address) {  // read-only for the whole kernel
#ifdef __CUDA_ARCH__
    return __ldg(reinterpret_cast<const T*>(address));
#else
    return host_load<T>(address);
#endif
}

template <class T>
Q4KD_INLINE T read(const void* address) {  // may have been written by this thread
#ifdef __CUDA_ARCH__
    return *reinterpret_cast<const T*>(address);
#else
    return host_load<T>(address);
#endif
}

template <class T>
Q4KD_INLINE void write(void* address, T value) {
#ifdef __CUDA_ARCH__
    *reinterpret_cast<T*>(address) = value;
#else
    host_store<T>(address, value);
#endif
}

// `count` consecutive elements as float32. Eight at a time need 16-byte alignment.
// Eight bfloat16 to float32.
Q4KD_INLINE void unpack_bf16(uint4 words, float* values) {
    u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = as_float(pairs[i] << 16);
        values[2 * i + 1] = as_float(pairs[i] & 0xFFFF0000u);
    }
}

template <int count>
Q4KD_INLINE void read_floats(const bf16* source, float* values) {
    if constexpr (count == 8) {
        unpack_bf16(read<uint4>(source), values);
    } else {
        values[0] = bf16_to_float(read<u16>(source));
    }
}

template <int count>
Q4KD_INLINE void read_floats(const float* source, float* values) {
    if constexpr (count == 8) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float4 four = read<float4>(source + 4 * i);
            values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
        }
    } else {
        values[0] = read<float>(source);
    }
}

template <int count>
Q4KD_INLINE void write_floats(bf16* target, const float* values) {
    if constexpr (count == 8) {
        write(target, uint4{round_to_bf16x2(values[0], values[1]), round_to_bf16x2(values[2], values[3]),
                            round_to_bf16x2(values[4], values[5]), round_to_bf16x2(values[6], values[7])});
    } else {
        write(target, (u16)round_to_bf16(values[0]).bits);
    }
}

template <int count>
Q4KD_INLINE void write_floats(float* target, const float* values) {
    if constexpr (count == 8) {
        write(target, float4{values[0], values[1], values[2], values[3]});
        write(target + 4, float4{values[4], values[5], values[6], values[7]});
    } else {
        write(target, values[0]);
    }
}
