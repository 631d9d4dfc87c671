"""The data of a run, read and tokenised by a thread while teacher and student are loaded.

What happens there is Rust, NumPy and files, most of it without the interpreter's lock; torch, whose default dtype
transformers changes while it loads a model, has no part in it. The tokenizer belongs to the thread until it is done.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.data.training_data import TrainingData, open_data


@contextlib.contextmanager
def reading_data(
    config: DistillConfig, encoder: DocumentEncoder, sequences_per_step: int
) -> Iterator[Callable[[], TrainingData]]:
    """Begin to read the data of a run; yield a function that waits for them and raises what ``open_data`` raises.

    The thread has ended when the body has. Where the body fails, nobody wants the data: reading ends at the next
    document, or group of documents that is being tokenised.
    """
    with ThreadPoolExecutor(1, "data") as thread:
        reading = thread.submit(open_data, config, encoder, sequences_per_step, config.out)
        try:
            yield reading.result
        except BaseException:
            encoder.stop()
            raise
        finally:
            if reading.exception() is not None:
                encoder.close()
