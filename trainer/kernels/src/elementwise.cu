// Norms, rotary embedding, gated activations and bias: bf16 (or float32) in and out, float32 arithmetic, one rounding at the end.
//
// Each comes eight elements at a time (16-byte accesses; `_v8`) and one at a time for sizes and strides that are not
// multiples of eight (`_v1`). Letters: M tokens, H hidden size, F feed-forward size, D head dimension.
#include "reduce.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(256)

// Sum over a block of 256 threads, the same in all of them. One use a kernel: `partial` is not protected for a second.
Q4KD_DEVICE float sum_block(float value) {
    __shared__ float partial[8];
    value = sum_lanes(value, 32);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < 8; i++) total += partial[i];
    return total;
}

// One block a row: out = x / sqrt(mean(x^2) + eps) * weight.
template <int width, class In, class Out>
Q4KD_DEVICE void normalise_row(const In* x, const float* weight, i64 H, float eps, Out* out) {
    float squares = 0.0f;
    for (i64 i = (i64)threadIdx.x * width; i < H; i += 256 * width) {
        float values[width];
        read_floats<width>(x + i, values);
#pragma unroll
        for (int j = 0; j < width; j++) squares += values[j] * values[j];
    }
    float scale = 1.0f / sqrtf(sum_block(squares) / (float)H + eps);
    for (i64 i = (i64)threadIdx.x * width; i < H; i += 256 * width) {
        float values[width], weights[width];
        read_floats<width>(x + i, values);
        read_floats<width>(weight + i, weights);
#pragma unroll
        for (int j = 0; j < width; j++) values[j] = values[j] * scale * weights[j];
        write_floats<width>(out + i, values);
    }
}

// residual += delta, rounded to the residual's type. Each thread then normalises the elements it wrote itself.
template <int width, class Residual, class Delta>
Q4KD_DEVICE void add_to_row(Residual* residual, const Delta* delta, i64 H) {
    for (i64 i = (i64)threadIdx.x * width; i < H; i += 256 * width) {
        float values[width], added[width];
        read_floats<width>(residual + i, values);
        read_floats<width>(delta + i, added);
#pragma unroll
        for (int j = 0; j < width; j++) values[j] += added[j];
        write_floats<width>(residual + i, values);
    }
}

#define NORM(width, in, In, to, Out)                                                                                 \
    KERNEL rms_norm_##in##_##to##_v##width(const In* x, const float* weight, i64 H, float eps, Out* out) {           \
        i64 row = (i64)blockIdx.x * H;                                                                               \
        normalise_row<width>(x + row, weight, H, eps, out + row);                                                    \
    }
#define ADD_NORM(width, in, Residual, from, Delta, to, Out)                                                          \
    KERNEL add_rms_norm_##in##_##from##_##to##_v##width(Residual* residual, const Delta* delta, const float* weight, \
                                                        i64 H, float eps, Out* out) {                                \
        i64 row = (i64)blockIdx.x * H;                                                                               \
        add_to_row<width>(residual + row, delta + row, H);                                                           \
        normalise_row<width>(residual + row, weight, H, eps, out + row);                                             \
    }
#define NORMS(width, in, In)                                                                                         \
    NORM(width, in, In, bf16, bf16)                                                                                  \
    NORM(width, in, In, f32, float)                                                                                  \
    ADD_NORM(width, in, In, bf16, bf16, bf16, bf16)                                                                  \
    ADD_NORM(width, in, In, bf16, bf16, f32, float)                                                                  \
    ADD_NORM(width, in, In, f32, float, bf16, bf16)                                                                  \
    ADD_NORM(width, in, In, f32, float, f32, float)

NORMS(8, bf16, bf16)
NORMS(8, f32, float)
NORMS(1, bf16, bf16)
NORMS(1, f32, float)

// q and k inside a fused product: rows `stride` elements apart, heads side by side. cos and sin: [positions, D/2];
// row m is position m % positions. Bias [heads * D] and norm weights [D] may be null. Order: bias, norm, rotation.
template <class T>
struct Projection {
    T* values;
    i64 stride, heads;
    const float *bias, *norm;
};

struct Rotary {
    const float *cos, *sin;
    i64 positions, head_dim;
    float eps;
};

