"""The items that a run holds in memory, counted before anything is allocated, and the phases in which each lives.

Memory peaks in one of four phases of a step, and what lives in all of them is counted once::

    teacher     held + the teacher's own activations
    loss        held + gradients of earlier micro-batches + saved activations + the loss's gradients and chunk
    backward    held + all gradients + the tied embedding's, still apart + what the first layer saved + its temporaries
    optimizer   held + all gradients + what an update needs beside them

*held*: the teacher's weights and scratch, the student's weights, their float32 masters and both moments, and where it
takes the same memory the copy of the state that a checkpoint leaves (``plan.py`` adds it). The peak is the largest
phase, not the sum. What imports take (Python, torch, transformers) is not counted.

Letters: M = B x T tokens of a micro-batch, P weights of the student, V rows of its head, H hidden size, C tokens of a
chunk of the loss.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.device.memory_report import sized
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.student.shape import StudentShape
from q4kd.trainer.teacher.cpu.footprint import LARGEST_KEPT

Phase = Literal["teacher", "loss", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("teacher", "loss", "backward", "optimizer")
# Two moments of AdamW, in bytes for each weight; blocks of 256 of the 8-bit ones share a float32 scale.
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "paged_adamw": 8.0, "paged_adamw_8bit": 2.0 + 8 / 256}
# float32 [C, V] that live at one time in the CPU's loss, and one for what glibc keeps between them.
_CPU_CHUNK_TENSORS = {"forward_kl": 7, "reverse_kl": 7, "jsd": 8}


@dataclass(frozen=True)
class Item:
    """One thing that takes memory.

    Attributes:
        basis: what the bytes are computed from.
        phases: the phases in which it lives.
        is_mapped: whether it is pages of a file, which the kernel may drop and read again.
    """

    name: str
    bytes: int
    basis: str
    phases: tuple[Phase, ...] = PHASES
    is_mapped: bool = False


def _array(name: str, *shape: int, size: int, phases: tuple[Phase, ...] = PHASES, note: str = "") -> Item:
    """Return the item of an array whose elements take ``size`` bytes each."""
    basis = " x ".join(f"{extent:,}" for extent in shape)
    return Item(name, math.prod(shape) * size, f"{basis} x {size} bytes{note}", phases)


@dataclass(frozen=True)
class TeacherShape:
    """What is known of the teacher from its file's header.

    Attributes:
        weight_bytes: bytes that its weights take where they are held.
        is_mapped: whether they are pages of the file.
        scratch_bytes: bytes of its reusable buffers.
        activation_bytes: bytes of a pass over one micro-batch, at its peak.
        weights: weights that a token is multiplied by, for FLOPs.
        basis: what ``weight_bytes`` is computed from.
    """

    config: TeacherConfig
    weight_bytes: int
    is_mapped: bool
    scratch_bytes: int
    activation_bytes: int
    weights: int
    basis: str


@dataclass(frozen=True)
class CacheShape:
    """A cache in place of a teacher: tokens listed at a position, and bytes of its files where the host computes."""

    k: int
    mapped_bytes: int


@dataclass(frozen=True)
class LossShape:
    """Buffers of the loss beside the two gradients: bytes of a chunk, and of the teacher's decoded head."""

    chunk_bytes: int
    head_bytes: int
    basis: str


def saved_activations(config: DistillConfig, student: StudentShape) -> tuple[int, str]:
    """Return the bytes that autograd keeps of a student's forward pass, and the arithmetic."""
    saved = student.saved_bytes
    basis = f"saved tensors of {student.layers} layers, counted in the student's own code"
    if config.student_kernels == "liger":
        saved -= student.liger_saves
        basis += ", without what Liger's norms and SwiGLU do not keep"
    if not config.gradient_checkpointing:
        return saved, basis
    layer = saved // max(1, student.layers)
    basis = f"input of each of {student.layers} layers + one layer's saved tensors ({sized(layer)})"
    return student.layers * student.layer_input_bytes + layer, basis


