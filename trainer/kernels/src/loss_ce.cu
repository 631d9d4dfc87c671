// The loss kernels of the cross-entropy alone; each kind is a module of its own, compiled and loaded when it is first used.
#include "kd_loss.cuh"

LOSS_KIND(ce, CE_ONLY)
