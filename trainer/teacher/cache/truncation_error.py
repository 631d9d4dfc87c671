"""What a cache of k tokens costs and what it loses, measured on a sample of the windows before the cache is made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.data.packing import Windows
from q4kd.trainer.device.memory_report import sized
from q4kd.trainer.loss.config import IGNORE_INDEX, KDLossConfig
from q4kd.trainer.loss.signal import TeacherSignal
from q4kd.trainer.student.model import DistillationModel
from q4kd.trainer.teacher.cache.cached_teacher import CachedSignal
from q4kd.trainer.teacher.cache.signal import as_stored, take_top
from q4kd.trainer.teacher.cache.store import bytes_per_token
from q4kd.trainer.teacher.teacher import Teacher

_KL = KDLossConfig(alpha=0.0)


@dataclass(frozen=True)
class CacheError:
    """What is left of KL(teacher || student) when k tokens are listed; means over the sample's labelled positions."""

    k: int  # listed tokens
    online: float  # KL over the whole vocabulary, nats per token
    cached: float  # the same over k + 1 events, of signals as they are stored
    tail_mass: float  # the teacher's probability outside the k tokens
    tokens: int  # labelled positions


@torch.no_grad()
def measure_error(
    teacher: Teacher,
    model: DistillationModel,
    windows: Windows,
    ks: Sequence[int],
    *,
    tokens: int,
    device: torch.device,
) -> list[CacheError]:
    """Measure on windows evenly spread over the data, by the losses that training would take.

    The student ``model`` is in evaluation mode on ``device``; ``ks`` are numbers of listed tokens. ``tokens`` is the
    size of the sample, rounded up to whole windows.
    """
    count = min(len(windows), -(-tokens // windows.seq_len))
    sums = {k: np.zeros(3) for k in ks}
    labelled = 0
    for number in np.linspace(0, len(windows) - 1, count).astype(np.int64):
        batch = Batch.stack([windows[int(number)]]).to(device)
        if batch.num_targets == 0:
            continue
        labelled += batch.num_targets
        signal = teacher.signal(batch)
        hidden_TH, labels_T = model.hidden(batch.ids_BT, batch.starts_BT)[0], batch.labels_BT[0]
        head_VH = model.head_weight
        config = replace(_KL, last_step=model.config.last_step)

        def divergence(teacher_signal: TeacherSignal) -> float:
            return float(teacher_signal.loss(hidden_TH, head_VH, labels_T, num_targets=1, config=config).kd)  # noqa: B023

        online = divergence(signal)
        logits_TV = teacher.head_logits(signal.hidden_BTH[0])[:, : len(head_VH)]
        for k in ks:
            top = as_stored(take_top(logits_TV, k))
            sums[k] += online, divergence(CachedSignal(top)), float(top.tail_M.exp()[labels_T != IGNORE_INDEX].sum())
    means = {k: [float(value) for value in sums[k] / max(1, labelled)] for k in ks}
    return [CacheError(k, online, cached, tail, labelled) for k, (online, cached, tail) in means.items()]


def format_errors(errors: Sequence[CacheError], *, rows: int, tokens: int, chosen: int) -> str:
    """Return the table: one line for each k; the chosen one has a mark."""
    lines = ["    k  bytes/token       size  tail mass  KL online  KL of k + 1 events  difference"]
    for error in errors:
        cost = bytes_per_token(error.k, rows)
        lines.append(
            f"{'*' if error.k == chosen else ' '}{error.k:>4}  {cost:>11}  {sized(cost * tokens):>9}  "
            f"{error.tail_mass:>9.3%}  {error.online:>9.4f}  {error.cached:>18.4f}  {error.cached - error.online:+.4f} "
            f"nats ({(error.cached - error.online) / error.online if error.online else 0.0:+.2%})"
        )
    sample = errors[0].tokens if errors else 0
    lines.append(f"KL(teacher || student) at temperature 1, nats per token, of {sample:,} tokens of {tokens:,}")
    return "\n".join(lines)
