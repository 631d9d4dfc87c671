// The loss of whole rows in one launch that reads the logits once, for the cross-entropy and the two KL divergences;
// included by kd_loss.cuh, whose Knobs, Row and Output it takes. (jsd, whose middle step needs the row's sums, has
// `run_fused`.)
//
// A block takes 8,192 columns. A thread holds 32 logits of either side, as they lie in memory, between the two halves of
// its work, so that four blocks (bfloat16) or three (float32) fit a multiprocessor: one waits for its row while another
// reads. Powers of two stand for exp: log2(e) / T goes into the product that takes the difference to a reference, two
// operations a logit. A thread's references follow its largest logits at a distance, so that sums rarely move. Equal
// logits have equal references and pass through the same operations: their difference is exactly zero.
#pragma once

static constexpr int STEPS = 4;
static constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Eight logits as they lie in memory.
template <class In>
struct Eight;
template <>
struct Eight<bf16> {
    uint4 words;
    Q4KD_INLINE void read_from(const bf16* source) { words = read<uint4>(source); }
    Q4KD_INLINE void get(float* values) const { unpack_bf16(words, values); }
};
template <>
struct Eight<float> {
    float held[8];
    Q4KD_INLINE void read_from(const float* source) { read_floats<8>(source, held); }
    Q4KD_INLINE void get(float* values) const {
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = held[i];
    }
};

// A teacher's eight; those of tokens that it rules out are numbers.
template <class In>
Q4KD_INLINE void get_teacher(const Eight<In>& held, float* values) {
    held.get(values);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = no_lower(values[i]);
}

// The columns of a row that one block takes.
struct Run {
    i64 row, segment, first, last;
    Q4KD_DEVICE Run(i64 block, i64 segments, i64 columns) {
        row = quotient(block, segments);
        segment = block - row * segments;
        i64 span = 256 * 8 * STEPS;
        first = segment * span;
        last = first + span < columns ? first + span : columns;
    }
};

Q4KD_INLINE float largest(const float* values) {
    float most = values[0];
#pragma unroll
    for (int i = 1; i < 8; i++) most = fmaxf(most, values[i]);
    return most;
}

// Sums of a thread or of a block, relative to references that lie near the largest logits.
struct Sums {
    float m_s, m_t, z_1, z, w, a;
};

// 2^x for arguments that are not large: an error of 2^-22, relative; what is below 2^-126 is zero.
Q4KD_INLINE float power_of_two(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

// Moves the references to to_s and to_t, and the sums with them; `scale` = log2(e) / T, and sums->a is in powers of two.
template <int kind>
Q4KD_INLINE void move(Sums* sums, float to_s, float to_t, float scale) {
    bool fresh = sums->m_s == below_all();
    float by_s = fresh ? 0.0f : to_s - sums->m_s;
    sums->z_1 *= power_of_two(-by_s * LOG2_E);
    sums->m_s = to_s;
    if (kind == CE_ONLY) return;
    float u = by_s * scale, v = fresh ? 0.0f : (to_t - sums->m_t) * scale;
    float less_q = power_of_two(-u), less_p = power_of_two(-v);
    if (kind == FORWARD) sums->a = less_p * (sums->a + sums->w * (u - v));
    if (kind == REVERSE) sums->a = less_q * (sums->a + sums->z * (v - u));
    sums->z *= less_q;
    sums->w *= less_p;
    sums->m_t = to_t;
}

// The sums of a block's columns, the same in every thread.
template <int kind, class In>
Q4KD_DEVICE void sum_run(const Run& run, const Eight<In>* s_held, const Eight<In>* t_held, const Knobs& knobs,
                         float* result) {
    __shared__ float maxima[8][2], totals[8][4];
    bool heated = kind != CE_ONLY && knobs.inverse_t != 1.0f;
    float scale = knobs.inverse_t * LOG2_E;
    // How far a logit may pass its reference before that moves: powers stay far below overflow.
    float leeway = knobs.inverse_t > 1.0f ? 16.0f / knobs.inverse_t : 16.0f;
    Sums sums = {below_all(), below_all(), 0.0f, 0.0f, 0.0f, 0.0f};
    float below_s = 0.0f, below_t = 0.0f, below_1 = 0.0f;  // minus the references, scaled
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        i64 column = run.first + ((i64)step * 256 + threadIdx.x) * 8;
        if (column >= run.last) break;
        float s[8], t[8];
        s_held[step].get(s);
        if (kind != CE_ONLY) get_teacher(t_held[step], t);
        float top_s = largest(s), top_t = kind != CE_ONLY ? largest(t) : 0.0f;
        if (top_s > sums.m_s + leeway || (kind != CE_ONLY && top_t > sums.m_t + leeway)) {
            move<kind>(&sums, fmaxf(top_s, sums.m_s), fmaxf(top_t, sums.m_t), scale);
            below_s = -sums.m_s * scale, below_t = -sums.m_t * scale, below_1 = -sums.m_s * LOG2_E;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (kind == CE_ONLY || heated) sums.z_1 += power_of_two(fmaf(s[i], LOG2_E, below_1));
            if (kind == CE_ONLY) continue;
            float u = fmaf(s[i], scale, below_s), v = fmaf(t[i], scale, below_t);
            float q = power_of_two(u), p = power_of_two(v);
            sums.z += q;
            sums.w += p;
            if (kind == FORWARD) sums.a = fmaf(p, v - u, sums.a);
            if (kind == REVERSE) sums.a = fmaf(q, u - v, sums.a);
        }
    }
    if (kind != CE_ONLY && !heated) sums.z_1 = sums.z;
    float most[2] = {sums.m_s, sums.m_t};
    reduce_block<2, true>(most, maxima);
    move<kind>(&sums, most[0], most[1], scale);
    float added[4] = {sums.z_1, sums.z, sums.w, sums.a * LN_2};
    reduce_block<4, false>(added, totals);
    result[0] = most[0], result[1] = most[1];
#pragma unroll
    for (int i = 0; i < 4; i++) result[2 + i] = added[i];
}

