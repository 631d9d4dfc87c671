// Softmax, divergence and their gradient over rows of student and teacher logits; loss/fused.py has the equation.
//
// A row is cut into segments of 8192 columns (2048 in width 1), a block each, whose logits lie in registers.
// `loss_stats_*` reads them once and writes what a segment adds to its row's sums; `loss_grad_*` adds those up, reads the
// logits again and writes the gradient. `loss_fused_*` does both with one read (kd_rows.cuh): the blocks of a row wait
// for each other's sums in between. jsd, whose value no sum of unnormalised terms gives, has a step between,
// `loss_jsd_*`.
//
// With a segment's maxima m and u = s / T, v = t / T, the sums are Z = sum exp(u - m_u), Z_1 = sum exp(s - m_s),
// W = sum exp(v - m_v) and, with d = (v - m_v) - (u - m_u), A = sum exp(v - m_v) d (forward) or -sum exp(u - m_u) d
// (reverse). Over the row, KL(p || q) = A / W - log(W / Z) and KL(q || p) = A / Z - log(Z / W), in differences of
// logits alone: what both have in common cancels before anything is rounded, and equal rows give exactly zero.
//
// Letters: C rows, V columns. Width 8 reads 16 bytes at a time, width 1 serves other strides and sizes.
#pragma once
#include "reduce.cuh"

enum Kind { CE_ONLY, FORWARD, REVERSE, JSD };

// Elements of either side that a thread holds, by width, and a block's columns.
template <int width>
inline constexpr int HELD = width == 8 ? 32 : 8;
template <int width>
inline constexpr int SEGMENT = 256 * HELD<width>;
static constexpr int SUMS = 8;  // of a segment: m_s, m_t, Z_1, Z, W, A, and two for jsd

struct Logits {
    const void* values;
    i64 stride;
};

struct Knobs {
    float alpha, inverse_t, kd_scale, t_squared, beta;  // kd_scale = (1 - alpha) T; it and alpha scale gradients only
};

Q4KD_DEVICE Knobs read_knobs(const float* from) {
    return Knobs{load<float>(from), load<float>(from + 1), load<float>(from + 2), load<float>(from + 3),
                 load<float>(from + 4)};
}

Q4KD_INLINE float below_all() { return as_float(0xFF800000u); }  // minus infinity

// exp for arguments up to 0: an error of 2^-22 and of |x| 2^-24, relative.
Q4KD_INLINE float exponential(float x) {
#ifdef __CUDA_ARCH__
    return __expf(x);
#else
    return expf(x);
#endif
}

// What other blocks of a running kernel have written: from L2, past the L1 of this one's multiprocessor.
Q4KD_DEVICE float read_shared_sum(const float* address) {
#ifdef __CUDA_ARCH__
    return __ldcg(address);
#else
    return host_load<float>(address);
#endif
}

// A thread's place in its row: element j * width + i of step j is column `first(j) + i`.
template <int width>
struct Place {
    i64 row, segment, columns;
    Q4KD_DEVICE Place(i64 block, i64 segments, i64 columns_) : columns(columns_) {
        row = quotient(block, segments);
        segment = block - row * segments;
    }
    Q4KD_DEVICE i64 first(int j) const { return segment * SEGMENT<width> + ((i64)j * 256 + threadIdx.x) * width; }
    Q4KD_DEVICE bool has(int j) const { return first(j) < columns; }
};

template <int width, class In>
Q4KD_DEVICE void read_held(const Place<width>& place, Logits logits, float* held) {
    const In* row = (const In*)logits.values + place.row * logits.stride;
#pragma unroll
    for (int j = 0; j < HELD<width> / width; j++)
        if (place.has(j)) read_floats<width>(row + place.first(j), held + j * width);
}

// A teacher's logits are taken no lower (loss/config.py says why and has the same number); NaN stays NaN.
static constexpr float LEAST_LOGIT = -65504.0f;

Q4KD_INLINE float no_lower(float logit) { return logit < LEAST_LOGIT ? LEAST_LOGIT : logit; }

template <int width, class In>
Q4KD_DEVICE void read_teacher(const Place<width>& place, Logits logits, float* held) {
    read_held<width, In>(place, logits, held);
#pragma unroll
    for (int j = 0; j < HELD<width> / width; j++)
        if (place.has(j)) {
#pragma unroll
            for (int i = j * width; i < (j + 1) * width; i++) held[i] = no_lower(held[i]);
        }
}

