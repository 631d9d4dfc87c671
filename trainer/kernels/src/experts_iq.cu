// Packed experts to dense bf16 or float32, for the types of decode_iq.cu; NVFP4 has a scale beside every expert, which
// is not implemented.
#include "blocks_iq.cuh"
#include "blocks_small.cuh"
#include "experts.cuh"

#define EXPERT_GRID_KERNEL(name, Format, suffix, Out)                                                                \
    KERNEL experts_##name##_##suffix(EXPERT_PARAMETERS(Out)) {                                                       \
        __shared__ uint4 grid[Format::grid_bytes / 16];                                                              \
        decode_experts(with_grid<Format>(grid), Blocks{packed, blocks}, blocks_per_expert, first, count, ends,       \
                       stride, out);                                                                                 \
    }

BOTH(EXPERT_GRID_KERNEL, iq3_s, IQ3_S)
BOTH(EXPERT_GRID_KERNEL, iq3_xxs, IQ3_XXS)
BOTH(EXPERT_GRID_KERNEL, iq2_s, IQ2_S)
BOTH(EXPERT_GRID_KERNEL, iq2_xs, IQ2_XS)
BOTH(EXPERT_GRID_KERNEL, iq2_xxs, IQ2_XXS)
BOTH(EXPERT_GRID_KERNEL, iq1_s, IQ1_S)
BOTH(EXPERT_GRID_KERNEL, iq1_m, IQ1_M)
BOTH(EXPERT_KERNEL, mxfp4, MXFP4)
BOTH(EXPERT_KERNEL, tq1_0, TQ1_0)
BOTH(EXPERT_KERNEL, tq2_0, TQ2_0)
