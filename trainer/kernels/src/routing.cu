// Tokens to their experts and back: the choice of experts, rows sorted by expert, and the weighted sum of their outputs.
//
// A *slot* is a token's j-th choice, number token * used + j; a *row* is a slot's place once slots are sorted by expert,
// in the order of slots within one. Counting and placing use no atomics, so rows are the same in every run.
#include "reduce.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(256)

static constexpr int CHUNK = 256;         // slots that a block counts and places, one a thread
static constexpr int MOST_EXPERTS = 512;  // expert_kernels.py has the same number

// One warp a token, `width` experts a lane. `logits` are rows of `parts` (1 or 2) times the experts, which are added:
// float32 weights of a router are two bfloat16 ones. Of equal logits the lower expert is chosen. A logit that is not a
// number is the last to be chosen, and makes the token's weights NaN.
template <int width>
Q4KD_DEVICE void choose_experts(const float* logits, i64 parts, i64 experts, i64 used, bool renormalise, i64 tokens,
                                int* chosen, float* weights) {
    i64 token = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (token >= tokens) return;  // a whole warp at a time
    const float* row = logits + token * parts * experts;
    const float least = -3.402823466e38f, nothing = as_float(0xFF800000u);  // minus infinity
    float shares[width], keys[width], peak = nothing;
#pragma unroll
    for (int i = 0; i < width; i++) {
        i64 expert = lane + 32 * i;
        keys[i] = shares[i] = nothing;
        if (expert >= experts) continue;
        float logit = load<float>(row + expert);
        if (parts == 2) logit += load<float>(row + experts + expert);
        shares[i] = logit;
        keys[i] = logit > least ? logit : least;
        peak = fmaxf(peak, logit);
    }
    peak = max_lanes(peak);
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < width; i++) {
        shares[i] = expf(shares[i] - peak);
        if (lane + 32 * i < experts) all += shares[i];
    }
    all = sum_lanes(all, 32);

    float sum = 0.0f, my_share = 0.0f;
    int my_expert = 0;
    for (int j = 0; j < used; j++) {
        float best = nothing, share = 0.0f;
        int expert = 0;
#pragma unroll
        for (int i = 0; i < width; i++) {
            if (keys[i] > best) best = keys[i], share = shares[i], expert = lane + 32 * i;
        }
        float top = max_lanes(best);
        int winner = (int)-max_lanes(best == top ? -(float)expert : nothing);
        share = sum_lanes(lane == winner % 32 ? share : 0.0f, 32);
        sum += share;
#pragma unroll
        for (int i = 0; i < width; i++) {
            if (lane + 32 * i == winner) keys[i] = nothing;
        }
        if (lane == j) my_expert = winner, my_share = share;
    }
    if (lane >= used) return;
    write(chosen + token * used + lane, my_expert);
    write(weights + token * used + lane, my_share / (renormalise ? sum : all));
}

#define ROUTE(width)                                                                                                 \
    KERNEL route_w##width(const float* logits, i64 parts, i64 experts, i64 used, i64 renormalise, i64 tokens,        \
                          int* chosen, float* weights) {                                                             \
        choose_experts<width>(logits, parts, experts, used, renormalise != 0, tokens, chosen, weights);              \
    }

ROUTE(1)
ROUTE(2)
ROUTE(4)
ROUTE(8)
ROUTE(16)

Q4KD_DEVICE void read_chunk(const int* chosen, i64 slots, int* ids) {
    i64 slot = (i64)blockIdx.x * CHUNK + threadIdx.x;
    ids[threadIdx.x] = slot < slots ? load<int>(chosen + slot) : -1;
    __syncthreads();
}

// counts[chunk, expert]: how many slots of a chunk chose an expert. A block a chunk.
KERNEL count_slots(const int* chosen, i64 slots, i64 experts, int* counts) {
    __shared__ int ids[CHUNK];
    read_chunk(chosen, slots, ids);
    for (int expert = threadIdx.x; expert < experts; expert += blockDim.x) {
        int count = 0;
        for (int i = 0; i < CHUNK; i++) count += ids[i] == expert;
        write(counts + blockIdx.x * experts + expert, count);
    }
}

