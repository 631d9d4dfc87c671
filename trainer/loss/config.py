"""The loss's settings and the names in them, without torch: the command line lists its options from here.

Letters in shapes: C tokens of a chunk, R columns of a tile, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, get_args

# The label of a position that is not learnt, as in torch's own losses.
IGNORE_INDEX = -100
# A teacher's logits are taken no lower. A token that it rules out has minus infinity, which makes 0 times infinity of a
# probability of nothing: with a number instead, that token adds exactly nothing to forward_kl and jsd. In reverse_kl,
# which is infinite there, each unit of the student's probability costs about this many nats over T: large, and finite.
# It is the least number of float16, far below the logits of any model.
LEAST_LOGIT = -65504.0
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
Mode = Literal["fast", "low"]
MODES: tuple[Mode, ...] = get_args(Mode)
LogitsType = Literal["float32", "bfloat16"]

# Bytes that a chunk's float32 [C, V] tensors may take together on the CPU, and how many of them live at one time.
_CPU_CHUNK_BYTES = 512 << 20
_CPU_LIVE = 6
_CPU_MAX_CHUNK = 1024


@dataclass(frozen=True)
class LastStep:
    """What a student does to its head's products z before they are its logits; ``last_step.py`` computes it.

    They are ``scale * z``, or with a ``cap`` above zero ``cap * tanh(scale * z / cap)``. Most students do nothing.
    """

    scale: float = 1.0
    cap: float = 0.0

    def __str__(self) -> str:
        scaled = f"{self.scale:g} * z"
        return f"{self.cap:g} * tanh({scaled} / {self.cap:g})" if self.cap else scaled


@dataclass(frozen=True, kw_only=True)
class KDLossConfig:
    """Knobs of the equation in ``fused.py``.

    ``logits`` is the type in which a CUDA device holds the logits of bfloat16 products: float32 keeps values to 1e-6;
    bfloat16 halves the bytes of the softmax at an error of 2^-9 of each logit, some 1e-3 of a small divergence.
    """

    alpha: float = 0.5  # weight of the cross-entropy, in [0, 1]; 1 needs no teacher
    temperature: float = 1.0  # divides both logits; > 0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5  # the mixture weight of jsd, in (0, 1)
    mode: Mode = "fast"  # fast makes a chunk's logits over the whole vocabulary; low a tile of it at a time, twice
    chunk_tokens: int = 0  # C, the tokens whose logits exist at one time; 0 chooses by vocabulary, device and bytes
    vocab_tile: int = 0  # R, the columns of logits that exist at one time in low; 0 means 8,192
    logits: LogitsType = "float32"
    last_step: LastStep = LastStep()  # the student's own, not a setting

    def chunk_for(self, vocab: int) -> int:
        """Return C for plain torch arithmetic: as set, else up to 1,024, six float32 ``[C, V]`` in 512 MiB.

        A capped student has a seventh, since the cap's derivative is kept.
        """
        live = _CPU_LIVE + (self.last_step.cap > 0)
        return self.chunk_tokens or max(1, min(_CPU_MAX_CHUNK, _CPU_CHUNK_BYTES // (4 * live * vocab)))