template <int kind, class In, class Out>
Q4KD_DEVICE void write_run(const Run& run, const Eight<In>* s_held, const Eight<In>* t_held, const Knobs& knobs,
                           const Row& row, const Output& output) {
    bool heated = kind != CE_ONLY && knobs.inverse_t != 1.0f;
    i64 label = load<i64>(output.labels + run.row) - output.first_column;
    float scale = knobs.inverse_t * LOG2_E;
    float below_s = -row.m_s * scale, below_t = -row.m_t * scale, below_1 = -row.m_s * LOG2_E;
    float per_z_1 = knobs.alpha / row.z_1;
    float of_q = knobs.kd_scale / row.z, of_p = knobs.kd_scale / row.w;
    float drift = kind == REVERSE ? row.student_part - row.log_ratio : 0.0f;
    Out* target = (Out*)output.gradient + run.row * output.stride;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        i64 column = run.first + ((i64)step * 256 + threadIdx.x) * 8;
        if (column >= run.last) break;
        float s[8], t[8], values[8];
        s_held[step].get(s);
        if (kind != CE_ONLY) get_teacher(t_held[step], t);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float plain = kind == CE_ONLY || heated ? power_of_two(fmaf(s[i], LOG2_E, below_1)) : 0.0f;
            if (kind == CE_ONLY) {
                values[i] = plain * per_z_1;
                continue;
            }
            float u = fmaf(s[i], scale, below_s), v = fmaf(t[i], scale, below_t);
            float q = power_of_two(u), slope;
            if (kind == FORWARD) slope = q * of_q - power_of_two(v) * of_p;
            if (kind == REVERSE) slope = q * of_q * ((u - v) * LN_2 - drift);
            values[i] = fmaf(heated ? plain : q, per_z_1, slope);
        }
        if (label >= column && label < column + 8) {
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (label == column + i) {
                    values[i] -= knobs.alpha;
                    write(output.ce + run.row, logf(row.z_1) - (s[i] - row.m_s));
                }
        }
        write_floats<8>(target + column, values);
    }
    if (threadIdx.x == 0 && run.segment == 0)
        write(output.kd + run.row, kind == CE_ONLY ? 0.0f : knobs.t_squared * row.divergence);
}

template <int kind, class In, class Out>
Q4KD_DEVICE void run_rows(Logits student, Logits teacher, i64 columns, i64 segments, int* counters,
                          const float* knobs_at, float* sums_at, Output output) {
    Run run(take_number(counters), segments, columns);
    Knobs knobs = read_knobs(knobs_at);
    const In* s_row = (const In*)student.values + run.row * student.stride;
    const In* t_row = (const In*)teacher.values + run.row * teacher.stride;
    Eight<In> s_held[STEPS], t_held[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        i64 column = run.first + ((i64)step * 256 + threadIdx.x) * 8;
        if (column >= run.last) break;
        s_held[step].read_from(s_row + column);
        if (kind != CE_ONLY) t_held[step].read_from(t_row + column);
    }
    float sums[6];
    sum_run<kind, In>(run, s_held, t_held, knobs, sums);
    float* sums_of_row = sums_at + run.row * segments * SUMS;
    write_sums(sums_of_row, run.segment, sums);
    wait_for_row(counters + 1 + run.row, segments, 1);
    Row row = sum_row<kind>(sums_of_row, segments, knobs);
    write_run<kind, In, Out>(run, s_held, t_held, knobs, row, output);
}