// The segment's sums, the same in every thread.
template <int width, int kind>
Q4KD_DEVICE void sum_segment(const Place<width>& place, const float* s, const float* t, const Knobs& knobs,
                             float* sums) {
    __shared__ float maxima[8][2], totals[8][4];
    float most[2] = {below_all(), below_all()};
#pragma unroll
    for (int j = 0; j < HELD<width> / width; j++)
        if (place.has(j)) {
#pragma unroll
            for (int i = j * width; i < (j + 1) * width; i++) {
                most[0] = fmaxf(most[0], s[i]);
                if (kind != CE_ONLY) most[1] = fmaxf(most[1], t[i]);
            }
        }
    reduce_block<2, true>(most, maxima);
    bool heated = kind != CE_ONLY && knobs.inverse_t != 1.0f;
    float added[4] = {};  // Z_1, Z, W, A
#pragma unroll
    for (int j = 0; j < HELD<width> / width; j++)
        if (place.has(j)) {
#pragma unroll
            for (int i = j * width; i < (j + 1) * width; i++) {
                float u = s[i] - most[0];
                if (kind == CE_ONLY || heated) added[0] += exponential(u);
                if (kind == CE_ONLY) continue;
                u *= knobs.inverse_t;
                float v = (t[i] - most[1]) * knobs.inverse_t;
                float q = exponential(u), p = exponential(v);
                added[1] += q;
                added[2] += p;
                if (kind == FORWARD) added[3] += p * (v - u);
                if (kind == REVERSE) added[3] += q * (u - v);
            }
        }
    reduce_block<4, false>(added, totals);
    if (kind != CE_ONLY && !heated) added[0] = added[1];
    sums[0] = most[0], sums[1] = most[1];
    for (int i = 0; i < 4; i++) sums[2 + i] = added[i];
}

Q4KD_DEVICE void write_sums(float* sums_of_row, i64 segment, const float* sums) {
    if (threadIdx.x < 6) {
        float value = sums[0];
#pragma unroll
        for (int i = 1; i < 6; i++)
            if (threadIdx.x == (u32)i) value = sums[i];
        write(sums_of_row + segment * SUMS + threadIdx.x, value);
    }
}

// A row's normalisation, the same in every thread.
struct Row {
    float m_s, m_t, z_1, z, w;
    float log_ratio;  // log(W / Z)
    float divergence, student_part;
};

