// What lies between the projections of a gated delta net and its delta rule: a short convolution, and a gated norm.
//
// One warp takes a head of a token, an element a lane at a time. Letters: M tokens, X channels of the convolution, W taps,
// D head size, V value heads.
#include "reduce.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(256)

// out = silu(sum over taps), and of the first `unit` channels, queries and keys, each head divided by its length. Tap
// W - 1 is that of the token itself; none reaches behind the first token of its sequence, or of its document if `starts`
// has these. Rows of x are `stride` elements apart; row m is position m % positions.
template <class T>
Q4KD_DEVICE void convolve_heads(const T* x, i64 stride, const float* taps, i64 W, const i64* starts, i64 positions,
                                i64 X, i64 D, i64 unit, float eps, i64 M, float* out) {
    i64 slot = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    i64 heads = X / D, row = quotient(slot, heads), first = (slot - row * heads) * D;
    if (row >= M) return;  // a whole warp at a time
    i64 reach = row - quotient(row, positions) * positions;
    if (starts) reach -= load<i64>(starts + row);
    if (reach > W - 1) reach = W - 1;
    float squares = 0.0f;
    for (i64 channel = first + lane; channel < first + D; channel += 32) {
        float sum = 0.0f;
        for (i64 back = reach; back >= 0; back--) {
            float value;
            read_floats<1>(x + (row - back) * stride + channel, &value);
            sum += value * load<float>(taps + (W - 1 - back) * X + channel);
        }
        sum = sum / (1.0f + expf(-sum));
        squares += sum * sum;
        write_floats<1>(out + row * X + channel, &sum);
    }
    if (first >= unit) return;
    float scale = 1.0f / sqrtf(sum_lanes(squares, 32) + eps);
    for (i64 channel = first + lane; channel < first + D; channel += 32) {  // what this lane wrote itself
        float value;
        read_floats<1>(out + row * X + channel, &value);
        value *= scale;
        write_floats<1>(out + row * X + channel, &value);
    }
}

// out = x / sqrt(mean(x^2) + eps) * weight * silu(z), each head by itself; rows of z are `stride` elements apart.
template <class T>
Q4KD_DEVICE void gate_heads(const float* x, const T* z, i64 stride, const float* weight, i64 V, i64 D, float eps, i64 M,
                            T* out) {
    i64 slot = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    i64 row = quotient(slot, V), head = slot - row * V;
    if (row >= M) return;  // a whole warp at a time
    float squares = 0.0f;
    for (i64 i = lane; i < D; i += 32) {
        float value;
        read_floats<1>(x + slot * D + i, &value);
        squares += value * value;
    }
    float scale = 1.0f / sqrtf(sum_lanes(squares, 32) / (float)D + eps);
    for (i64 i = lane; i < D; i += 32) {
        float value, gate;
        read_floats<1>(x + slot * D + i, &value);
        read_floats<1>(z + row * stride + head * D + i, &gate);
        value = value * scale * load<float>(weight + i) * (gate / (1.0f + expf(-gate)));
        write_floats<1>(out + slot * D + i, &value);
    }
}

#define STATES(type, T)                                                                                              \
    KERNEL convolve_##type(const T* x, i64 stride, const float* taps, i64 W, const i64* starts, i64 positions,       \
                           i64 X, i64 D, i64 unit, float eps, i64 M, float* out) {                                   \
        convolve_heads<T>(x, stride, taps, W, starts, positions, X, D, unit, eps, M, out);                           \
    }                                                                                                                \
    KERNEL states_##type(const float* x, const T* z, i64 stride, const float* weight, i64 V, i64 D, float eps,       \
                         i64 M, T* out) {                                                                            \
        gate_heads<T>(x, z, stride, weight, V, D, eps, M, out);                                                      \
    }

STATES(bf16, bf16)
STATES(f32, float)
