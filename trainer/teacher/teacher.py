"""The frozen teacher around a device's forward pass: it has no parameters and no gradient, and it checks its ids.

Letters in shapes: B sequences, T positions, M = B * T tokens, H hidden size, V vocabulary.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Unpack

import torch
from torch import Tensor

from q4kd.trainer.data.batch import Batch, check_starts
from q4kd.trainer.device.memory_report import Residency, measure
from q4kd.trainer.device.placement import TeacherPlacement, check_fits
from q4kd.trainer.errors import FrozenTeacherError, InputError
from q4kd.trainer.events import EventLog
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.loss.fused import kd_loss
from q4kd.trainer.loss.signal import LossOptions
from q4kd.trainer.loss.sums import LossTerms
from q4kd.trainer.teacher.cpu.forward import CpuForward
from q4kd.trainer.teacher.forward import Forward, build_forward
from q4kd.trainer.teacher.head import PackedHead


@dataclass(frozen=True)
class OnlineSignal:
    """Final hidden states ``[B, T, H]`` and head of a teacher that is loaded."""

    hidden_BTH: Tensor
    head: Callable[[Tensor], Tensor]  # a ``TeacherHead``

    def loss(self, hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, **options: Unpack[LossOptions]) -> LossTerms:
        """Return the loss over the whole vocabulary; see ``kd_loss``."""
        teacher_MH = self.hidden_BTH.flatten(0, 1)
        return kd_loss(hidden_MH, weight_VH, labels_M, teacher_hidden=teacher_MH, teacher_head=self.head, **options)


class Teacher:
    """A teacher without parameters: not an ``nn.Module``, every output detached, every gradient request refused."""

    def __init__(self, placement: TeacherPlacement) -> None:
        self.model = placement.model
        self.config = placement.model.config
        self.choice = placement.choice
        self.dtype = placement.dtype.name
        place = placement.place
        self._forward: Forward = build_forward(
            placement.model, self.choice.backend, place.device, self.dtype, place.policy.allocation
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.config.vocab_size

    def residency(self) -> Residency:
        """Count the bytes held, from the objects themselves."""
        held = Counter(self._forward.vector_bytes)
        dense = 0
        for matrix in self._forward.matrices.values():
            held[matrix.held_as] += matrix.resident_bytes
            if matrix.is_dense and FORMATS[matrix.source_type].is_quantized:
                dense += matrix.resident_bytes
        return Residency(dict(held), dense, self._forward.scratch.num_bytes, self.model.tensor_bytes)

    @torch.no_grad()
    def hidden(self, ids_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Return the final, normalised hidden states.

        Ids and starts are read to be checked: the host waits for those that are on a device. ``hidden_of`` does not.

        Args:
            ids_BT: int64 token ids ``[B, T]``, each in ``[0, V)``.
            starts_BT: int64 first position of each position's document, ``[B, T]``, before which it attends to
                nothing; None where every row is one document.

        Returns:
            ``[B, T, H]`` on the teacher's device, in its compute dtype, detached.

        Raises:
            InputError: for ids out of range, another rank, more positions than the context length, or starts that
                fall, or lie behind their position.
            FileChangedError: on the CPU, when the file that the weights lie in was changed.
        """
        self._check_ids(ids_BT)
        if starts_BT is not None:
            check_starts(starts_BT, ids_BT)
        return self._checked_hidden(ids_BT, starts_BT)

    @torch.no_grad()
    def hidden_of(self, batch: Batch) -> Tensor:
        """Return ``hidden`` of a batch, whose ids and starts were read when it was made, so that nothing waits.

        Raises:
            InputError: as ``hidden``.
        """
        self._check_ids(batch.ids_BT, batch.facts.id_range)
        return self._checked_hidden(batch.ids_BT, batch.starts_BT)

    def _checked_hidden(self, ids_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
        device = self._forward.device
        if device.type == "cpu":  # Elsewhere the weights are a copy.
            self.model.check_unchanged()
        return self._forward.hidden(ids_BT.to(device), None if starts_BT is None else starts_BT.to(device))

    @torch.no_grad()
    def head_logits(self, hidden_MH: Tensor) -> Tensor:
        """Return float32 logits ``[M, V]`` of hidden states ``[M, H]``, detached.

        Raises:
            FrozenTeacherError: when ``hidden_MH`` requires a gradient: none would flow.
        """
        if hidden_MH.requires_grad:
            raise FrozenTeacherError("teacher logits of hidden states that require a gradient")
        return self._forward.head_logits(hidden_MH)

    @property
    def head(self) -> PackedHead:
        """The output head as the fused loss takes it: logits, or its rows decoded whole or in tiles."""
        return PackedHead(self.head_logits, self._forward, self.vocab_size, getattr(torch, self.dtype))

    def signal(self, batch: Batch) -> OnlineSignal:
        """Return what a step on ``batch`` is taught: this teacher's hidden states and head."""
        return OnlineSignal(self.hidden_of(batch), self.head)

    @torch.no_grad()
    def embed(self, row_ids: Tensor) -> Tensor:
        """Return float32 embedding rows ``[n, H]`` of int64 ids ``[n]``."""
        return self._forward.embed(row_ids.to(self._forward.device))

    def logits(self, ids_BT: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits of every position.

        Args:
            ids_BT: int64 token ids ``[B, T]``, each in ``[0, V)``.
            out: float32 ``[B, T, V]``, contiguous, to write them to: a buffer used again saves the page faults of a
                new one (with 1,024 positions of 32,768 logits, 134 MB).

        Returns:
            float32 ``[B, T, V]``, detached: ``out`` if given, else new.

        Raises:
            InputError: for ids as in ``hidden``, or ``out`` of another shape, dtype, device or layout.
            FrozenTeacherError: when ``out`` requires a gradient.
        """
        if out is not None:
            self._check_out(out, (*ids_BT.shape, self.vocab_size))
        hidden_MH = self.hidden(ids_BT).flatten(0, 1)
        if out is None:
            return self.head_logits(hidden_MH).view(*ids_BT.shape, -1)
        if isinstance(self._forward, CpuForward):
            self._forward.head_logits(hidden_MH, out.view(-1, self.vocab_size))
            return out
        return out.copy_(self.head_logits(hidden_MH).view_as(out))

    def _check_out(self, out: Tensor, shape: tuple[int, ...]) -> None:
        if out.requires_grad:
            raise FrozenTeacherError("teacher logits into a tensor that requires a gradient")
        # This compares the device type only: "cuda" matches any index.
        fits, device = out.shape == shape and out.dtype == torch.float32, self._forward.device.type
        if not fits or not out.is_contiguous() or out.device.type != device:
            expected, remedy = f"contiguous float32 {shape} on {device}", "make it with torch.empty, or leave it out"
            got = f"{'' if out.is_contiguous() else 'strided '}{out.dtype} {tuple(out.shape)} on {out.device.type}"
            raise InputError("out", expected=expected, got=got, remedy=remedy)

    def _check_ids(self, ids_BT: Tensor, id_range: tuple[int, int] | None = None) -> None:
        limit, most = self.config.vocab_size, self.config.context_length
        if ids_BT.dim() != 2 or ids_BT.numel() == 0:
            raise InputError("ids", expected="[B, T], not empty", got=str(tuple(ids_BT.shape)), remedy="reshape them")
        if ids_BT.shape[1] > most:
            expected, remedy = f"at most {most} positions", "cut the sequences to the teacher's context length"
            raise InputError("ids", expected=expected, got=str(ids_BT.shape[1]), remedy=remedy)
        low, high = (int(ids_BT.min()), int(ids_BT.max())) if id_range is None else id_range
        if low < 0 or high >= limit:
            expected = f"token ids from 0 to {limit - 1}"
            raise InputError("ids", expected=expected, got=f"{low}..{high}", remedy="use the same tokenizer")

    def requires_grad_(self, requires_grad: bool = True) -> "Teacher":
        """Accept ``False``, which is always true of a teacher; refuse ``True``."""
        if requires_grad:
            raise FrozenTeacherError("teacher.requires_grad_(True)")
        return self

    def parameters(self) -> NoReturn:
        """Refuse: an optimiser that is handed the teacher is a mistake."""
        raise FrozenTeacherError("teacher.parameters()")

    def backward(self) -> NoReturn:
        """Refuse: there is no backward path."""
        raise FrozenTeacherError("teacher.backward()")


def load_teacher(placement: TeacherPlacement, *, events: EventLog, announce: Callable[[str], None] = print) -> Teacher:
    """Load a teacher as ``place_teacher`` decided, and say what was decided and why.

    Args:
        placement: the decisions.
        events: receives ``backend_selected``, ``teacher_loading``, ``teacher_ready`` and ``memory``.
        announce: receives the log lines.

    Raises:
        InputError: when the weights cannot fit, or hold what is not a number.
        FileChangedError: when the file was changed since it was opened.
    """
    check_fits(placement)
    _say_choice(placement, events, announce)
    model = placement.model
    events.emit("teacher_loading", file=model.path.name, file_bytes=model.file_bytes)
    quantised = sum(FORMATS[tensor.type].is_quantized for tensor in model.tensors.values())
    if placement.choice.backend == "dense" and quantised:
        announce(f"dequantizing {model.config.num_layers} layers to F32 ({quantised} K-quant tensors)")
    started = time.monotonic()
    teacher = Teacher(placement)
    model.check_unchanged()
    held = teacher.residency()
    events.emit("teacher_ready", seconds=time.monotonic() - started, **vars(held))
    announce(
        f"teacher ready: {len(model.tensors)} tensors, {sum(held.resident_bytes.values())} bytes resident of "
        f"{held.tensor_bytes} in the file, {held.dense_bytes_of_quantised} of them dequantised, "
        f"scratch {held.scratch_bytes} bytes"
    )
    memory = measure(held, cuda=placement.place.device == "cuda")
    events.emit("memory", **memory.to_json())
    announce(f"memory: {memory.sentence()}")
    return teacher


def _say_choice(placement: TeacherPlacement, events: EventLog, announce: Callable[[str], None]) -> None:
    choice, dtype, place = placement.choice, placement.dtype, placement.place
    allocation = place.policy.allocation
    announce(f"teacher backend: {choice.backend} ({choice.reason})")
    announce(f"teacher dtype: {dtype.name} ({dtype.reason})")
    if place.device == "cuda":
        announce(f"device: {place.name}, {place.device_class}; weights in {allocation} memory ({place.policy.reason})")
    events.emit(
        "backend_selected",
        backend=choice.backend,
        device=place.device,
        reason=choice.reason,
        dtype=dtype.name,
        dtype_reason=dtype.reason,
        device_class=place.device_class,
        allocation=allocation,
    )