// Each count becomes the sum of those of earlier chunks; totals[expert]: the sum of all. A block an expert.
KERNEL scan_slots(i64 chunks, i64 experts, int* counts, int* totals) {
    __shared__ int sums[256];
    i64 share = quotient(chunks + 255, 256), first = share * threadIdx.x;
    i64 last = first + share < chunks ? first + share : chunks;
    int* column = counts + blockIdx.x;
    int sum = 0;
    for (i64 chunk = first; chunk < last; chunk++) sum += read<int>(column + chunk * experts);
    sums[threadIdx.x] = sum;
    __syncthreads();
    int before = 0;
    for (int i = 0; i < (int)threadIdx.x; i++) before += sums[i];
    for (i64 chunk = first; chunk < last; chunk++) {
        int count = read<int>(column + chunk * experts);
        write(column + chunk * experts, before);
        before += count;
    }
    if (threadIdx.x == 255) write(totals + blockIdx.x, before);
}

// Where every slot goes, and which token every row is of; ends[expert]: the first row behind an expert's. A block a
// chunk.
KERNEL place_slots(const int* chosen, i64 slots, i64 used, i64 experts, const int* counts, const int* totals,
                   int* row_of_slot, int* token_of_row, int* ends) {
    __shared__ int ids[CHUNK];
    __shared__ int starts[MOST_EXPERTS];
    for (int expert = threadIdx.x; expert < experts; expert += blockDim.x) {
        int start = 0;
        for (int i = 0; i < expert; i++) start += load<int>(totals + i);
        starts[expert] = start;
        if (blockIdx.x == 0) write(ends + expert, start + load<int>(totals + expert));
    }
    read_chunk(chosen, slots, ids);
    i64 slot = (i64)blockIdx.x * CHUNK + threadIdx.x;
    if (slot >= slots) return;
    int expert = ids[threadIdx.x], rank = 0;
    for (int i = 0; i < (int)threadIdx.x; i++) rank += ids[i] == expert;
    int row = starts[expert] + load<int>(counts + blockIdx.x * experts + expert) + rank;
    write(row_of_slot + slot, row);
    write(token_of_row + row, (int)quotient(slot, used));
}

// out[r] = x[token_of_row[first + r]], `width` elements a thread.
template <int width, class T>
Q4KD_DEVICE void copy_rows(const T* x, const int* token_of_row, i64 first, i64 rows, i64 H, T* out) {
    i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x, steps = H / width;
    i64 row = quotient(item, steps), column = (item - row * steps) * width;
    if (row >= rows) return;
    const T* source = x + (i64)load<int>(token_of_row + first + row) * H + column;
    float values[width];
    read_floats<width>(source, values);
    write_floats<width>(out + row * H + column, values);
}

// Outputs of experts by row, in up to four pieces that follow each other: rows first.. to ends[0], to ends[1], ...
template <class T>
struct Pieces {
    const T* outputs[4];
    i64 first, ends[4];

    // Where a row's output is; null for a row of no piece.
    Q4KD_INLINE const T* find(i64 row, i64 H) const {
        i64 start = first;
        const T* found = nullptr;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (row >= start && row < ends[i]) found = outputs[i] + (row - start) * H;
            start = ends[i];
        }
        return found;
    }
};