// Pair i of a head is (i, i + D/2) with split halves, (2i, 2i + 1) interleaved.
template <bool interleaved>
Q4KD_INLINE i64 pair_place(i64 pair, int member, i64 half) {
    return interleaved ? 2 * pair + member : pair + member * half;
}

// D/16 neighbouring threads a head (a power of two up to 32), eight pairs a thread as two runs of eight elements.
template <bool interleaved, class T>
Q4KD_DEVICE void rotate_wide(Projection<T> q, Projection<T> k, Rotary rotary, i64 M) {
    i64 D = rotary.head_dim, item = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 lanes = D / 16, slot = quotient(item, lanes), lane = item - slot * lanes;
    i64 heads = q.heads + k.heads, row = quotient(slot, heads), head = slot - row * heads;
    bool active = row < M;  // the others stay for the sum over lanes
    bool is_q = head < q.heads;
    Projection<T> side = is_q ? q : k;
    if (!is_q) head -= q.heads;
    i64 first = interleaved ? 16 * lane : 8 * lane, second = first + (interleaved ? 8 : D / 2);
    T* values = side.values + row * side.stride + head * D;

    float x[16];
    float squares = 0.0f;
    if (active) {
        read_floats<8>(values + first, x);
        read_floats<8>(values + second, x + 8);
        if (side.bias) {
            float bias[16];
            read_floats<8>(side.bias + head * D + first, bias);
            read_floats<8>(side.bias + head * D + second, bias + 8);
#pragma unroll
            for (int i = 0; i < 16; i++) x[i] += bias[i];
        }
#pragma unroll
        for (int i = 0; i < 16; i++) squares += x[i] * x[i];
    }
    squares = sum_lanes(squares, (int)lanes);
    if (!active) return;
    if (side.norm) {
        float scale = 1.0f / sqrtf(squares / (float)D + rotary.eps);
        float weights[16];
        read_floats<8>(side.norm + first, weights);
        read_floats<8>(side.norm + second, weights + 8);
#pragma unroll
        for (int i = 0; i < 16; i++) x[i] = x[i] * scale * weights[i];
    }
    float cosines[8], sines[8];
    i64 position = row - quotient(row, rotary.positions) * rotary.positions, angles = position * (D / 2) + 8 * lane;
    read_floats<8>(rotary.cos + angles, cosines);
    read_floats<8>(rotary.sin + angles, sines);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + 8;
        float real = x[a], imaginary = x[b];
        x[a] = real * cosines[i] - imaginary * sines[i];
        x[b] = imaginary * cosines[i] + real * sines[i];
    }
    write_floats<8>(values + first, x);
    write_floats<8>(values + second, x + 8);
}

// One warp a head, one pair a lane: any even D, any alignment.
template <bool interleaved, class T>
Q4KD_DEVICE void rotate_narrow(Projection<T> q, Projection<T> k, Rotary rotary, i64 M) {
    i64 D = rotary.head_dim, half = D / 2, item = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 slot = item / 32, lane = item % 32;
    i64 heads = q.heads + k.heads, row = quotient(slot, heads), head = slot - row * heads;
    if (row >= M) return;  // a whole warp at a time
    bool is_q = head < q.heads;
    Projection<T> side = is_q ? q : k;
    if (!is_q) head -= q.heads;
    T* values = side.values + row * side.stride + head * D;
    i64 position = row - quotient(row, rotary.positions) * rotary.positions;

    float scale = 1.0f;
    if (side.norm) {
        float squares = 0.0f;
        for (i64 pair = lane; pair < half; pair += 32) {
            for (int member = 0; member < 2; member++) {
                i64 place = pair_place<interleaved>(pair, member, half);
                float x;
                read_floats<1>(values + place, &x);
                if (side.bias) x += load<float>(side.bias + head * D + place);
                squares += x * x;
            }
        }
        scale = 1.0f / sqrtf(sum_lanes(squares, 32) / (float)D + rotary.eps);
    }
    for (i64 pair = lane; pair < half; pair += 32) {
        float x[2];
        for (int member = 0; member < 2; member++) {
            i64 place = pair_place<interleaved>(pair, member, half);
            read_floats<1>(values + place, x + member);
            if (side.bias) x[member] += load<float>(side.bias + head * D + place);
            if (side.norm) x[member] = x[member] * scale * load<float>(side.norm + place);
        }
        i64 angle = position * half + pair;
        float cosine = load<float>(rotary.cos + angle), sine = load<float>(rotary.sin + angle);
        float rotated[2] = {x[0] * cosine - x[1] * sine, x[1] * cosine + x[0] * sine};
        for (int member = 0; member < 2; member++)
            write_floats<1>(values + pair_place<interleaved>(pair, member, half), rotated + member);
    }
}

