"""Makes a run's memory plan from its settings: the placed teacher, the student's shapes, the room on the machine."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.device.devices import mem_available
from q4kd.trainer.device.placement import Place, TeacherPlacement, find_place, place_teacher
from q4kd.trainer.errors import InputError
from q4kd.trainer.student.model import student_dtype
from q4kd.trainer.student.shape import StudentShape, shape_student
from q4kd.trainer.teacher.cache.store import read_index
from q4kd.trainer.teacher.cpu.footprint import predict_footprint
from q4kd.trainer.train.memory.disk import check_disk, plan_disk
from q4kd.trainer.train.memory.items import (
    CacheShape,
    LossShape,
    TeacherShape,
    count_items,
    cpu_loss_shape,
    plain_loss_shape,
)
from q4kd.trainer.train.memory.plan import MemoryPlan, count_flops, refuse, reliefs

_CGROUP = Path("/sys/fs/cgroup")


def place_run_teacher(config: DistillConfig) -> TeacherPlacement | None:
    """Decide how the teacher of a run will be held; None for a run that reads a cache instead.

    Raises:
        InputError: when teacher or device cannot be used.
    """
    if config.teacher is None or config.teacher_cache is not None:
        return None
    return place_teacher(
        config.teacher,
        backend=config.backend,
        device=config.device,
        dtype=config.dtype,
        positions=config.batch_size * config.seq_len,
    )


def plan_run(config: DistillConfig, placement: TeacherPlacement | None) -> MemoryPlan:
    """Count what a run will take and what the machine has. Nothing large is allocated.

    Raises:
        InputError: when student or device cannot be used, or the teacher's context is shorter than a window.
    """
    place = placement.place if placement is not None else find_place(config.device)
    teacher = _teacher_shape(config, placement) if placement is not None else None
    student = student_shape(config)
    if config.device == "cpu":
        loss = cpu_loss_shape(config, student, teacher.config if teacher else None, place.dense_weight_bytes)
    else:
        loss = _cuda_loss_shape(config, student, teacher, place)
    cache = _cache_shape(config) if config.teacher_cache is not None else None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    host, basis = host_room()
    if processes > 1:
        host, basis = host // processes, f"{basis}, shared by {processes} processes"
    is_apart = place.device_class == "classic"
    room = place.budget if is_apart else host
    plan = MemoryPlan(
        device=place.name,
        items=count_items(config, student, teacher or cache, loss),
        room=room,
        room_basis="free on the device, by the driver" if is_apart else basis,
        flops=count_flops(config, student, teacher),
        disk=plan_disk(config, student),
        copy_room=host,
    )
    return plan if is_apart else dataclasses.replace(plan, copy_room=host - plan.needed).with_copy()


def check_plan(config: DistillConfig, plan: MemoryPlan, placement: TeacherPlacement | None) -> None:
    """Refuse a plan that cannot fit, in memory or on the disk.

    Raises:
        InputError: with the arithmetic, and what each setting that helps would save.
    """
    check_disk(config, plan.disk)
    if not plan.fits:
        raise refuse(plan, savings(config, plan, placement))


def savings(config: DistillConfig, plan: MemoryPlan, placement: TeacherPlacement | None) -> dict[str, int]:
    """Return by how much each setting that takes less memory would lower a plan's peak.

    None of these settings moves the teacher, so its placement serves them all.
    """
    return {name: plan.needed - plan_run(changed, placement).needed for name, changed in reliefs(config)}


def student_shape(config: DistillConfig) -> StudentShape:
    """Return the sizes of a run's student, found once.

    Raises:
        InputError: as ``shape_student``.
    """
    dtype, is_masked = student_dtype(config), config.packing == "documents"
    adapted = config if config.lora_rank else None
    sizes = config.student, config.batch_size, config.seq_len, dtype
    return _shape_cached(*sizes, is_masked=is_masked, adapted=adapted)


# The same shape serves the plan and what each setting would save.
_shape_cached = functools.lru_cache(maxsize=16)(shape_student)


def _teacher_shape(config: DistillConfig, placement: TeacherPlacement) -> TeacherShape:
    model, place, backend = placement.model, placement.place, placement.choice.backend
    if config.seq_len > model.config.context_length:
        expected, got = f"at most {model.config.context_length}, the teacher's context length", str(config.seq_len)
        raise InputError(f"seq_len {config.seq_len}", expected=expected, got=got, remedy="give a smaller --seq-len")
    dims, packed = model.config, backend != "dense"
    tokens = config.batch_size * config.seq_len
    if config.device == "cpu":
        pass_ = predict_footprint(dims, config.batch_size, config.seq_len, dtype=placement.dtype.name, logits=False)
        scratch, activations = pass_.scratch, pass_.activations
    else:
        from q4kd.trainer.kernels.windowed import attention_bytes
        from q4kd.trainer.teacher.cuda.stream import DEFAULT_SCRATCH_BYTES

        size = place.dense_weight_bytes
        # Gate and up are decoded into one buffer while the other weights of a layer take turns in a second one.
        is_mixture = dims.num_experts > 0 and not dims.family.dense_beside_experts
        dense_ffn = dims.shared_ffn_size if is_mixture else dims.ffn_size
        widest = 2 * (dims.q_size + dims.kv_size) if is_mixture else 3 * dims.ffn_size
        if dims.recurrence is not None:
            from q4kd.trainer.teacher.cuda.recurrent import recurrent_bytes

            widest = max(widest, dims.recurrence.conv_size + 2 * dims.recurrence.value_size)
        buffers = widest * dims.hidden_size * size
        scratch = min(2 * DEFAULT_SCRATCH_BYTES, buffers) if packed else 0
        windows, output = config.batch_size, 0
        if dims.num_experts:
            from q4kd.trainer.teacher.cuda.mixture import mixture_bytes, windows_at_once

            windows = min(windows, windows_at_once(config.seq_len))
            output = tokens * dims.hidden_size * size if windows < config.batch_size else 0
            experts = mixture_bytes(dims, windows * config.seq_len, size)
            scratch, output = scratch + (experts[0] if packed else 0), output + experts[1]
            if not is_mixture:  # the experts' sum in float32, and what their router reads
                output += windows * config.seq_len * dims.hidden_size * (4 + size)
        held = windows * config.seq_len
        activations = held * size * (3 * dense_ffn + 4 * dims.hidden_size) + output
        if dims.family.value_norm:  # values in float32, and normalised
            activations += held * dims.kv_size * (4 + size)
        states = attention_bytes(dims, windows, config.seq_len, size)
        if dims.recurrence is not None:
            states = max(states, recurrent_bytes(dims.recurrence, windows, config.seq_len))
            # What one product of queries, keys, values and gates gives, which stays until the next layer's.
            activations += held * size * (dims.recurrence.conv_size + 2 * dims.recurrence.value_size)
        activations += states
    return TeacherShape(
        config=dims,
        weight_bytes=model.tensor_bytes if packed else placement.dense_bytes,
        is_mapped=packed and config.device == "cpu",
        scratch_bytes=scratch,
        activation_bytes=activations,
        weights=model.products_per_token,
        basis=f"{backend}: {'as in the file' if packed else f'x {place.dense_weight_bytes} bytes'}",
    )


def _cache_shape(config: DistillConfig) -> CacheShape:
    assert config.teacher_cache is not None
    index = read_index(config.teacher_cache)
    return CacheShape(k=index.k, mapped_bytes=index.num_bytes if config.device == "cpu" else 0)


def _cuda_loss_shape(
    config: DistillConfig, student: StudentShape, teacher: TeacherShape | None, place: Place
) -> LossShape:
    """Return the loss's buffers on CUDA by the arithmetic of ``loss/cuda/chunks.py``."""
    from q4kd.trainer.loss.cuda.chunks import CHUNK_BYTES, LOW_CHUNK, LOW_TILE, choose_chunk, chunk_bytes

    tokens, size = config.batch_size * config.seq_len, student.weight_bytes
    if config.teacher_cache is not None:
        # Plain torch, over k + 1 events; loss_mode says nothing there.
        return plain_loss_shape(config, student)
    if config.loss_mode == "low":
        chunk, width = min(tokens, config.chunk_tokens or LOW_CHUNK), min(student.vocab, LOW_TILE)
        head = width * teacher.config.hidden_size * place.dense_weight_bytes if teacher else 0
        return LossShape(3 * chunk * width * 4 + head, 0, f"3 x {chunk:,} x {width:,} x 4 bytes + a tile of the head")
    # bfloat16 products give bfloat16 logits, which become their gradient in place.
    types: dict[str, Any] = {"logits_bytes": 4, "gradient_bytes": size, "with_teacher": teacher is not None}
    chunk = min(tokens, config.chunk_tokens) or choose_chunk(tokens, student.vocab, CHUNK_BYTES, **types)
    held = chunk_bytes(chunk, student.vocab, **types)
    decoded = teacher.config.vocab_size * teacher.config.hidden_size * place.dense_weight_bytes if teacher else 0
    return LossShape(held, decoded, f"chunks of {chunk:,} x {student.vocab:,}")


def host_room(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> tuple[int, str]:
    """Return the bytes that this process may still take of the host's memory, and which limit says so.

    A container may have less than the machine: ``memory.max`` of cgroup v2, or the file of v1 with its old name. Page
    cache that the kernel can drop does not count as used.
    """
    available = mem_available(meminfo)
    for limit_file, used_file, name in (
        (cgroup / "memory.max", cgroup / "memory.current", "inactive_file"),
        (cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, used = limit_file.read_text().strip(), int(used_file.read_text())
            stat = dict(line.split() for line in (limit_file.parent / "memory.stat").read_text().splitlines())
            left = int(limit) - used + int(stat.get(name, 0))
        except (OSError, ValueError):
            continue  # There is no such cgroup, or its limit is "max".
        if left < available:
            return max(0, left), "what the memory limit of this container leaves"
    return available, "MemAvailable of the host"
