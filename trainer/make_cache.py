"""The whole of ``q4kd cache``, from top to bottom."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.data.packing import Windows
from q4kd.trainer.data.tokenizing import describe_begin, tokens_with_rows
from q4kd.trainer.data.training_data import make_encoder, open_data
from q4kd.trainer.device.memory_report import sized
from q4kd.trainer.device.placement import place_teacher
from q4kd.trainer.errors import InputError, OutOfMemoryError, is_out_of_memory
from q4kd.trainer.events import EventLog
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.student.folder import check_folder, has_weights
from q4kd.trainer.student.model import DistillationModel, encoder, load_student, load_tokenizer, student_dtype
from q4kd.trainer.teacher.cache.cached_teacher import make_key, training_windows
from q4kd.trainer.teacher.cache.store import CacheIndex, bytes_per_token
from q4kd.trainer.teacher.cache.truncation_error import CacheError, format_errors, measure_error
from q4kd.trainer.teacher.cache.writer import Pass, check_disk, open_index, write_cache
from q4kd.trainer.teacher.teacher import Teacher, load_teacher
from q4kd.trainer.train.guards import check_vocabulary
from q4kd.trainer.train.run.chat_date import describe_date, keep_chat_date, with_chat_date
from q4kd.trainer.train.run.folder import locked


def make_cache(
    config: DistillConfig,
    *,
    k: int,
    sample_tokens: int,
    shard_bytes: int,
    table_ks: Sequence[int],
    events_path: Path | None = None,
) -> None:
    """Write the cache of a run's training windows to ``config.out``, or finish one that was begun.

    Args:
        config: settings of the run that will train on it; ``out`` is the cache's folder.
        k: tokens listed at each position.
        sample_tokens: tokens on which KL is compared with online before a new cache is begun; 0 skips it.
        shard_bytes: about the size of a shard.
        table_ks: numbers of listed tokens that are compared, beside ``k``.
        events_path: where events go; None drops them.

    Raises:
        InputError: when an input cannot be used, the cache there is another one, or the disk is too small.
        TrainingAborted: when memory or disk end it; finished shards are kept.
    """
    assert config.teacher is not None
    if config.threads:
        torch.set_num_threads(config.threads)
    with locked(config.out, is_main=True):
        events = EventLog(events_path)
        events.start()
        try:
            _make(config, k, sample_tokens, shard_bytes, table_ks, events)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            said = f"out of memory on {config.device}: {str(error).splitlines()[0][:160]}"
            remedy = "choose a smaller batch_size or chunk_tokens and run it again: finished shards are kept"
            raise OutOfMemoryError(f"{said}; {remedy}") from error
        finally:
            events.close()


def _make(
    config: DistillConfig, k: int, sample_tokens: int, shard_bytes: int, table_ks: Sequence[int], events: EventLog
) -> None:
    config = with_chat_date(config, cache=config.out)
    assert config.teacher is not None
    check_folder(config.student)
    tokenizer = load_tokenizer(config.student)
    student: Any = load_student(config.student, config.seed, student_dtype(config))
    if not has_weights(config.student):
        print(f"student: fresh weights, drawn from seed {config.seed}; KL is compared with these", flush=True)
    rows: int = student.get_output_embeddings().weight.shape[0]
    data = open_data(config, make_encoder(config, tokenizer, encoder(tokenizer), rows), 1, config.out)
    windows = training_windows(data)
    if k > rows:
        expected, remedy = f"at most {rows}, the student's rows", "choose a smaller k"
        raise InputError(f"--k {k}", expected=expected, got=str(k), remedy=remedy)
    model = open_model(config.teacher)
    index = open_index(config.out, make_key(data, tokenizer, rows, model.sha256()), k, shard_bytes)
    for said in (describe_date(config, tokenizer), *data.account.lines()):
        if said:
            print(said, flush=True)
    keep_chat_date(config)
    _say_size(index)
    check_disk(index)
    placement = place_teacher(
        model,
        backend=config.backend,
        device=config.device,
        dtype=config.dtype,
        positions=config.batch_size * config.seq_len,
    )
    teacher = load_teacher(placement, events=events)
    if said := describe_begin(tokenizer, data.begin, config.begin_of_text, teacher.model.metadata):
        print(said, flush=True)
    check_vocabulary(teacher.model.tokens, teacher.vocab_size, tokens_with_rows(tokenizer, rows), rows)
    how = Pass(config.batch_size, config.loss.chunk_for(teacher.vocab_size), torch.device(config.device))
    if sample_tokens and not index.shards:
        ks = sorted({k, *(other for other in table_ks if other <= rows)})
        errors = _compare(config, teacher, student, windows, ks, sample_tokens)
        events.emit("cache_error", errors=[vars(error) for error in errors])
        print(format_errors(errors, rows=rows, tokens=len(windows) * windows.seq_len, chosen=k), flush=True)
    started, had = time.monotonic(), len(index.shards)
    write_cache(index, teacher, windows, how)
    seconds = time.monotonic() - started
    made = sum(len(index.windows_of(shard)) for shard in range(had, index.num_shards)) * windows.seq_len
    size, tail = index.kept_bytes, index.tail_mass
    events.emit("cache_done", shards=index.num_shards, kept=had, bytes=size, tail_mass=tail, seconds=seconds)
    print(
        f"cache: {len(windows):,} windows in {index.num_shards} shards ({had} kept), {sized(size)}, "
        f"mean tail mass {tail:.3%}, {made / max(seconds, 1e-9):.0f} tok/s -> {index.folder}",
        flush=True,
    )


def _say_size(index: CacheIndex) -> None:
    tokens, cost = index.key.windows * index.key.seq_len, bytes_per_token(index.k, index.key.rows)
    print(
        f"cache: {tokens:,} tokens x {cost} bytes (k {index.k}) = {sized(index.num_bytes)}, "
        f"{sized(index.kept_bytes)} of it there; {sized(shutil.disk_usage(index.folder).free)} free",
        flush=True,
    )


def _compare(
    config: DistillConfig, teacher: Teacher, student: Any, windows: Windows, ks: Sequence[int], tokens: int
) -> list[CacheError]:
    """Return what each number of listed tokens costs and loses."""
    device = torch.device(config.device)
    model = DistillationModel(student.to(device), config.loss).eval()
    return measure_error(teacher, model, windows, ks, tokens=tokens, device=device)
