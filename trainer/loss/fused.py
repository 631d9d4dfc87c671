"""The distillation loss, fused with both heads and chunked over tokens.

One equation, with logits s (student) and t (teacher), labels y and temperature T::

    L = alpha * CE(s, y) + (1 - alpha) * T^2 * D(softmax(t / T), softmax(s / T))

    forward_kl   D = KL(p || q)            p = softmax(t / T), q = softmax(s / T)
    reverse_kl   D = KL(q || p)
    jsd          D = beta * KL(p || m) + (1 - beta) * KL(q || m),  m = beta * p + (1 - beta) * q

with t no lower than ``LEAST_LOGIT``, so that tokens which the teacher rules out (minus infinity) leave D a number.
(Hinton et al., https://arxiv.org/abs/1503.02531; generalised JSD as in https://arxiv.org/abs/2306.13649.) Every
divergence is zero at equality. Sums run over the positions whose label is not ``IGNORE_INDEX`` and are divided by
``num_targets``, the count of such positions in the whole accumulated batch. A student's s may be more than its head's
products: ``last_step.py``.

Mode ``fast``: nothing larger than ``[chunk, V]`` exists, each chunk's logits, loss and gradients are made and dropped
before the next, and the teacher's head is decoded once a call: whole where several chunks read it, else in tiles. Mode
``low`` (``tiled.py``): nothing larger than ``[chunk, tile]``. On CUDA both run on the kernels of ``cuda/``, or raise;
this module is plain torch.

Types: plain torch widens hidden states and head to float32 (float64 stays) and multiplies in it. Gradients are summed
in float32 over all chunks and rounded once, to the types of hidden states and head.

Letters in shapes: M tokens, C tokens of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from q4kd.trainer.kernels.gemm import multiply
from q4kd.trainer.loss.config import LEAST_LOGIT, KDLossConfig
from q4kd.trainer.loss.divergence import divergence_rows
from q4kd.trainer.loss.last_step import apply_last_step, chain, slope_of
from q4kd.trainer.loss.sums import LossInputs, LossSums, LossTerms, fused_loss, target_positions, wide
from q4kd.trainer.loss.teacher_head import TeacherHead
from q4kd.trainer.loss.tiled import run_low


def kd_loss(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    *,
    teacher_hidden: Tensor | None,
    teacher_head: Callable[[Tensor], Tensor] | None,
    num_targets: float,
    config: KDLossConfig,
    positions_P: Tensor | None = None,
) -> LossTerms:
    """Compute the loss of the module's equation.

    Args:
        hidden_MH: student hidden states before its head, ``[M, H]``.
        weight_VH: student head ``[V, H]``.
        labels_M: int64 next-token ids ``[M]``; ``IGNORE_INDEX`` masks a position in both terms.
        teacher_hidden: the teacher's hidden states ``[M, H']``; None only with ``alpha`` = 1.
        teacher_head: maps ``[C, H']`` to logits ``[C, V']``, V' >= V; the columns past V are dropped. A
            ``TeacherHead`` is decoded once in ``fast``: held whole for several chunks, in tiles for one. ``low``
            requires one, which it decodes in tiles.
        num_targets: divisor of both sums, > 0: targets of the whole accumulated batch.
        config: the equation's knobs.
        positions_P: int64 ``[P]``, the positions that are not masked, rising. Without it they are searched for in
            ``labels_M``, and the host waits for labels that are on a device.

    Returns:
        Scalars in float64; ``loss`` is differentiable in ``hidden_MH`` and ``weight_VH``, once.

    Raises:
        ValueError: when the teacher is missing although ``alpha`` < 1, when ``low`` gets a head that cannot be decoded
            in tiles, or when ``num_targets`` is not positive.
        InputError: on CUDA, when the kernels cannot be compiled or loaded.
    """
    if config.alpha < 1 and (teacher_hidden is None or teacher_head is None):
        raise ValueError(f"alpha = {config.alpha} needs a teacher")
    if config.alpha == 1:
        teacher_hidden = teacher_head = None
    is_low = config.mode == "low"
    if is_low and not isinstance(teacher_head, TeacherHead | None):
        raise ValueError("mode low decodes the teacher's head in tiles: pass Teacher.head, not a function")
    if positions_P is None:
        positions_P = target_positions(labels_M)
    inputs = LossInputs(hidden_MH.detach(), weight_VH.detach(), labels_M, positions_P, teacher_hidden, teacher_head)

    def compute(sums: LossSums) -> None:
        if hidden_MH.is_cuda:
            from q4kd.trainer.loss.cuda.fused import run_on_cuda

            run_on_cuda(sums, inputs, config)
        elif is_low:
            run_low(sums, inputs, config)
        else:
            run_fast(sums, inputs, config)

    return fused_loss(hidden_MH, weight_VH, num_targets, config, compute, by_tiles=is_low)


def run_fast(sums: LossSums, inputs: LossInputs, config: KDLossConfig) -> None:
    """Fill ``sums`` in mode ``fast``, a chunk of tokens at a time."""
    weight = wide(inputs.weight)
    chunk = config.chunk_for(len(weight))
    logits_of = None
    if inputs.teacher_head is not None:
        is_held = len(inputs.positions) > chunk
        logits_of = _teacher_logits(inputs.teacher_head, len(weight), is_held=is_held)

    def teach(rows: Tensor) -> Tensor | None:
        if logits_of is None or inputs.teacher_hidden is None:
            return None
        return logits_of(inputs.teacher_hidden[rows]).to(weight.dtype)

    for rows in torch.split(inputs.positions, chunk):
        hidden_CH = wide(inputs.hidden[rows])
        # The logits have no name here, so that they are gone when they have been read.
        ce, kd, grad_CV = _chunk_terms(hidden_CH @ weight.T, teach(rows), inputs.labels[rows], config)
        sums.add_terms(ce, kd)
        if sums.wanted:
            sums.add_gradient(rows, grad_CV, hidden_CH, weight)
        del grad_CV


def _teacher_logits(head: Callable[[Tensor], Tensor], vocab: int, *, is_held: bool) -> Callable[[Tensor], Tensor]:
    """Return what gives the first ``vocab`` logits of hidden states, new; a head that is to be held is decoded now.

    A head that is read once need not be held: the teacher decodes it in tiles, which stay in the cache until they are
    multiplied. Teachers may have padding rows past the student's vocabulary: they are dropped before softmax.
    """
    decoded = head.decoded() if is_held and isinstance(head, TeacherHead) else None
    if decoded is None or not isinstance(head, TeacherHead):
        return lambda hidden_CH: head(hidden_CH)[:, :vocab].clamp(min=LEAST_LOGIT)
    weight_VH, last_step = decoded[:vocab], head.last_step

    def logits(hidden_CH: Tensor) -> Tensor:
        products_CV = multiply(hidden_CH.to(weight_VH.dtype).contiguous(), weight_VH)
        return apply_last_step(products_CV, last_step).clamp_(min=LEAST_LOGIT)

    return logits


def _chunk_terms(
    student_CV: Tensor, teacher_CV: Tensor | None, labels_C: Tensor, config: KDLossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return summed CE, summed T^2 * D and the summed loss's gradient with respect to the products ``student_CV``.

    Six ``[C, V]`` live at one time (seven of jsd, one more of a capped student) where the caller holds no products:
    each is let go after its last use. The products become the student's logits in place.
    """
    student_CV = apply_last_step(student_CV, config.last_step)
    slope = slope_of(student_CV, config.last_step)
    log_q = torch.log_softmax(student_CV, -1)
    ce = -log_q.gather(1, labels_C.unsqueeze(1)).sum(dtype=torch.float64)
    grad_CV = log_q.exp()
    grad_CV.scatter_add_(1, labels_C.unsqueeze(1), -torch.ones_like(labels_C, dtype=grad_CV.dtype).unsqueeze(1))
    grad_CV *= config.alpha
    if teacher_CV is None:
        return ce, torch.zeros((), dtype=torch.float64, device=ce.device), chain(grad_CV, slope)
    temperature = config.temperature
    if temperature != 1.0:
        log_q = torch.log_softmax(student_CV / temperature, -1)
    del student_CV
    log_p = torch.log_softmax(teacher_CV if temperature == 1.0 else teacher_CV / temperature, -1)
    del teacher_CV
    rows, gradient = divergence_rows(log_p, log_q, config)
    # d(T^2 D)/ds = T^2 * dD/d(s/T) / T
    grad_CV.add_(gradient, alpha=(1 - config.alpha) * temperature)
    return ce, temperature**2 * rows.sum(), chain(grad_CV, slope)
