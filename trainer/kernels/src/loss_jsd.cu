// The loss kernels of the generalised Jensen-Shannon divergence; each kind is a module of its own, compiled and loaded when it is first used.
#include "kd_loss.cuh"

LOSS_KIND(jsd, JSD)
READ_KERNEL((run_jsd<8, bf16>), jsd, 8, bf16)
READ_KERNEL((run_jsd<8, float>), jsd, 8, f32)
READ_KERNEL((run_jsd<1, bf16>), jsd, 1, bf16)
READ_KERNEL((run_jsd<1, float>), jsd, 1, f32)