// Adds up the sums of a row's segments, in the first warp, and shares them.
template <int kind>
Q4KD_DEVICE Row sum_row(const float* sums, i64 segments, const Knobs& knobs) {
    __shared__ Row shared;
    if (threadIdx.x < 32) {
        Row row = {below_all(), below_all(), 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        for (i64 first = 0; first < segments; first += 32) {
            bool has = first + threadIdx.x < segments;
            const float* from = sums + (first + threadIdx.x) * SUMS;
            row.m_s = fmaxf(row.m_s, max_lanes(has ? read_shared_sum(from) : below_all()));
            if (kind != CE_ONLY) row.m_t = fmaxf(row.m_t, max_lanes(has ? read_shared_sum(from + 1) : below_all()));
        }
        float crossed = 0.0f;
        for (i64 first = 0; first < segments; first += 32) {
            bool has = first + threadIdx.x < segments;
            const float* from = sums + (first + threadIdx.x) * SUMS;
            float below_s = has ? read_shared_sum(from) - row.m_s : 0.0f;
            row.z_1 += sum_lanes(has ? read_shared_sum(from + 2) * exponential(below_s) : 0.0f, 32);
            if (kind == CE_ONLY) continue;
            float below_t = has ? read_shared_sum(from + 1) - row.m_t : 0.0f;
            float u = below_s * knobs.inverse_t, v = below_t * knobs.inverse_t;
            float z = has ? read_shared_sum(from + 3) * exponential(u) : 0.0f;
            float w = has ? read_shared_sum(from + 4) * exponential(v) : 0.0f;
            row.z += sum_lanes(z, 32);
            row.w += sum_lanes(w, 32);
            float a = has ? read_shared_sum(from + 5) : 0.0f;
            if (kind == FORWARD) crossed += sum_lanes(a * exponential(v) + w * (v - u), 32);
            if (kind == REVERSE) crossed += sum_lanes(a * exponential(u) + z * (u - v), 32);
        }
        if (kind != CE_ONLY) row.log_ratio = logf(row.w / row.z);
        if (kind == FORWARD) row.divergence = crossed / row.w - row.log_ratio;
        if (kind == REVERSE) row.divergence = row.student_part = crossed / row.z + row.log_ratio;
        if (threadIdx.x == 0) shared = row;
    }
    __syncthreads();
    return shared;
}

#ifdef __CUDACC__
#define Q4KD_CALL __device__ __noinline__
#else
#define Q4KD_CALL inline
#endif

// log(q / m), log(p / m) for log(p / q) = d and m = beta p + (1 - beta) q: exact zeros at d = 0, no overflow.
Q4KD_CALL void mix(float d, float beta, float* log_q_m, float* log_p_m) {
    if (d > 0.0f) {
        *log_p_m = -log1pf((1.0f - beta) * expm1f(-d));
        *log_q_m = *log_p_m - d;
    } else {
        *log_q_m = -log1pf(beta * expm1f(d));
        *log_p_m = *log_q_m + d;
    }
}

// The segment's part of KL(p || m) and KL(q || m).
template <int width>
Q4KD_DEVICE void sum_mixed(const Place<width>& place, const float* s, const float* t, const Knobs& knobs,
                           const Row& row, float* parts) {
    __shared__ float totals[8][2];
    float per_z = 1.0f / row.z, per_w = 1.0f / row.w;
    parts[0] = parts[1] = 0.0f;
#pragma unroll
    for (int j = 0; j < HELD<width> / width; j++)
        if (place.has(j)) {
#pragma unroll
            for (int i = j * width; i < (j + 1) * width; i++) {
                float u = (s[i] - row.m_s) * knobs.inverse_t, v = (t[i] - row.m_t) * knobs.inverse_t;
                float log_q_m, log_p_m;
                mix((v - u) - row.log_ratio, knobs.beta, &log_q_m, &log_p_m);
                parts[0] += exponential(v) * per_w * log_p_m;
                parts[1] += exponential(u) * per_z * log_q_m;
            }
        }
    reduce_block<2, false>(parts, totals);
}

// Completes a jsd row from the parts of its segments; every thread adds them up in the same order.
Q4KD_DEVICE void sum_parts(const float* sums, i64 segments, const Knobs& knobs, Row* row) {
    float teacher_part = 0.0f;
    for (i64 segment = 0; segment < segments; segment++) {
        teacher_part += read_shared_sum(sums + segment * SUMS + 6);
        row->student_part += read_shared_sum(sums + segment * SUMS + 7);
    }
    row->divergence = knobs.beta * teacher_part + (1.0f - knobs.beta) * row->student_part;
}

// Where a call's columns lie in the vocabulary, and what it writes.
struct Output {
    i64 first_column;
    const i64* labels;
    void* gradient;
    i64 stride;
    float *ce, *kd;
};

template <int width, int kind, class Out>
Q4KD_DEVICE void write_gradient(const Place<width>& place, const float* s, const float* t, const Knobs& knobs,
                                const Row& row, const Output& output) {
    bool heated = kind != CE_ONLY && knobs.inverse_t != 1.0f;
    i64 label = load<i64>(output.labels + place.row) - output.first_column;
    float per_z_1 = knobs.alpha / row.z_1, per_z = 1.0f / row.z, per_w = 1.0f / row.w;
    Out* target = (Out*)output.gradient + place.row * output.stride;
#pragma unroll
    for (int j = 0; j < HELD<width> / width; j++) {
        if (!place.has(j)) continue;
        float values[width];
#pragma unroll
        for (int k = 0; k < width; k++) {
            int i = j * width + k;
            float below = s[i] - row.m_s;
            float plain = kind == CE_ONLY || heated ? exponential(below) : 0.0f;
            if (kind == CE_ONLY) {
                values[k] = plain * per_z_1;
                continue;
            }
            float u = below * knobs.inverse_t, v = (t[i] - row.m_t) * knobs.inverse_t;
            float unscaled = exponential(u), q = unscaled * per_z, slope;
            if (!heated) plain = unscaled;
            float d = (v - u) - row.log_ratio;
            if (kind == FORWARD) slope = q - exponential(v) * per_w;
            if (kind == REVERSE) slope = q * (-d - row.student_part);
            if (kind == JSD) {
                float log_q_m, log_p_m;
                mix(d, knobs.beta, &log_q_m, &log_p_m);
                slope = (1.0f - knobs.beta) * q * (log_q_m - row.student_part);
            }
            values[k] = plain * per_z_1 + knobs.kd_scale * slope;
        }
        i64 first = place.first(j);
        if (label >= first && label < first + width) {
#pragma unroll
            for (int k = 0; k < width; k++)
                if (label == first + k) {
                    values[k] -= knobs.alpha;
                    write(output.ce + place.row, logf(row.z_1) - (s[j * width + k] - row.m_s));
                }
        }
        write_floats<width>(target + first, values);
    }
    if (threadIdx.x == 0 && place.segment == 0 && output.first_column == 0)
        write(output.kd + place.row, kind == CE_ONLY ? 0.0f : knobs.t_squared * row.divergence);
}

// The blocks of a row wait for each other. They are numbered in the order in which they start, so that every block
// before the last row of those that run has company, and a row is complete as soon as the next blocks start.
Q4KD_DEVICE i64 take_number(int* counters) {
    __shared__ i64 number;
#ifdef __CUDA_ARCH__
    if (threadIdx.x == 0) number = atomicAdd(counters, 1);
#else
    if (threadIdx.x == 0) number = blockIdx.x;
#endif
    __syncthreads();
    return number;
}

Q4KD_DEVICE void wait_for_row(int* arrived, i64 segments, int round) {
#ifdef __CUDA_ARCH__
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        atomicAdd(arrived, 1);
        while (*(volatile int*)arrived < (int)segments * round) __nanosleep(64);
        __threadfence();
    }
    __syncthreads();
#else
    // Blocks run one after another here: a row must be one segment.
    __syncthreads();
    if (segments > 1 && threadIdx.x == 0) host.fail("a block that waits for another");
#endif
}

