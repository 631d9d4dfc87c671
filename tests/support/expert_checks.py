"""What every kernel of mixtures must compute, whatever runs it: the host or a GPU. References are plain torch."""

import itertools

import kernel_checks as checks
import torch

from q4kd.trainer.kernels.expert_kernels import ExpertKernels
from q4kd.trainer.kernels.teacher_kernels import Kernels

TYPES = tuple(name for name in checks.TYPES if name != "NVFP4")


def experts_match(
    kernels: ExpertKernels, teacher: Kernels, name: str, experts: int, rows: int, cols: int, dtype: torch.dtype
) -> None:
    """Chosen experts are decoded to their places, apart; those without rows are left as they are."""
    packed = checks.random_blocks(name, experts * rows, cols, seed=experts)
    want = torch.from_numpy(checks.expected(name, packed)).view(experts, rows, cols)
    data = torch.from_numpy(packed).to(kernels.device)
    if name == "Q6_K":
        name, data = "Q6_K_SOA", teacher.repack_q6_k(data)
    counts = torch.tensor([3, 0, 1, 0, 0, 7, 2])[:experts]
    counts[0] *= experts % 2  # the first expert has no expert before it
    ends = counts.cumsum(0).int().to(kernels.device)
    for first, count in ((0, experts), (1, experts - 2)):
        for chosen in (None, ends):
            wide, buffer = checks.poisoned((count, 2 * rows, cols), dtype, kernels.device)
            wide.fill_(5.0)
            out = wide[:, rows:]
            kernels.decode_experts(name, data, cols, experts, first, chosen, out)
            for place in range(count):
                assert (wide[place, :rows] == 5.0).all()
                if chosen is None or counts[first + place]:
                    checks.assert_same_bits(out[place], want[first + place].numpy())
                else:
                    assert (out[place] == 5.0).all()
            checks.assert_guarded(buffer)


def route_matches(kernels: ExpertKernels, tokens: int, experts: int, chosen: int, parts: int) -> None:
    """The softmax's greatest, with their weights, and their order; nothing is written beyond."""
    generator = torch.Generator().manual_seed(experts + chosen)
    logits = torch.randn(tokens, parts, experts, generator=generator) * 3
    logits[0, 0, :] = logits[0, 0, 0]  # equal ones: the lower are chosen
    logits[0, 1:, :] = 0
    exact = logits.double().sum(1).softmax(1)
    order = exact.argsort(dim=1, descending=True, stable=True)[:, :chosen]
    for renormalise in (0, 1):
        weights, buffer = checks.poisoned((tokens, chosen), torch.float32, kernels.device)
        ids = torch.full((tokens, chosen), -1, dtype=torch.int32, device=kernels.device)
        kernels.route(logits.to(kernels.device), ids, weights, renormalise)
        assert torch.equal(ids.cpu().long(), order)
        want = exact.gather(1, order)
        want = want / want.sum(1, keepdim=True) if renormalise else want
        assert checks.relative_error(weights, want) < 1e-6
        checks.assert_guarded(buffer)


def bad_logits_are_seen(kernels: ExpertKernels) -> None:
    """A logit that is no number makes its token's weights NaN; chosen experts stay distinct and within bounds."""
    logits = torch.randn(4, 1, 40, generator=torch.Generator().manual_seed(1))
    logits[1] = torch.nan
    logits[2, 0, 5] = torch.inf
    logits[3] = -torch.inf
    ids = torch.full((4, 8), -1, dtype=torch.int32, device=kernels.device)
    weights = torch.zeros(4, 8, device=kernels.device)
    kernels.route(logits.to(kernels.device), ids, weights, 1)
    assert bool(weights[1:].isnan().any(1).all()) and bool(weights[0].isfinite().all())
    for row in ids.tolist():
        assert len(set(row)) == 8 and min(row) >= 0 and max(row) < 40


