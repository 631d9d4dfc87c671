"""What a run reads as text (tokenizer, vocabulary, data), read by a thread while the student's weights are loaded.

More than half of a student's loading is waiting for threads that copy weights without the interpreter's lock, so that
both together take about as long as the student alone. The student stays with the main thread, because its loading
changes what belongs to the whole process: torch's default dtype and its random numbers. Torch has no part in what the
thread does. The tokenizer belongs to the thread until the data are read.
"""

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.data.tokenizing import tokens_with_rows
from q4kd.trainer.data.training_data import TrainingData, make_encoder, open_data
from q4kd.trainer.student.model import encoder, load_tokenizer
from q4kd.trainer.train.run.source import OnlineSource, check_tokens


class TextReading:
    """What is being read, each part by a method that waits for it and raises what reading it raised."""

    def __init__(
        self,
        thread: ThreadPoolExecutor,
        config: DistillConfig,
        source: OnlineSource | None,
        rows: int,
        sequences_per_step: int,
    ) -> None:
        self._config, self._source, self._rows, self._sequences = config, source, rows, sequences_per_step
        self._encoder: DocumentEncoder | None = None
        # One thread, so each part follows the one before it.
        self._tokenizer = thread.submit(self._read_tokenizer)
        self._vocabulary = thread.submit(self._compare)
        self._data = thread.submit(self._read_data)

    def tokenizer(self) -> Any:
        """Return the student's tokenizer.

        Raises:
            InputError: as ``load_tokenizer`` and ``make_encoder``.
        """
        return self._tokenizer.result()[0]

    def vocabulary(self) -> str:
        """Return what is to be said of the student's vocabulary beside the teacher's; empty without a teacher.

        Raises:
            InputError: as ``check_tokens``.
        """
        return self._vocabulary.result()

    def data(self) -> TrainingData:
        """Return the data.

        Raises:
            InputError: as ``open_data``.
        """
        return self._data.result()

    def tokenizer_error(self) -> BaseException | None:
        """Wait for the tokenizer; return what kept it from being read."""
        return self._tokenizer.exception()

    def abandon(self) -> None:
        """Begin nothing more, and stop reading data at the next document or group that is being tokenised."""
        for part in (self._vocabulary, self._data):
            part.cancel()
        if self._encoder is not None:
            self._encoder.stop()

    def close(self) -> None:
        """Let go of what reading chats took, unless the data, which do so themselves, are read."""
        if self._encoder is not None and not _has_result(self._data):
            self._encoder.close()

    def _read_tokenizer(self) -> tuple[Any, Mapping[str, int]]:
        tokenizer = load_tokenizer(self._config.student)
        vocabulary = tokens_with_rows(tokenizer, self._rows)
        self._encoder = make_encoder(self._config, tokenizer, encoder(tokenizer), self._rows)
        return tokenizer, vocabulary

    def _compare(self) -> str:
        _, vocabulary = self._tokenizer.result()
        return "" if self._source is None else check_tokens(self._source, vocabulary, self._rows)

    def _read_data(self) -> TrainingData:
        self._tokenizer.result()
        assert self._encoder is not None
        return open_data(self._config, self._encoder, self._sequences, self._config.out)


@contextlib.contextmanager
def reading_texts(
    config: DistillConfig, source: OnlineSource | None, rows: int, sequences_per_step: int
) -> Iterator[TextReading]:
    """Begin to read a run's tokenizer, vocabulary and data in a thread, which has ended when the body has.

    Where the body fails nobody wants the rest. A tokenizer that cannot be read is said first, whatever else is wrong
    with its folder, so that the same input has the same error in every run.

    Args:
        config: settings of the run.
        source: the teacher, to whose tokens the student's are compared; None for a cache, which has compared them.
        rows: rows of the student's head.
        sequences_per_step: sequences of a step in all processes together.
    """
    with ThreadPoolExecutor(1, "texts") as thread:
        reading = TextReading(thread, config, source, rows, sequences_per_step)
        try:
            yield reading
        except BaseException as error:
            reading.abandon()
            first = reading.tokenizer_error() if isinstance(error, Exception) else None
            if first is not None and first is not error:
                raise first from None
            raise
        finally:
            thread.shutdown()
            reading.close()


def _has_result(future: "Future[Any]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