template <int width, int kind, class In>
Q4KD_DEVICE void run_stats(Logits student, Logits teacher, i64 columns, i64 segments, i64 first_segment,
                           i64 all_segments, const float* knobs_at, float* sums_at) {
    Place<width> place(blockIdx.x, segments, columns);
    Knobs knobs = read_knobs(knobs_at);
    float s[HELD<width>], t[HELD<width>], sums[6];
    read_held<width, In>(place, student, s);
    if (kind != CE_ONLY) read_teacher<width, In>(place, teacher, t);
    sum_segment<width, kind>(place, s, t, knobs, sums);
    write_sums(sums_at + place.row * all_segments * SUMS, first_segment + place.segment, sums);
}

template <int width, class In>
Q4KD_DEVICE void run_jsd(Logits student, Logits teacher, i64 columns, i64 segments, i64 first_segment,
                         i64 all_segments, const float* knobs_at, float* sums_at) {
    Place<width> place(blockIdx.x, segments, columns);
    Knobs knobs = read_knobs(knobs_at);
    float s[HELD<width>], t[HELD<width>], parts[2];
    read_held<width, In>(place, student, s);
    read_teacher<width, In>(place, teacher, t);
    float* sums = sums_at + place.row * all_segments * SUMS;
    Row row = sum_row<JSD>(sums, all_segments, knobs);
    sum_mixed<width>(place, s, t, knobs, row, parts);
    if (threadIdx.x < 2) write(sums + (first_segment + place.segment) * SUMS + 6 + threadIdx.x, parts[threadIdx.x & 1]);
}

template <int width, int kind, class In, class Out>
Q4KD_DEVICE void run_gradient(Logits student, Logits teacher, i64 columns, i64 segments, i64 all_segments,
                              const float* knobs_at, const float* sums_at, Output output) {
    Place<width> place(blockIdx.x, segments, columns);
    Knobs knobs = read_knobs(knobs_at);
    float s[HELD<width>], t[HELD<width>];
    read_held<width, In>(place, student, s);
    if (kind != CE_ONLY) read_teacher<width, In>(place, teacher, t);
    const float* sums = sums_at + place.row * all_segments * SUMS;
    Row row = sum_row<kind>(sums, all_segments, knobs);
    if (kind == JSD) sum_parts(sums, all_segments, knobs, &row);
    write_gradient<width, kind, Out>(place, s, t, knobs, row, output);
}