def sort_matches(kernels: ExpertKernels, tokens: int, experts: int, chosen: int, *, skewed: bool = False) -> None:
    """Rows are a stable sort of slots by expert, and every slot has exactly one."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, experts, generator=generator)
    if skewed:
        scores[:, experts // 2] += 1  # one expert that every token chooses
        scores[:, experts // 3] -= 1  # and one that none does
    ids = scores.topk(chosen).indices.int()
    row_of_slot, token_of_row, ends = (part.cpu().long() for part in kernels.sort(ids.to(kernels.device), experts))
    order = ids.flatten().long().argsort(dim=0, stable=True)
    assert torch.equal(token_of_row, order // chosen)
    assert torch.equal(row_of_slot.flatten()[order], torch.arange(tokens * chosen))
    assert torch.equal(ends, ids.flatten().long().bincount(minlength=experts).cumsum(0))


def rows_match(kernels: ExpertKernels, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    """Rows are copies of their tokens' states, and come back to them by weight, also part by part."""
    experts, chosen = 6, 3
    generator = torch.Generator().manual_seed(hidden)
    ids = torch.rand(tokens, experts, generator=generator).topk(chosen).indices.int().to(kernels.device)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype).to(kernels.device)
    weights = torch.rand(tokens, chosen, generator=generator).to(kernels.device)
    row_of_slot, token_of_row, ends = kernels.sort(ids, experts)
    cuts = [0, int(ends[1]), int(ends[1]), int(ends[3]), tokens * chosen]
    residual, residual_buffer = checks.poisoned((tokens, hidden), torch.float32, kernels.device)
    residual.copy_(torch.randn(tokens, hidden, generator=generator))
    want, taken = residual.double(), []
    y = torch.randn(tokens * chosen, hidden, generator=generator).to(dtype).to(kernels.device)
    for first, last in itertools.pairwise(cuts):
        out, buffer = checks.poisoned((last - first, hidden), dtype, kernels.device)
        kernels.take_rows(x, token_of_row, first, out)
        assert torch.equal(out, x[token_of_row[first:last].long()])
        checks.assert_guarded(buffer)
        taken.append(y[first:last].clone())
    kernels.combine_rows(taken[:1], 0, row_of_slot, weights, residual)
    kernels.combine_rows(taken[1:], cuts[1], row_of_slot, weights, residual)
    want += (weights.double()[..., None] * y.double()[row_of_slot.long()]).sum(1)
    assert checks.relative_error(residual, want) < 1e-6
    checks.assert_guarded(residual_buffer)


def clamped_swiglu_matches(kernels: ExpertKernels, ffn: int, dtype: torch.dtype, counts: list[int]) -> None:
    """Each row has its own expert's biases, both clamps are reached, and what is no number stays none."""
    generator = torch.Generator().manual_seed(ffn)
    rows = sum(counts)
    gate_up = (6 * torch.randn(rows, 2 * ffn, generator=generator)).to(dtype)
    gate_up[0, 0] = gate_up[-1, -1] = torch.nan
    biases = torch.randn(len(counts), 2 * ffn, generator=generator)
    ends = torch.tensor(counts).cumsum(0).int()
    out, buffer = checks.poisoned((rows, ffn), dtype, kernels.device)
    kernels.clamped_swiglu(*(x.to(kernels.device) for x in (gate_up, biases, ends)), out)
    wide = gate_up.double() + biases.double().repeat_interleave(torch.tensor(counts), 0)
    gate, up = wide[:, :ffn], wide[:, ffn:]
    assert all(float((x.abs() > 7).double().mean()) > 0.1 for x in (gate, up))
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    want = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    found, bad = out.cpu().double(), want.isnan()
    assert torch.equal(found.isnan(), bad) and int(bad.sum()) == 2
    assert checks.relative_error(found[~bad], want[~bad]) < (1e-6 if dtype == torch.float32 else 3e-3)
    checks.assert_guarded(buffer)
