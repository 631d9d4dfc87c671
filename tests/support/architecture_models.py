"""Small random Hugging Face models of every architecture, alive in every part: each weight changes the logits."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_CLASSES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
}


@dataclass(frozen=True)
class Case:
    """A model to make; ``changes`` go to its config."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)


CASES = {
    "qwen2": Case("qwen2"),
    "qwen2-tied": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", {"head_dim": 128}),
    "qwen3-tied": Case("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    "llama": Case("llama"),
    "llama3-tied": Case("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": Case("mistral", {"head_dim": 128, "sliding_window": None}),
}


def make_model(case: Case, *, seed: int = 0, **changes: Any) -> Any:
    """Return a float32 model of hidden size 256, 4 query and 2 key-value heads, 2 layers, unless changed.

    Scales are those of a trained model's residual stream, so that rounding an activation costs what it costs there:
    embeddings of standard deviation 1, matrices ``1/sqrt(columns)``, those that write to the stream a further
    ``1/sqrt(2 layers)`` (as GPT-2 begins), norm weights around 1, biases 0.3. With white noise in every place,
    llama.cpp's 8-bit activations alone cost 5 % of the logits. A tied head gets a final norm of random signs,
    ``1/sqrt(columns)`` large: otherwise each token would be its own successor.
    """
    settings = {
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    config_class, model_class = _CLASSES[case.model_type]
    model = model_class(config_class(**(settings | case.changes | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    tied, hidden = model.config.tie_word_embeddings, model.config.hidden_size
    into_stream = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "model.embed_tokens.weight":
                parameter.copy_(noise)
            elif parameter.ndim == 2:
                gain = into_stream if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.copy_(noise * gain / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)
        if tied:
            signs = torch.randint(0, 2, (hidden,), generator=generator) * 2 - 1
            model.model.norm.weight.mul_(signs / hidden**0.5)
    return model


def state_arrays(model: Any) -> dict[str, np.ndarray]:
    """Return the state dict as NumPy arrays; a tied head appears once."""
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        arrays.pop("lm_head.weight")
    return arrays


def make_tokenizer() -> dict[str, Any]:
    """Return a small tokenizer.json: 26 letters and one merge (llama.cpp wants one), split as GPT-2 does."""
    vocab = {chr(ord("a") + index): index for index in range(26)} | {"ab": 26}
    return {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
    }


def row_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Relative Frobenius error at each position: ``[T, V]`` twice to ``[T]``."""
    found, exact = found.astype(np.float64), exact.astype(np.float64)
    return np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