template <int width, int kind, class In, class Out>
Q4KD_DEVICE void run_fused(Logits student, Logits teacher, i64 columns, i64 segments, int* counters,
                           const float* knobs_at, float* sums_at, Output output) {
    Place<width> place(take_number(counters), segments, columns);
    Knobs knobs = read_knobs(knobs_at);
    float s[HELD<width>], t[HELD<width>], sums[6];
    read_held<width, In>(place, student, s);
    if (kind != CE_ONLY) read_teacher<width, In>(place, teacher, t);
    sum_segment<width, kind>(place, s, t, knobs, sums);
    float* sums_of_row = sums_at + place.row * segments * SUMS;
    write_sums(sums_of_row, place.segment, sums);
    int* arrived = counters + 1 + place.row;
    wait_for_row(arrived, segments, 1);
    Row row = sum_row<kind>(sums_of_row, segments, knobs);
    if (kind == JSD) {
        float parts[2];
        sum_mixed<width>(place, s, t, knobs, row, parts);
        if (threadIdx.x < 2) write(sums_of_row + place.segment * SUMS + 6 + threadIdx.x, parts[threadIdx.x & 1]);
        wait_for_row(arrived, segments, 2);
        sum_parts(sums_of_row, segments, knobs, &row);
    }
    write_gradient<width, kind, Out>(place, s, t, knobs, row, output);
}

#include "kd_rows.cuh"

// `segments` are those of the given columns; of a tile of the vocabulary they begin at `first_segment` of all.
#define READ_KERNEL(run, name, width, in)                                                                             \
    extern "C" __global__ void __launch_bounds__(256) loss_##name##_##in##_v##width(                                  \
        const void* student, i64 student_stride, const void* teacher, i64 teacher_stride, i64 columns, i64 segments,  \
        i64 first_segment, i64 all_segments, const float* knobs, float* sums) {                                       \
        run(Logits{student, student_stride}, Logits{teacher, teacher_stride}, columns, segments, first_segment,       \
            all_segments, knobs, sums);                                                                               \
    }
#define GRAD_KERNEL(name, kind, width, in, In, out, Out)                                                              \
    extern "C" __global__ void __launch_bounds__(256) loss_grad_##name##_##in##_##out##_v##width(                     \
        const void* student, i64 student_stride, const void* teacher, i64 teacher_stride, i64 columns, i64 segments,  \
        i64 all_segments, const float* knobs, const float* sums, i64 first_column, const i64* labels, void* gradient, \
        i64 stride, float* ce, float* kd) {                                                                           \
        run_gradient<width, kind, In, Out>(Logits{student, student_stride}, Logits{teacher, teacher_stride}, columns, \
                                           segments, all_segments, knobs, sums,                                       \
                                           Output{first_column, labels, gradient, stride, ce, kd});                   \
    }
#define FUSED_KERNEL(name, kind, in, In, out, Out, blocks)                                                            \
    extern "C" __global__ void __launch_bounds__(256, blocks) loss_fused_##name##_##in##_##out##_v8(                  \
        const void* student, i64 student_stride, const void* teacher, i64 teacher_stride, i64 columns, i64 segments,  \
        int* counters, const float* knobs, float* sums, const i64* labels, void* gradient, i64 stride, float* ce,     \
        float* kd) {                                                                                                  \
        Logits s{student, student_stride}, t{teacher, teacher_stride};                                                \
        Output to{0, labels, gradient, stride, ce, kd};                                                               \
        if constexpr (kind == JSD)                                                                                    \
            run_fused<8, kind, In, Out>(s, t, columns, segments, counters, knobs, sums, to);                          \
        else                                                                                                          \
            run_rows<kind, In, Out>(s, t, columns, segments, counters, knobs, sums, to);                              \
    }
#define LOSS_WIDTH(name, kind, width)                                                                                 \
    READ_KERNEL((run_stats<width, kind, bf16>), stats_##name, width, bf16)                                            \
    READ_KERNEL((run_stats<width, kind, float>), stats_##name, width, f32)                                            \
    GRAD_KERNEL(name, kind, width, bf16, bf16, bf16, bf16)                                                            \
    GRAD_KERNEL(name, kind, width, f32, float, bf16, bf16)                                                            \
    GRAD_KERNEL(name, kind, width, f32, float, f32, float)
#define LOSS_KIND(name, kind)                                                                                         \
    LOSS_WIDTH(name, kind, 8)                                                                                         \
    LOSS_WIDTH(name, kind, 1)                                                                                         \
    FUSED_KERNEL(name, kind, bf16, bf16, bf16, bf16, (kind == JSD ? 2 : 4))                                                                  \
    FUSED_KERNEL(name, kind, f32, float, bf16, bf16, (kind == JSD ? 2 : 3))