def count_items(
    config: DistillConfig, student: StudentShape, teacher: TeacherShape | CacheShape | None, loss: LossShape
) -> tuple[Item, ...]:
    """Return everything that a run of these settings takes on the device that computes."""
    size = student.weight_bytes
    trained = config.lora_rank * student.lora_parameters if config.lora_rank else student.parameters
    tokens = config.batch_size * config.seq_len
    items = []
    if isinstance(teacher, CacheShape):
        items += _cache_items(teacher, tokens)
    elif teacher is not None:
        width = teacher.config.hidden_size
        items += [
            Item("teacher weights", teacher.weight_bytes, teacher.basis, is_mapped=teacher.is_mapped),
            Item("teacher scratch", teacher.scratch_bytes, "decoded tiles, reused by every product"),
            Item("teacher activations", teacher.activation_bytes, f"a pass over {tokens:,} tokens", ("teacher",)),
            _array("teacher hidden states", tokens, width, size=size, phases=("loss", "backward")),
        ]
        if loss.head_bytes:
            basis = f"{teacher.config.vocab_size:,} x {width:,}, held by loss_mode fast"
            items.append(Item("teacher head, decoded", loss.head_bytes, basis, ("loss",)))
    items.append(_array("student weights", student.parameters, size=size))
    if config.lora_rank:
        items.append(_array("adapters", trained, size=size))
    if size < 4:
        items.append(_array("master weights", trained, size=4, note=", float32"))
    moments = MOMENT_BYTES[config.optimizer]
    basis = f"{trained:,} x {moments:.3g} bytes ({config.optimizer})"
    items.append(Item("optimizer moments", int(trained * moments), basis))
    with_gradients: tuple[Phase, ...] = PHASES if config.accumulation > 1 else ("backward", "optimizer")
    items.append(_array("gradients", trained, size=size, phases=with_gradients))
    activations, basis = saved_activations(config, student)
    items.append(Item("activations", activations, basis, ("loss",)))
    layer = student.saved_bytes // max(1, student.layers)
    items.append(Item("activations of the first layer", layer, "the last that its backward pass needs", ("backward",)))
    # SwiGLU's backward pass makes gradients of product, gate and up before it drops any.
    items.append(Item("temporaries of a layer", 3 * student.largest_saved_bytes, "gradients in SwiGLU", ("backward",)))
    if config.device == "cpu":
        items.append(Item("allocator", 2 * LARGEST_KEPT, "freed memory that glibc keeps, see gemm.py"))
    return (*items, *_loss_items(config, student, loss), _optimizer_item(config, student, trained))


def _cache_items(cache: CacheShape, tokens: int) -> list[Item]:
    # int64 ids, and log-probabilities as read, and joined with the tail's, in float32.
    size = tokens * (cache.k * (8 + 2 * 4) + 2 * 4)
    return [
        Item("teacher cache", cache.mapped_bytes, f"shards, k {cache.k}, mapped", is_mapped=True),
        Item("cached signals", size, f"{tokens:,} x ({cache.k} x 16 + 8) bytes", ("teacher", "loss")),
    ]


def _loss_items(config: DistillConfig, student: StudentShape, loss: LossShape) -> list[Item]:
    states, head = (2, config.batch_size * config.seq_len, student.hidden), (student.vocab, student.hidden)
    note = ": hidden states and gradient"
    items = [
        _array("loss: gradient of hidden states", *states, size=4, note=note, phases=("loss",)),
        Item("loss: a chunk's logits", loss.chunk_bytes, loss.basis, ("loss",)),
    ]
    if not config.lora_rank:
        items.append(_array("loss: gradient of the head", *head, size=4, phases=("loss",)))
        if student.is_tied:
            # The embedding's gradient is made whole before it is added to that of the head.
            size = student.weight_bytes
            items.append(_array("gradient of the tied embedding", *head, size=size, phases=("backward",)))
    return items


def _optimizer_item(config: DistillConfig, student: StudentShape, trained: int) -> Item:
    if config.device == "cpu":
        return Item("update", 2 * 4 * student.largest, f"2 x {student.largest:,} x 4 bytes, one weight", ("optimizer",))
    slice_elements = min(trained, max(1 << 25, student.largest))
    return Item("update", 4 * slice_elements, f"float32 gradients of {slice_elements:,} weights", ("optimizer",))


def cpu_loss_shape(
    config: DistillConfig, student: StudentShape, teacher: TeacherConfig | None, head_weight_bytes: int
) -> LossShape:
    """Return the loss's buffers on the CPU.

    The teacher's head is decoded whole where several chunks of tokens read it, unless it is too large, and else in
    tiles (``loss/fused.py``). ``head_weight_bytes`` are those of one decoded weight of it.
    """
    tokens = config.batch_size * config.seq_len
    if config.loss_mode == "low" and config.teacher_cache is None:
        from q4kd.trainer.loss.tiled import DEFAULT_TILE

        width, chunk = min(student.vocab, DEFAULT_TILE), min(tokens, config.chunk_tokens or 256)
        tile = 10 * 4 * chunk * width + 4 * width * 2 * student.hidden
        return LossShape(tile, 0, f"10 x {chunk:,} x {width:,} x 4 bytes (low)")
    plain = plain_loss_shape(config, student)
    if teacher is None or config.alpha == 1 or tokens <= config.loss.chunk_for(student.vocab):
        return plain
    from q4kd.trainer.teacher.cpu.forward import MAX_HEAD_BYTES

    head = teacher.vocab_size * teacher.hidden_size * head_weight_bytes
    return replace(plain, head_bytes=head if head <= MAX_HEAD_BYTES else 0)


def plain_loss_shape(config: DistillConfig, student: StudentShape) -> LossShape:
    """Return the loss's buffers in plain torch arithmetic, which the loss over cached signals is on every device."""
    chunk = min(config.batch_size * config.seq_len, config.loss.chunk_for(student.vocab))
    count = _CPU_CHUNK_TENSORS[config.divergence]
    return LossShape(count * 4 * chunk * student.vocab, 0, f"{count} x {chunk:,} x {student.vocab:,} x 4 bytes")
