"""The dimensions of Qwen3.6-35B-A3B; ``synthetic_30b_a3b.py`` makes a model's types and random tensors of them.

Those of transformers' ``Qwen3_5MoeTextConfig``, which are that model's.
"""

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.recurrence import Recurrence


def qwen36_35b_a3b(num_layers: int = 40) -> TeacherConfig:
    """Return the dimensions of Qwen3.6-35B-A3B, or of its first ``num_layers`` layers: every fourth attends."""
    return TeacherConfig(
        architecture="qwen35moe",
        num_layers=num_layers,
        hidden_size=2048,
        ffn_size=512,
        num_heads=16,
        num_kv_heads=2,
        head_dim=256,
        rms_eps=1e-6,
        rope_base=1e7,
        rope_layout="split_halves",
        qk_norm=True,
        context_length=262144,
        vocab_size=248320,
        tied_head=False,
        rotary_dim=64,
        num_experts=256,
        experts_per_token=8,
        expert_ffn_size=512,
        shared_ffn_size=512,
        recurrence=Recurrence(
            key_heads=16,
            value_heads=32,
            head_dim=128,
            taps=4,
            layers=tuple((layer + 1) % 4 != 0 for layer in range(num_layers)),
        ),
    )