#define ROPE(layout, interleaved, type, T)                                                                           \
    KERNEL rope_##layout##_##type##_v8(ROPE_PARAMETERS(T)) { rotate_wide<interleaved, T>(ROPE_ARGUMENTS(T)); }       \
    KERNEL rope_##layout##_##type##_v1(ROPE_PARAMETERS(T)) { rotate_narrow<interleaved, T>(ROPE_ARGUMENTS(T)); }
#define ROPE_PARAMETERS(T)                                                                                           \
    T *q, i64 q_stride, i64 q_heads, const float *q_bias, const float *q_norm, T *k, i64 k_stride, i64 k_heads,      \
        const float *k_bias, const float *k_norm, const float *cos, const float *sin, i64 positions, i64 D,          \
        float eps, i64 M
#define ROPE_ARGUMENTS(T)                                                                                            \
    Projection<T>{q, q_stride, q_heads, q_bias, q_norm}, Projection<T>{k, k_stride, k_heads, k_bias, k_norm},        \
        Rotary{cos, sin, positions, D, eps}, M

ROPE(split, false, bf16, bf16)
ROPE(split, false, f32, float)
ROPE(interleaved, true, bf16, bf16)
ROPE(interleaved, true, f32, float)

// x / (1 + exp(-x)). For bf16 by the device's approximate exponential and division, good to 2^-20 and half the work.
template <class T>
Q4KD_INLINE float silu(float x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 2) return __fdividef(x, 1.0f + __expf(-x));
#endif
    return x / (1.0f + expf(-x));
}

// GELU by its tanh formula: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).
Q4KD_INLINE float gelu(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// out = silu(gate) * up, or gelu(gate) * up, from rows [gate | up] of 2F.
template <int width, bool is_gelu, class T>
Q4KD_DEVICE void gate_rows(const T* gate_up, i64 M, i64 F, T* out) {
    i64 item = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * width;
    if (item >= M * F) return;
    i64 row = quotient(item, F), column = item - row * F;
    float gates[width], ups[width];
    read_floats<width>(gate_up + row * 2 * F + column, gates);
    read_floats<width>(gate_up + row * 2 * F + F + column, ups);
#pragma unroll
    for (int i = 0; i < width; i++) gates[i] = (is_gelu ? gelu(gates[i]) : silu<T>(gates[i])) * ups[i];
    write_floats<width>(out + item, gates);
}

// x += bias, rows `stride` elements apart.
template <int width, class T>
Q4KD_DEVICE void add_to_columns(T* x, i64 stride, const float* bias, i64 M, i64 columns) {
    i64 item = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * width;
    if (item >= M * columns) return;
    i64 row = quotient(item, columns), column = item - row * columns;
    T* place = x + row * stride + column;
    float values[width], biases[width];
    read_floats<width>(place, values);
    read_floats<width>(bias + column, biases);
#pragma unroll
    for (int i = 0; i < width; i++) values[i] += biases[i];
    write_floats<width>(place, values);
}

#define GATE_AND_BIAS(width, type, T)                                                                                \
    KERNEL swiglu_##type##_v##width(const T* gate_up, i64 M, i64 F, T* out) {                                        \
        gate_rows<width, false>(gate_up, M, F, out);                                                                 \
    }                                                                                                                \
    KERNEL geglu_##type##_v##width(const T* gate_up, i64 M, i64 F, T* out) {                                         \
        gate_rows<width, true>(gate_up, M, F, out);                                                                  \
    }                                                                                                                \
    KERNEL add_bias_##type##_v##width(T* x, i64 stride, const float* bias, i64 M, i64 columns) {                     \
        add_to_columns<width>(x, stride, bias, M, columns);                                                          \
    }

GATE_AND_BIAS(8, bf16, bf16)
GATE_AND_BIAS(8, f32, float)
GATE_AND_BIAS(1, bf16, bf16)
GATE_AND_BIAS(1, f32, float)
