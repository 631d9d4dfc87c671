"""What ``q4kd bench step`` trains and learns from: files of a real pair's shapes, made from random numbers.

On CUDA the pair is Qwen2.5-7B in Q4_K_M and Qwen2.5-0.5B; on the CPU one that takes seconds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from q4kd.trainer.bench.device_probes import collect_garbage
from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.files import write_json
from q4kd.trainer.student.model import DistillationModel, load_student, set_up_student, student_dtype
from q4kd.trainer.train.distributed import make_accelerator, prepare_model
from q4kd.trainer.train.optimizer import make_optimizer

# These are the sizes in which the two students differ. STUDENT_0_5B is Qwen2.5-0.5B: its 151,936 rows are fewer than
# the 7B teacher's 152,064, and the loss drops the difference.
STUDENT_0_5B = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864}
STUDENT_0_5B |= {"num_hidden_layers": 24, "num_attention_heads": 14}
STUDENT_SMALL = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 512}
STUDENT_SMALL |= {"num_hidden_layers": 4, "num_attention_heads": 4}


@dataclass(frozen=True)
class Pair:
    """A teacher's GGUF, a student's folder (config.json, no weights), and the rows of the student's head."""

    teacher: Path
    student: Path
    vocab_size: int


def make_pair(folder: Path, device: torch.device, layers: int) -> Pair:
    """Write a pair into ``folder``; ``layers`` is the teacher's number of layers on CUDA (28 is the whole model)."""
    teacher, student = folder / "teacher.gguf", folder / "student"
    sizes = STUDENT_0_5B if device.type == "cuda" else STUDENT_SMALL
    qwen2: dict[str, Any] = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": 32768,
    }
    qwen2 |= {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    student.mkdir()
    write_json(student / "config.json", {**qwen2, **sizes})
    if device.type == "cuda":
        from q4kd.trainer.bench.synthetic_7b import make_tensors, qwen2_5_7b, write_gguf

        config = qwen2_5_7b(layers)
        write_gguf(teacher, config, make_tensors(config, device))
        collect_garbage()
    else:
        write_large_teacher(teacher, vocab=sizes["vocab_size"])
    return Pair(teacher, student, sizes["vocab_size"])


def make_engine(config: DistillConfig) -> tuple[Any, Any, Any]:
    """Return accelerator, prepared model and optimiser as ``q4kd distill`` makes them."""
    accelerator = make_accelerator(config.device)
    student: Any = load_student(config.student, config.seed, student_dtype(config))
    distillation = DistillationModel(student.to(accelerator.device), config.loss)
    set_up_student(student, config)
    model = prepare_model(accelerator, distillation)
    return accelerator, model, make_optimizer(config, accelerator.unwrap_model(model).student.named_parameters())


def peer_student(pair: Pair, device: torch.device) -> Any:
    """Return the same student in float32 on a device, as a plain transformers model."""
    return load_student(pair.student, 0).to(device)


def peer_teacher(pair: Pair, device: torch.device, layers: int, *, nf4: bool) -> Any:
    """Return the teacher of the same weights in transformers, its head cut to the student's rows.

    It is dense bfloat16 on a CUDA device; with ``nf4`` its linear layers are bitsandbytes' 4-bit ones.

    Raises:
        ImportError: without bitsandbytes, for ``nf4``.
    """
    from q4kd.trainer.bench.synthetic_7b import make_tensors, qwen2_5_7b
    from q4kd.trainer.bench.teacher.dense_twin import build_twin, to_nf4

    config = qwen2_5_7b(layers)
    twin = build_twin(config, make_tensors(config, device), torch.bfloat16)
    twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight[: pair.vocab_size].clone(), requires_grad=False)
    # GKDTrainer compares the two vocabulary sizes; the rows that are left out belong to no token.
    twin.config.vocab_size = pair.vocab_size
    if nf4:
        to_nf4(twin)
    collect_garbage()
    return twin
