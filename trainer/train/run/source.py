"""What a run learns from: a teacher that is loaded, or a cache of what one said before.

Both give a step its signal; every other difference between them is here, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.data.batch import Batch
from q4kd.trainer.data.training_data import TrainingData
from q4kd.trainer.device.memory_report import Residency
from q4kd.trainer.loss.signal import TeacherSignal
from q4kd.trainer.teacher.cache.cached_teacher import CachedTeacher, open_cached_teacher
from q4kd.trainer.teacher.teacher import Teacher
from q4kd.trainer.train.guards import check_cached_not_degenerate, check_not_degenerate, check_vocabulary


@dataclass(frozen=True)
class OnlineSource:
    """A teacher that is loaded; it can be asked about any text, the held-out one too."""

    teacher: Teacher

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return what a step on ``batch`` is taught."""
        return self.teacher.signal(batch)

    def settings(self) -> dict[str, str]:
        """Return what a resumed run must find again: of a split teacher the first shard, whichever was named."""
        return {"teacher": str(self.teacher.model.path)}

    def describe(self, sha256: str) -> dict[str, str | int]:
        """Return what run.json says of the teacher, whose files have this digest."""
        model = self.teacher.model
        return {"file": model.path.name, "bytes": model.file_bytes, "sha256": sha256}

    def metadata(self) -> Mapping[str, Any]:
        """Return the metadata of the teacher's file."""
        return self.teacher.model.metadata

    def residency(self) -> Residency:
        """Return what the teacher holds in memory."""
        return self.teacher.residency()

    def check_difference(self, model: Any, batch: Batch, student: Path) -> None:
        """Refuse a student of folder ``student`` that already is the teacher; see ``check_not_degenerate``."""
        check_not_degenerate(self.teacher, model, batch.ids_BT, batch.starts_BT, folder=student)


@dataclass(frozen=True)
class CachedSource:
    """What a teacher said before of every training window; there is no teacher to ask about held-out text."""

    cached: CachedTeacher
    teacher: None = None

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return what a step on ``batch`` is taught."""
        return self.cached.signal(batch)

    def settings(self) -> dict[str, str]:
        """Return what a resumed run must find again beside its settings: the cache's teacher."""
        return {"cached_teacher": self.cached.identity}

    def describe(self, _sha256: str) -> dict[str, str | int]:
        """Return what run.json says of the teacher, of whom the cache keeps the digest."""
        return self.cached.describe()

    def metadata(self) -> None:
        """Return None: the cache belongs to these very tokens, whatever the teacher's file says."""

    def residency(self) -> None:
        """Return None: no teacher is in memory."""

    def check_difference(self, model: Any, batch: Batch, student: Path) -> None:
        """Refuse a student that already says what the cache does; see ``check_cached_not_degenerate``."""
        check_cached_not_degenerate(self.cached, model, batch)


RunSource = OnlineSource | CachedSource


def check_tokens(source: OnlineSource, vocabulary: Mapping[str, int], rows: int) -> str:
    """Check that each token of a student's vocabulary has its id in the teacher; say how many rows are compared.

    Raises:
        InputError: as ``check_vocabulary``.
    """
    teacher = source.teacher
    check_vocabulary(teacher.model.tokens, teacher.vocab_size, vocabulary, rows)
    return f"vocabulary: {rows} of the teacher's {teacher.vocab_size} rows"


def open_cached(
    config: DistillConfig, data: TrainingData, tokenizer: Any, rows: int, announce: Callable[[str], None]
) -> CachedSource:
    """Open the cache of a run.

    Raises:
        InputError: as ``open_cached_teacher``.
    """
    cached = open_cached_teacher(config, data, tokenizer, rows)
    announce(f"teacher: cached, {cached.index.k} of {rows} tokens, mean tail mass {cached.index.tail_mass:.3%}")
    return CachedSource(cached)