// residual[token] += the sum over its slots with a row in the pieces of weight * output, in the order of slots. A block a
// token.
template <int width, class T>
Q4KD_DEVICE void add_rows(const Pieces<T>& pieces, const int* row_of_slot, const float* weights, i64 used, i64 H,
                          float* residual) {
    const int* slots = row_of_slot + blockIdx.x * used;
    bool any = false;
    for (int j = 0; j < used; j++) {
        i64 row = load<int>(slots + j);
        any = any || (row >= pieces.first && row < pieces.ends[3]);
    }
    if (!any) return;
    for (i64 column = (i64)threadIdx.x * width; column < H; column += 256 * width) {
        float sum[width];
        float* target = residual + blockIdx.x * H + column;
        read_floats<width>(target, sum);
#pragma unroll 4
        for (int j = 0; j < used; j++) {
            const T* output = pieces.find(load<int>(slots + j), H);
            if (!output) continue;
            float weight = load<float>(weights + blockIdx.x * used + j), values[width];
            read_floats<width>(output + column, values);
#pragma unroll
            for (int i = 0; i < width; i++) sum[i] += weight * values[i];
        }
        write_floats<width>(target, sum);
    }
}

// g * sigmoid(1.702 g) by the device's approximate exponential and division for bf16, as SiLU's.
template <class T>
Q4KD_INLINE float steep_silu(float x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 2) return __fdividef(x, 1.0f + __expf(-1.702f * x));
#endif
    return x / (1.0f + expf(-1.702f * x));
}

// out = g * sigmoid(1.702 g) * (u + 1) of rows [gate | up] of 2F with the biases of the group that a row is in, where g
// is the gate, 7 at most, and u the other, from -7 to 7. `ends` are the first rows behind each group's. What is no
// number stays none.
template <int width, class T>
Q4KD_DEVICE void gate_clamped(const T* gate_up, const float* biases, const int* ends, i64 groups, i64 rows, i64 F,
                              T* out) {
    const float limit = 7.0f;
    i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x, steps = F / width;
    i64 row = quotient(item, steps), column = (item - row * steps) * width;
    if (row >= rows) return;
    i64 group = 0, last = groups - 1;
    while (group < last) {
        i64 middle = (group + last) / 2;
        if (load<int>(ends + middle) > row) last = middle;
        else group = middle + 1;
    }
    const T* source = gate_up + 2 * row * F + column;
    const float* added = biases + 2 * group * F + column;
    float gates[width], ups[width], gate_biases[width], up_biases[width];
    read_floats<width>(source, gates);
    read_floats<width>(source + F, ups);
    read_floats<width>(added, gate_biases);
    read_floats<width>(added + F, up_biases);
#pragma unroll
    for (int i = 0; i < width; i++) {
        float gate = gates[i] + gate_biases[i], up = ups[i] + up_biases[i];
        if (gate > limit) gate = limit;
        if (up > limit) up = limit;
        if (up < -limit) up = -limit;
        gates[i] = steep_silu<T>(gate) * (up + 1.0f);
    }
    write_floats<width>(out + row * F + column, gates);
}

#define ROWS(width, type, T)                                                                                         \
    KERNEL clamped_swiglu_##type##_v##width(const T* gate_up, const float* biases, const int* ends, i64 groups,      \
                                            i64 rows, i64 F, T* out) {                                               \
        gate_clamped<width>(gate_up, biases, ends, groups, rows, F, out);                                            \
    }                                                                                                                \
    KERNEL take_rows_##type##_v##width(const T* x, const int* token_of_row, i64 first, i64 rows, i64 H, T* out) {    \
        copy_rows<width>(x, token_of_row, first, rows, H, out);                                                      \
    }                                                                                                                \
    KERNEL combine_rows_##type##_v##width(const T* y0, const T* y1, const T* y2, const T* y3, i64 first, i64 end0,   \
                                          i64 end1, i64 end2, i64 end3, const int* row_of_slot,                      \
                                          const float* weights, i64 used, i64 H, float* residual) {                  \
        Pieces<T> pieces = {{y0, y1, y2, y3}, first, {end0, end1, end2, end3}};                                      \
        add_rows<width>(pieces, row_of_slot, weights, used, H, residual);                                            \
    }

ROWS(8, bf16, bf16)
ROWS(8, f32, float)
ROWS(1, bf16, bf16)
ROWS(1, f32, float)
