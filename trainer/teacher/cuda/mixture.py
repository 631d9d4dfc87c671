"""Products of experts on a CUDA device: tokens sorted by expert, the chosen experts decoded slab by slab ahead of them.

A *slot* is a token's choice of one expert, a *row* its place among all slots sorted by expert (``src/routing.cu``). A
*slab* is a run of experts whose decoded matrices fit one scratch buffer; the experts in it that no token chose are
neither decoded nor multiplied. Gate and up lie in one buffer, down in another, and each is decoded beside a product
with the other::

    side stream   gate, up of slab 0 | down 0             | gate, up 1      | down 1
    main stream   sort, rows         | rows x gate, up 0  | gated x down 0  | rows x gate, up 1
    host          waits for E numbers, the rows of each expert, once a layer

What a pass of M tokens of Qwen3-30B-A3B (48 layers, H 2048, F 768, E 128, C 8) cannot do without, counted; times are
those at an H200's 4.3 TB/s and 790 TFLOP/s. Measured, heads included: 163 ms with 8,192 tokens, 1.28 s with 65,536::

    FLOP of a token  2 (48 (18.9 M attention + 37.7 M of 8 experts) + 311 M head) = 6.1 G, without keys and values
    experts          29.0 G weights: 17.6 GB packed (Q4_K, down of half the layers Q6_K), 58.0 GB decoded
    decoding         17.6 GB read and 58.0 GB written, whatever M is: 17.6 ms; the products read 58.0 GB: 13.5 ms
    M =  8,192       50 TFLOP = 63 ms; 512 rows an expert; 1.4 GB of rows a layer = 16 ms
    M = 65,536       400 TFLOP = 505 ms; 4,096 rows an expert; decoding is 3 % of that

Letters in shapes: M tokens, E experts, C experts of a token, S = M * C slots, R rows, H hidden size, F feed-forward
size of an expert, e experts of a slab.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.kernels.expert_kernels import MAX_PIECES, ExpertKernels
from q4kd.trainer.kernels.grouped import grouped_multiply
from q4kd.trainer.kernels.numerics import multiply
from q4kd.trainer.teacher.cuda.experts import Experts
from q4kd.trainer.teacher.cuda.stream import Timeline

# Gate and up of 32 experts of Qwen3-30B-A3B in bfloat16, and half as much for down.
DEFAULT_SLAB_BYTES = 202_000_000
# Rows whose activations are held at once: 65,536 are those of 8,192 tokens with eight experts each.
DEFAULT_ROWS = 65_536
# Tokens of a pass. The windows of a larger batch take turns, so that queries, keys, values and what attention makes of
# them are held for these alone. A turn decodes the experts anew, 31 ms of about 300 with Qwen3-30B-A3B on an H200.
PASS_TOKENS = 16_384
_GATE_UP, _DOWN = 0, 1


def windows_at_once(length: int) -> int:
    """Return how many windows of ``length`` positions a pass takes; at least one."""
    return max(1, PASS_TOKENS // length)


def mixture_bytes(config: TeacherConfig, tokens: int, size: int) -> tuple[int, int]:
    """Return the bytes of the scratch buffers and, at most, of the activations of a pass through a layer's experts.

    ``size`` are the bytes of an element of the compute dtype.
    """
    hidden, ffn, slots = config.hidden_size, config.expert_ffn_size, tokens * config.experts_per_token
    per_slab = min(config.num_experts, max(1, DEFAULT_SLAB_BYTES // (2 * ffn * hidden * size)))
    rows = min(slots, DEFAULT_ROWS)
    routing = 4 * (tokens * 2 * config.num_experts + 4 * slots)
    if config.family.all_biases:  # the share of every expert in every token, and the chosen as 64-bit numbers
        routing += 4 * tokens * config.num_experts + 8 * slots
    return 3 * per_slab * ffn * hidden * size, rows * size * (2 * hidden + 3 * ffn) + routing


@dataclass(frozen=True)
class Run:
    """Rows ``start`` to ``stop``, of experts ``first`` to ``last`` of the layer; ``ends`` count from ``start``."""

    start: int
    stop: int
    first: int
    last: int
    ends: tuple[int, ...]


def cut_runs(ends: Sequence[int], first: int, last: int, max_rows: int) -> list[Run]:
    """Cut the rows of experts ``first`` to ``last`` into runs of nearly equal size, at most ``max_rows``.

    Args:
        ends: the first row behind each expert's, of every expert of the layer.

    Returns:
        The runs, each with the experts that have rows in it and those between; none where there are no rows.
    """
    begin, end = ends[first - 1] if first else 0, ends[last - 1]
    count = -(-(end - begin) // max_rows)
    runs = []
    for index in range(count):
        start, stop = begin + (end - begin) * index // count, begin + (end - begin) * (index + 1) // count
        inside = [expert for expert in range(first, last) if ends[expert] > start]
        low = inside[0]
        high = next(expert for expert in inside if ends[expert] >= stop) + 1
        runs.append(Run(start, stop, low, high, tuple(min(ends[e], stop) - start for e in range(low, high))))
    return runs


@dataclass(frozen=True)
class _Sorted:
    """Where the slots of a pass through a layer go."""

    chosen_MC: Tensor  # int32
    weights_MC: Tensor  # float32
    row_of_slot: Tensor  # int32 [M, C]
    token_of_row: Tensor  # int32 [S]
    ends_E: Tensor  # int32


class Mixture:
    """The products of the experts of a model, with two scratch buffers for all layers.

    Args:
        layers: the experts of each layer, all of the same shapes.
        kernels: kernels of the device.
        gated: ``Kernels.swiglu`` or ``geglu``; of experts with biases, ``ExpertKernels.clamped_swiglu`` is taken.
        dtype: bfloat16 or float32.
        timeline: what orders decoding ahead into two buffers; by default everything is done in order.
        slab_bytes: bound of the buffer of gate and up; a single expert that needs more gets it.
        max_rows: how many rows' activations are held at once.
    """

    def __init__(
        self,
        layers: Sequence[Experts],
        kernels: ExpertKernels,
        gated: Callable[[Tensor, Tensor], None],
        *,
        dtype: torch.dtype,
        timeline: Timeline | None = None,
        slab_bytes: int = DEFAULT_SLAB_BYTES,
        max_rows: int = DEFAULT_ROWS,
    ) -> None:
        self._kernels, self._gated, self._max_rows = kernels, gated, max_rows
        self._timeline = Timeline() if timeline is None else timeline
        one, device = layers[0], layers[0].router.device
        self._count, self._size, self._hidden = one.gate.experts, one.size, one.gate.cols
        expert_bytes = 2 * self._size * self._hidden * dtype.itemsize
        self._per_slab = self._count
        if one.resident is None:
            slabs = -(-self._count // max(1, slab_bytes // expert_bytes))
            self._per_slab = -(-self._count // slabs)
            self._buffers = (
                torch.empty(self._per_slab, 2 * self._size, self._hidden, dtype=dtype, device=device),
                torch.empty(self._per_slab, self._hidden, self._size, dtype=dtype, device=device),
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of the scratch buffers."""
        return sum(buffer.nbytes for buffer in getattr(self, "_buffers", ()))

    def add(self, experts: Experts, normed_MH: Tensor, residual_MH: Tensor, router_MH: Tensor | None = None) -> None:
        """Add to each token's states what its experts, weighted, make of its normalised ones.

        Args:
            experts: a layer's.
            normed_MH: compute dtype ``[M, H]``, contiguous.
            residual_MH: float32 ``[M, H]``, contiguous; updated.
            router_MH: what the router reads, as ``normed_MH``, which it reads by default.
        """
        found = self._sort(experts, normed_MH if router_MH is None else router_MH)
        if experts.biases is not None:
            shares_ME = residual_MH.new_zeros(len(normed_MH), self._count)
            shares_ME.scatter_(1, found.chosen_MC.long(), found.weights_MC)
            residual_MH.addmm_(shares_ME, experts.biases.down)
        self._timeline.begin()
        host_ends = _HostCopy(found.ends_E)
        self._decode(experts, _GATE_UP, 0, found.ends_E)
        rows_SH, most = None, max(1, self._max_rows // MAX_PIECES)
        if len(found.token_of_row) <= self._max_rows:  # The device copies them while the host waits.
            rows_SH, most = self._rows(normed_MH, found, 0, len(found.token_of_row)), self._max_rows
        ends = host_ends.wait()
        pieces: list[Tensor] = []
        taken = 0
        slabs = [(first, min(first + self._per_slab, self._count)) for first in range(0, self._count, self._per_slab)]
        jobs = [(first, runs) for first, last in slabs if (runs := cut_runs(ends, first, last, most))]
        for place, (first, runs) in enumerate(jobs):
            following = jobs[place + 1][0] if place + 1 < len(jobs) else None
            if place == 0 and first != 0:
                self._decode(experts, _GATE_UP, first, found.ends_E)
            for run, output in self._outputs(experts, first, following, runs, normed_MH, rows_SH, found):
                pieces.append(output)
                if len(pieces) == MAX_PIECES or (run is runs[-1] and following is None):
                    self._kernels.combine_rows(pieces, taken, found.row_of_slot, found.weights_MC, residual_MH)
                    pieces, taken = [], run.stop

    def _outputs(
        self,
        experts: Experts,
        first: int,
        following: int | None,
        runs: Sequence[Run],
        normed_MH: Tensor,
        rows_SH: Tensor | None,
        found: _Sorted,
    ) -> Iterator[tuple[Run, Tensor]]:
        """Yield the outputs ``[R, H]`` of each run of the slab that begins with expert ``first``."""
        self._decode(experts, _DOWN, first, found.ends_E)
        for run in runs:
            held = slice(run.first - first, run.last - first)
            ends = (found.ends_E[run.first : run.last] - run.start).clamp_(max=run.stop - run.start)
            x_RH = (
                self._rows(normed_MH, found, run.start, run.stop) if rows_SH is None else rows_SH[run.start : run.stop]
            )
            if run is runs[0]:
                self._timeline.reading(_GATE_UP)
            gate_up = grouped_multiply(x_RH, self._weights(experts, _GATE_UP)[held], ends, run.ends)
            if run is runs[-1]:
                self._timeline.release(_GATE_UP)
                if following is not None:
                    self._decode(experts, _GATE_UP, following, found.ends_E)
            gated_RF = gate_up.new_empty(len(gate_up), self._size)
            if experts.biases is None:
                self._gated(gate_up, gated_RF)
            else:
                self._kernels.clamped_swiglu(gate_up, experts.biases.gate_up[run.first : run.last], ends, gated_RF)
            del gate_up
            if run is runs[0]:
                self._timeline.reading(_DOWN)
            output = grouped_multiply(gated_RF, self._weights(experts, _DOWN)[held], ends, run.ends)
            if run is runs[-1]:
                self._timeline.release(_DOWN)
            yield run, output

    def _weights(self, experts: Experts, buffer: int) -> Tensor:
        return self._buffers[buffer] if experts.resident is None else experts.resident[buffer]

    def _decode(self, experts: Experts, buffer: int, first: int, ends_E: Tensor) -> None:
        count = min(self._per_slab, self._count - first)
        with self._timeline.writing(buffer):
            if experts.resident is not None:
                return
            out = self._buffers[buffer][:count]
            if buffer == _GATE_UP:
                experts.decode_gate_up(first, ends_E, out)
            else:
                experts.down.decode_chosen(first, ends_E, out)

    def _sort(self, experts: Experts, normed_MH: Tensor) -> _Sorted:
        tokens = len(normed_MH)
        new = normed_MH.new_empty
        logits = new(tokens, len(experts.router) * self._count, dtype=torch.float32)
        multiply(normed_MH, experts.router.flatten(0, 1), logits)
        if experts.biases is not None:
            logits[:, : self._count] += experts.biases.router
        chosen_MC = new(tokens, experts.per_token, dtype=torch.int32)
        weights_MC = new(tokens, experts.per_token, dtype=torch.float32)
        self._kernels.route(logits.view(tokens, len(experts.router), self._count), chosen_MC, weights_MC, 1)
        if experts.scales_E is not None:
            weights_MC *= experts.scales_E[chosen_MC]
        return _Sorted(chosen_MC, weights_MC, *self._kernels.sort(chosen_MC, self._count))

    def _rows(self, normed_MH: Tensor, found: _Sorted, start: int, stop: int) -> Tensor:
        rows = normed_MH.new_empty(stop - start, self._hidden)
        self._kernels.take_rows(normed_MH, found.token_of_row, start, rows)
        return rows


class _HostCopy:
    """A copy of a small tensor to the host, begun now, for which the host waits when it needs it."""

    def __init__(self, tensor: Tensor) -> None:
        if not tensor.is_cuda:
            self._copy, self._done = tensor, None
            return
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def wait(self) -> list[int]:
        """Return the numbers."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[int] = self._copy.tolist()
        return numbers
