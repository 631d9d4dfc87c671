"""The data of a run, from its settings: batches, held-out windows, and the digest that a resumed run must meet."""

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.data.batch import Batch
from q4kd.trainer.data.chats.template import ChatTemplate
from q4kd.trainer.data.corpus import BatchOrder, load_corpus
from q4kd.trainer.data.documents import SourceSettings
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.data.packing import Windows
from q4kd.trainer.data.readers import list_files, read_documents
from q4kd.trainer.data.sources.account import SourceAccount
from q4kd.trainer.data.stream import Stream, open_stream
from q4kd.trainer.data.token_set import TokenSet
from q4kd.trainer.data.tokenizing import Encode, begin_tokens, continuing
from q4kd.trainer.errors import InputError, missing_path_remedy


class Order(Protocol):
    """Batches by step: ``BatchOrder``, or ``StreamOrder``."""

    sequences_per_step: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in one pass, or of all steps of a stream."""

    def batch(self, step: int) -> Batch:
        """Return the sequences of a step, counted from 0."""

    def has_label(self) -> bool:
        """Return whether there is a label to learn."""


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is evaluated on.

    Attributes:
        order: order of the batches.
        held_out: windows for evaluation; may be none.
        sha256: digest of what is trained on.
        train_tokens: number of training tokens; None for a stream.
        begin: ids that were put before every text and prompt.
        account: what was read of the source, and what was not; of a stream, which files will be.
        held_out_account: the same of evaluation data that have a source of their own.
    """

    order: Order
    held_out: Windows
    sha256: str
    train_tokens: int | None
    begin: tuple[int, ...] = ()
    account: SourceAccount = field(default_factory=SourceAccount)
    held_out_account: SourceAccount = field(default_factory=lambda: SourceAccount("held-out"))

    def describe(self, config: DistillConfig) -> str:
        """Return what is trained on and what is held out, and what to do where nothing will be evaluated."""
        if self.train_tokens is None:
            trained = "a stream"
        else:
            trained = f"{self.train_tokens:,} tokens, {self.order.steps_per_epoch:,} steps an epoch"
            windows = getattr(self.order, "windows", None)
            if windows is not None and (unlabelled := windows.count_unlabelled()):
                trained += f", {unlabelled:,} of {len(windows):,} windows without a label (prompts fill them)"
        evaluated = min(len(self.held_out), config.eval_tokens // config.seq_len)
        if evaluated:
            return f"{trained}; held out: {evaluated:,} of {len(self.held_out):,} windows evaluated"
        if len(self.held_out):
            remedy = f"eval_tokens {config.eval_tokens:,} is less than a window of {config.seq_len:,}"
        elif config.held_out is not None or len(self.held_out.tokens.ids):
            found = len(self.held_out.tokens.ids)
            remedy = f"its {found:,} tokens fill no window: give more held-out text, or a smaller seq_len"
        else:
            remedy = "--held-out names some"
        return f"{trained}; held out: none, so there is no evaluation and no best checkpoint ({remedy})"


def check_sources(config: DistillConfig) -> None:
    """Refuse data that is not there, before anything large is loaded.

    Raises:
        InputError: naming the option.
    """
    for option, path in (("--data", config.data), ("--held-out", config.held_out)):
        if path is not None and not path.exists():
            expected, got = "a readable file or folder", "no such file or folder"
            remedy = missing_path_remedy(path, "name one that is there", repository="dataset")
            raise InputError(f"{option} {path}", expected=expected, got=got, remedy=remedy)


def make_encoder(config: DistillConfig, tokenizer: Any, encode: Encode, vocab_size: int) -> DocumentEncoder:
    """Return what turns a run's documents into tokens of the student.

    Raises:
        InputError: where ``begin_of_text`` asks for a token that the tokenizer does not name.
    """
    return DocumentEncoder(
        encode,
        tokenizer.eos_token_id,
        chat=ChatTemplate(tokenizer, config.completion_only, config.chat_date),
        completion_only=config.completion_only,
        vocab_size=vocab_size,
        begin=begin_tokens(tokenizer, config.begin_of_text),
        continue_text=continuing(tokenizer, encode),
    )


def open_data(
    config: DistillConfig, encoder: DocumentEncoder, sequences_per_step: int, folder: Path | None
) -> TrainingData:
    """Read the data of a run, or open it as a stream.

    Args:
        config: the run's settings.
        encoder: encoder of documents.
        sequences_per_step: sequences of a step in all processes together.
        folder: folder for tokens that do not fit in memory, while the run lasts.

    Raises:
        InputError: when a file or record cannot be used, or there is too little of it.
    """
    ignored = tuple(name.strip() for name in config.ignore_fields.split(",") if name.strip())
    settings = SourceSettings(config.data_format, config.data_glob, config.text_field, config.messages_field, ignored)
    if config.streaming:
        return _open_stream(config, encoder, settings, sequences_per_step)
    account, held_out_account = SourceAccount(), SourceAccount("held-out")
    corpus = load_corpus(
        config.data,
        encoder,
        settings,
        max_bytes=config.data_max_bytes,
        held_out=config.held_out,
        folder=folder,
        account=account,
        held_out_account=held_out_account,
    )
    encoder.close()
    windows = Windows(corpus.train, config.seq_len, config.packing)
    order = BatchOrder(windows, sequences_per_step=sequences_per_step, seed=config.seed, path=config.data)
    held_out = Windows(corpus.held_out, config.seq_len, config.packing)
    count = len(corpus.train.ids)
    return TrainingData(order, held_out, corpus.sha256, count, encoder.begin, account, held_out_account)


def _open_stream(
    config: DistillConfig, encoder: DocumentEncoder, settings: SourceSettings, sequences_per_step: int
) -> TrainingData:
    stream = Stream(
        path=config.data,
        encoder=encoder,
        settings=settings,
        max_bytes=config.data_max_bytes,
        held_out=config.held_out is not None,
        buffer=config.shuffle_buffer,
        seed=config.seed,
    )
    account, held_out_account = stream.account, SourceAccount("held-out")
    list_files(config.data, settings, account)
    sizes = {"seq_len": config.seq_len, "sequences_per_step": sequences_per_step}
    order = open_stream(stream, **sizes, packing=config.packing, steps=config.steps)
    if config.held_out is None:
        held = stream.held_out_tokens(config.eval_tokens)
    else:
        documents = read_documents(config.held_out, settings=settings, account=held_out_account)
        held = TokenSet.join(encoder.encode(documents))
    # What is found while training goes on is said then.
    account.announce = functools.partial(print, file=sys.stderr, flush=True)
    windows = Windows(held, config.seq_len, config.packing)
    return TrainingData(order, windows, stream.sha256, None, encoder.begin, account, held_out_account)
