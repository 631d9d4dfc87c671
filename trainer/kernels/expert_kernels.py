"""The CUDA kernels of mixtures of experts, declared as the teacher's are (see ``plans.py``).

``src/routing.cu`` says what slots, rows and chunks are, ``src/experts.cuh`` how the chosen experts are decoded.

Letters in shapes: M tokens, E experts, C experts of a token, S = M * C slots, N rows of an expert's matrix, K columns,
H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from q4kd.trainer.formats.blocks.layout import SUPERBLOCK, block_format
from q4kd.trainer.kernels.launch import Argument
from q4kd.trainer.kernels.plans import DTYPES, KernelSet, Launch, blocks, is_wide, kernel, offset, require
from q4kd.trainer.kernels.teacher_kernels import Q6_K_SOA

MAX_EXPERTS = 512
UNSUPPORTED_TYPES = ("NVFP4",)  # its experts have a scale each
MAX_CHOSEN = 32
MAX_PIECES = 4
CHUNK = 256
_ANY = tuple(DTYPES)
_I32, _F32 = (torch.int32,), (torch.float32,)
# Weights of a step of the decoders and the threads it takes, for types that are not superblocks.
_STEPS = dict.fromkeys(("F16", "BF16", "F32"), (16, 1)) | {"MXFP4": (32, 2)}
_STEPS |= dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "IQ4_NL"), (32, 2))
_SUPERBLOCK_STEP = (SUPERBLOCK, 16)
# What the decoders read sixteen bytes at a time; every expert of these types begins at a multiple of sixteen.
_ALIGNED = frozenset(("Q4_K", "Q5_K", Q6_K_SOA, "Q4_1", "Q5_1", "Q2_K", "IQ4_XS", "F16", "BF16", "F32"))


class ExpertKernels(KernelSet):
    """Every kernel of mixtures, for one device.

    Every method raises ``ValueError`` for arguments that do not fit: another shape, dtype, type, layout, device or
    alignment than it says.
    """

    @kernel
    def decode_experts(
        self,
        type_name: str,
        packed: Tensor,
        cols: int,
        experts: int,
        first: int,
        ends_E: Tensor | None,
        out: Tensor,
    ) -> Launch:
        """Decode ``len(out)`` experts from the ``first``, in float32, rounded once if ``out`` is bfloat16.

        Args:
            type_name: a GGML type but NVFP4, or ``Q6_K_SOA`` in place of Q6_K.
            packed: uint8, the rows of all experts after one another, contiguous.
            cols: K, a whole number of blocks (sixteen for types without blocks).
            experts: E.
            first: the first expert to decode.
            ends_E: int32 ``[E]``, the first row behind each expert's; the place in ``out`` of an expert without rows
                is left as it is. None decodes every one.
            out: bfloat16 or float32 ``[e, N, K]``; each ``[N, K]`` contiguous, those of two experts may be apart.
        """
        require(type_name not in (*UNSUPPORTED_TYPES, "Q6_K"), f"experts of {type_name}: there is no decoder")
        self._check("out", out, _ANY, None, None, cols, rows=True)
        count, rows, _ = out.shape
        require(0 <= first <= experts - count, f"experts {first}:{first + count} of {experts}")
        self._check("packed", packed, (torch.uint8,), *[None] * packed.dim())
        form = block_format("Q6_K" if type_name == Q6_K_SOA else type_name)
        expected = experts * rows * form.row_bytes(cols)
        require(packed.numel() == expected, f"packed: expected {expected} bytes, got {packed.numel()}")
        require(
            type_name not in _ALIGNED or offset(packed) == 0, "packed: expected an address that is a multiple of 16"
        )
        weights, tasks = _STEPS.get(type_name, _SUPERBLOCK_STEP)
        require(cols % weights == 0 and is_wide(out), f"out: expected rows of whole {weights}, at a multiple of 16")
        if ends_E is not None:
            self._check("ends", ends_E, _I32, experts)
        steps = rows * cols // weights
        name = f"experts_{type_name.lower()}_{DTYPES[out.dtype]}"
        arguments: list[Argument] = [packed, experts * steps, steps, first, count, ends_E, out.stride(0), out]
        return Launch(name, blocks(count * steps * tasks), arguments, [out])

    @kernel
    def route(self, logits: Tensor, chosen_MC: Tensor, weights_MC: Tensor, renormalise: int) -> Launch:
        """Choose each token's C experts by the softmax of its logits, the greatest first; of equal ones the lower.

        Args:
            logits: float32 ``[M, 1, E]``, or ``[M, 2, E]`` of which the two are added.
            chosen_MC: int32 ``[M, C]``, written.
            weights_MC: float32 ``[M, C]``, written.
            renormalise: 1 divides the weights by their sum, 0 does not.
        """
        self._check("logits", logits, _F32, None, None, None)
        tokens, parts, experts = logits.shape
        self._check("chosen", chosen_MC, _I32, tokens, None)
        chosen = chosen_MC.shape[1]
        self._check("weights", weights_MC, _F32, tokens, chosen)
        require(parts in (1, 2) and renormalise in (0, 1), f"{parts} parts, renormalise {renormalise}")
        require(1 <= chosen <= min(experts, MAX_CHOSEN), f"{chosen} of {experts} experts: expected 1 to {MAX_CHOSEN}")
        require(experts <= MAX_EXPERTS, f"{experts} experts: expected at most {MAX_EXPERTS}")
        width = next(width for width in (1, 2, 4, 8, 16) if experts <= 32 * width)
        arguments: list[Argument] = [logits, parts, experts, chosen, renormalise, tokens, chosen_MC, weights_MC]
        return Launch(f"route_w{width}", blocks(32 * tokens), arguments, [chosen_MC, weights_MC])

    def sort(self, chosen_MC: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sort slots by expert, in their order within each.

        Args:
            chosen_MC: int32 ``[M, C]``, contiguous, from 0 to E - 1.
            experts: E.

        Returns:
            int32 ``row_of_slot`` ``[M, C]``, ``token_of_row`` ``[S]`` and ``ends`` ``[E]``, the first row behind each
            expert's.
        """
        slots = chosen_MC.numel()
        chunks = -(-slots // CHUNK)
        new = chosen_MC.new_empty
        counts, totals = new(chunks, experts), new(experts)
        row_of_slot, token_of_row, ends = torch.empty_like(chosen_MC), new(slots), new(experts)
        self._count_slots(chosen_MC, counts)
        self._scan_slots(counts, totals)
        self._place_slots(chosen_MC, counts, totals, row_of_slot, token_of_row, ends)
        return row_of_slot, token_of_row, ends

    @kernel
    def _count_slots(self, chosen_MC: Tensor, counts: Tensor) -> Launch:
        self._check("chosen", chosen_MC, _I32, None, None)
        chunks, experts = counts.shape
        require(0 < experts <= MAX_EXPERTS, f"{experts} experts: expected at most {MAX_EXPERTS}")
        return Launch("count_slots", chunks, [chosen_MC, chosen_MC.numel(), experts, counts], [counts])

    @kernel
    def _scan_slots(self, counts: Tensor, totals: Tensor) -> Launch:
        chunks, experts = counts.shape
        return Launch("scan_slots", experts, [chunks, experts, counts, totals], [counts, totals])

    @kernel
    def _place_slots(
        self,
        chosen_MC: Tensor,
        counts: Tensor,
        totals: Tensor,
        row_of_slot: Tensor,
        token_of_row: Tensor,
        ends: Tensor,
    ) -> Launch:
        chunks, experts = counts.shape
        written = [row_of_slot, token_of_row, ends]
        arguments: list[Argument] = [
            chosen_MC,
            chosen_MC.numel(),
            chosen_MC.shape[1],
            experts,
            counts,
            totals,
            *written,
        ]
        return Launch("place_slots", chunks, arguments, written)

    @kernel
    def take_rows(self, x_MH: Tensor, token_of_row: Tensor, first: int, out_RH: Tensor) -> Launch:
        """Write the states of the tokens of rows ``first`` to ``first + R``.

        Args:
            x_MH: bfloat16 or float32 ``[M, H]``, contiguous.
            token_of_row: int32 ``[S]``, tokens of M.
            first: 0 to S - R.
            out_RH: same type, ``[R, H]``, contiguous.
        """
        self._check("x", x_MH, _ANY, None, None)
        hidden = x_MH.shape[1]
        self._check("out", out_RH, [x_MH.dtype], None, hidden)
        rows = len(out_RH)
        self._check("token_of_row", token_of_row, _I32, None)
        require(0 <= first <= len(token_of_row) - rows, f"rows {first}:{first + rows} of {len(token_of_row)}")
        width = 8 if hidden % 8 == 0 and is_wide(x_MH, out_RH) else 1
        name = f"take_rows_{DTYPES[x_MH.dtype]}_v{width}"
        return Launch(name, blocks(rows * hidden // width), [x_MH, token_of_row, first, rows, hidden, out_RH], [out_RH])

    @kernel
    def clamped_swiglu(self, gate_up: Tensor, biases_e2F: Tensor, ends_e: Tensor, out_RF: Tensor) -> Launch:
        """Write gpt-oss's gated activation of rows that are sorted by expert; see ``src/routing.cu``.

        Args:
            gate_up: bfloat16 or float32 ``[R, 2F]``, contiguous: gate columns, then up columns.
            biases_e2F: float32 ``[e, 2F]``, contiguous, in the same order, of the experts that the rows are of.
            ends_e: int32, the first row behind each of these experts'; the last is R.
            out_RF: as ``gate_up``, ``[R, F]``, contiguous.
        """
        self._check("out", out_RF, _ANY, None, None)
        rows, ffn = out_RF.shape
        self._check("gate_up", gate_up, [out_RF.dtype], rows, 2 * ffn)
        self._check("biases", biases_e2F, _F32, None, 2 * ffn)
        groups = len(biases_e2F)
        self._check("ends", ends_e, _I32, groups)
        require(groups > 0, "biases: expected those of one expert or more")
        width = 8 if ffn % 8 == 0 and is_wide(gate_up, biases_e2F, out_RF) else 1
        name = f"clamped_swiglu_{DTYPES[out_RF.dtype]}_v{width}"
        arguments: list[Argument] = [gate_up, biases_e2F, ends_e, groups, rows, ffn, out_RF]
        return Launch(name, blocks(rows * ffn // width), arguments, [out_RF])

    def combine_rows(
        self, pieces: Sequence[Tensor], first: int, row_of_slot: Tensor, weights_MC: Tensor, residual_MH: Tensor
    ) -> None:
        """Add to each token's states the weighted outputs of its slots that have a row in the pieces.

        Args:
            pieces: up to ``MAX_PIECES`` of bfloat16 or float32 ``[R, H]``, contiguous: outputs of the experts by row,
                each piece's rows behind those of the last.
            first: the row of the first piece's first output.
            row_of_slot: int32 ``[M, C]``.
            weights_MC: float32 ``[M, C]``.
            residual_MH: float32 ``[M, H]``, contiguous; updated, a token's slots in their order.
        """
        require(1 <= len(pieces) <= MAX_PIECES, f"{len(pieces)} pieces: expected 1 to {MAX_PIECES}")
        y0, y1, y2, y3 = (*pieces, *[pieces[0][:0]] * (MAX_PIECES - len(pieces)))
        self._combine_rows(y0, y1, y2, y3, first, row_of_slot, weights_MC, residual_MH)

    @kernel
    def _combine_rows(
        self,
        y0: Tensor,
        y1: Tensor,
        y2: Tensor,
        y3: Tensor,
        first: int,
        row_of_slot: Tensor,
        weights_MC: Tensor,
        residual_MH: Tensor,
    ) -> Launch:
        self._check("residual", residual_MH, _F32, None, None)
        tokens, hidden = residual_MH.shape
        pieces, ends = (y0, y1, y2, y3), [first]
        for piece in pieces:
            self._check("pieces", piece, _ANY if piece is y0 else [y0.dtype], None, hidden)
            ends.append(ends[-1] + len(piece))
        self._check("row_of_slot", row_of_slot, _I32, tokens, None)
        chosen = row_of_slot.shape[1]
        self._check("weights", weights_MC, _F32, tokens, chosen)
        width = 8 if hidden % 8 == 0 and is_wide(*pieces, residual_MH) else 1
        name = f"combine_rows_{DTYPES[y0.dtype]}_v{width}"
        arguments: list[Argument] = [*pieces, *ends, row_of_slot, weights_MC, chosen, hidden, residual_MH]
        return Launch(name, tokens if hidden else 0, arguments, [residual_MH])
