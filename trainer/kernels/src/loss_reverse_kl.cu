// The loss kernels of KL(q || p); each kind is a module of its own, compiled and loaded when it is first used.
#include "kd_loss.cuh"

LOSS_KIND(reverse_kl, REVERSE)
