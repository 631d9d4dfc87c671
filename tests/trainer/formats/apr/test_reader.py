"""Opening .apr teachers: the same bits as the GGUF they came from, and one clear line for every refused file."""

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from apr_checks import opened, refusal
from apr_files import FFN, HEAD, HIDDEN, ROW_MAJOR, Entry, tiny_metadata, tiny_model

from q4kd.harness.inputs.demo import GOLDEN_TEACHER
from q4kd.harness.inputs.models.apr_write import Names, convert_gguf, huggingface_name
from q4kd.trainer.demo import teacher_path
from q4kd.trainer.formats.tensor_names import gguf_name

LAYER = "model.layers.0."


# --- what is accepted ---


def test_the_valid_twin_of_every_refused_file_opens(tmp_path: Path) -> None:
    model = opened(tmp_path, tiny_model())
    config = model.config
    assert (config.architecture, config.num_layers, config.hidden_size, config.ffn_size) == ("qwen2", 1, HIDDEN, FFN)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (1, 1, HEAD, 3)
    assert (config.rope_base, config.rope_layout, config.context_length) == (1e6, "split_halves", 64)
    assert config.rms_eps == float(np.float32(1e-6))  # GGUF's, not JSON's
    assert config.tied_head and model.tokens == ()
    assert model.file_bytes == (tmp_path / "model.apr").stat().st_size


def test_tensors_lie_in_the_private_map_of_the_file(tmp_path: Path) -> None:
    image = tiny_model()
    model = opened(tmp_path, image)
    before = hashlib.sha256((tmp_path / "model.apr").read_bytes()).hexdigest()
    for entry in image.entries:
        tensor = model.tensors[gguf_name(entry.name.decode())]
        assert tensor.data.tobytes() == entry.data
        assert tensor.shape == entry.shape and tensor.data.shape[0] == (1, *entry.shape)[-2]
        base: Any = tensor.data
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)
        tensor.data[:] = 255  # torch may write to its buffers; the file must not follow
    assert hashlib.sha256((tmp_path / "model.apr").read_bytes()).hexdigest() == before


@pytest.mark.parametrize("names", ["huggingface", "gguf"])
@pytest.mark.parametrize("copy_head", [False, True])
@pytest.mark.parametrize("source", [teacher_path(), GOLDEN_TEACHER], ids=["demo (tied head)", "golden (own head)"])
def test_the_same_model_as_gguf_and_as_apr_gives_the_same_bits(
    tmp_path: Path, source: Path, names: Names, copy_head: bool
) -> None:
    torch = pytest.importorskip("torch")
    from teachers import load_quietly

    target = tmp_path / "model.apr"
    convert_gguf(source, target, names=names, copy_head=copy_head)
    as_gguf, as_apr = (load_quietly(path) for path in (source, target))
    assert list(as_apr.model.tokens) == list(as_gguf.model.tokens) != []
    # A copied head is a tensor of its own: every other dimension must agree.
    differing = {"tied_head"} if copy_head and as_gguf.config.tied_head else set()
    pairs = zip(vars(as_gguf.config).items(), vars(as_apr.config).values(), strict=True)
    assert {key for (key, one), other in pairs if one != other} == differing
    for name, tensor in as_gguf.model.tensors.items():
        assert as_apr.model.tensors[name].data.tobytes() == tensor.data.tobytes()
    ids = torch.arange(48).mul(11).remainder(as_gguf.vocab_size).view(2, 24)
    expected = as_gguf.logits(ids)
    assert float(expected.std()) > 0.1
    assert torch.equal(as_apr.logits(ids), expected)


def write_small_gguf(path: Path, architecture: str) -> Path:
    """A GGUF of one random F32 layer: qwen3 with its head norms, or llama with RoPE divisors."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e5)
    writer.add_context_length(64)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (40, 64), "output_norm.weight": (64,)}
    layer = {"attn_q": (128, 64), "attn_k": (64, 64), "attn_v": (64, 64), "attn_output": (64, 128)}
    layer |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    norms = {"attn_norm": (64,), "ffn_norm": (64,)}
    norms |= {"attn_q_norm": (32,), "attn_k_norm": (32,)} if architecture == "qwen3" else {}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in (layer | norms).items()}
    if architecture == "llama":
        shapes["rope_freqs.weight"] = (16,)
    for name, shape in shapes.items():
        writer.add_tensor(name, (rng.random(shape, np.float32) + 0.5 if len(shape) == 1 else
                                 rng.standard_normal(shape, np.float32) / 8))  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("names", ["huggingface", "gguf"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_the_other_architectures_keep_their_bits_too(tmp_path: Path, architecture: str, names: Names) -> None:
    torch = pytest.importorskip("torch")
    from teachers import load_quietly

    source = write_small_gguf(tmp_path / "model.gguf", architecture)
    convert_gguf(source, tmp_path / "model.apr", names=names)
    paths = (source, tmp_path / "model.apr")
    as_gguf, as_apr = (load_quietly(path) for path in paths)
    assert as_apr.config == as_gguf.config
    assert as_apr.config.rope_layout == ("interleaved" if architecture == "llama" else "split_halves")
    ids = torch.arange(32).remainder(40).view(1, 32)
    assert torch.equal(as_apr.logits(ids), as_gguf.logits(ids))


def test_huggingface_names_are_translated_as_the_gguf_package_does() -> None:
    layers = 3
    reference = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, layers)
    modules = ["input_layernorm", "post_attention_layernorm"]
    modules += [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    modules += [f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    names = [f"model.layers.{layer}.{module}" for layer in range(layers) for module in modules]
    for name in [*names, "model.embed_tokens", "model.norm", "lm_head"]:
        expected = reference.get_name(name)
        assert expected is not None
        assert gguf_name(f"{name}.weight") == f"{expected}.weight"
        assert huggingface_name(f"{expected}.weight") == f"{name}.weight"
        assert gguf_name(f"{expected}.weight") == f"{expected}.weight"
    assert gguf_name("model.layers.2.self_attn.q_proj.bias") == "blk.2.attn_q.bias"
    for other in ("model.layers.x.mlp.up_proj.weight", "model.layers.0.mlp.qkv.weight", "rope_freqs.weight", "a"):
        assert gguf_name(other) == other


@pytest.mark.parametrize(
    ("key", "aliases"),
    [
        ("hidden_size", ("hidden_dim", "d_model", "n_embd")),
        ("num_layers", ("num_hidden_layers", "n_layers", "n_layer")),
        ("num_heads", ("num_attention_heads", "n_heads", "n_head")),
        ("num_kv_heads", ("num_key_value_heads", "n_kv_heads")),
        ("intermediate_size", ("ffn_dim", "intermediate_dim", "n_inner")),
        ("max_position_embeddings", ("max_seq_len", "context_length", "n_ctx")),
        ("rms_norm_eps", ("layer_norm_eps", "norm_eps")),
    ],
)
def test_a_null_is_absent_and_an_alias_is_read(tmp_path: Path, key: str, aliases: tuple[str, ...]) -> None:
    expected = opened(tmp_path, tiny_model()).config
    value = tiny_metadata()[key]
    for alias in aliases:
        assert opened(tmp_path, tiny_model(**{key: None, alias: value})).config == expected
        assert opened(tmp_path, tiny_model(**{alias: value})).config == expected
        contradiction = tiny_model(**{alias: 2 * value}).build()
        assert alias in refusal(tmp_path, contradiction)


@pytest.mark.parametrize(
    ("names", "metadata", "layout"),
    [
        ("huggingface", {}, "split_halves"),
        ("gguf", {}, "split_halves"),
        ("huggingface", {"rope_type": 0}, "interleaved"),
        ("gguf", {"rope_type": 2}, "split_halves"),
        ("huggingface", {"architecture": "llama"}, "split_halves"),
        ("gguf", {"architecture": "llama"}, "interleaved"),
        ("gguf", {"architecture": "llama", "rope_type": 2}, "split_halves"),
        ("huggingface", {"architecture": "llama", "rope_type": 0}, "interleaved"),
        ("huggingface", {"architecture": "llama", "original_format": "gguf"}, "interleaved"),
        ("huggingface", {"architecture": "LlamaForCausalLM"}, "split_halves"),
        ("gguf", {"architecture": None, "hf_model_type": "mistral"}, "interleaved"),
    ],
)
def test_rope_layout_follows_rope_type_then_origin(
    tmp_path: Path, names: str, metadata: dict[str, Any], layout: str
) -> None:
    image = tiny_model(**metadata)
    if names == "gguf":
        for entry in image.entries:
            entry.name = gguf_name(entry.name.decode()).encode()
    assert opened(tmp_path, image).config.rope_layout == layout


@pytest.mark.parametrize(
    ("metadata", "tokens"),
    [
        ({"tokenizer.vocabulary": ["a", "Ġb", "<|end|>"]}, ("a", "Ġb", "<|end|>")),
        ({"tokenizer": {"vocab": ["a", "b"]}}, ("a", "b")),
        ({"vocabulary": None, "tokenizer": "qwen2"}, ()),
        ({"vocab": {"a": 0}}, ()),
        ({"vocab": ["a", 1]}, ()),
    ],
)
def test_tokens_come_from_the_metadata(tmp_path: Path, metadata: dict[str, Any], tokens: tuple[str, ...]) -> None:
    assert opened(tmp_path, tiny_model(**metadata)).tokens == tokens


def test_an_embedded_tokenizer_is_not_a_weight(tmp_path: Path) -> None:
    image = tiny_model()
    image.entries.append(Entry(b"tokenizer.json", 7, (2,), b"{}"))
    image.entries.append(Entry(b"tokenizer", 4, (1,), bytes(4)))
    assert set(opened(tmp_path, image).tensors) == set(opened(tmp_path, tiny_model()).tensors)
    image.entries.append(Entry(b"tokenizer.scale", 0, (1,), bytes(4)))
    assert "tokenizer.scale" in refusal(tmp_path, image.build())


@pytest.mark.parametrize("flags", [0, ROW_MAJOR, ROW_MAJOR | 8 | 32 | 64 | 128 | 256 | 512])
def test_flags_that_do_not_change_the_bytes_are_accepted(tmp_path: Path, flags: int) -> None:
    image = tiny_model()
    image.flags = flags
    assert opened(tmp_path, image).config.num_layers == 1


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope_scaling": None, "num_experts": 0, "hidden_act": "silu"},
        {"rope_scaling": {"rope_type": "default"}},
        {"sliding_window": 64},
        {"sliding_window": 16, "use_sliding_window": False},
        {"sharding": {"shard_count": 1}},
    ],
)
def test_settings_that_change_nothing_are_accepted(tmp_path: Path, metadata: dict[str, Any]) -> None:
    assert opened(tmp_path, tiny_model(**metadata)).config.num_layers == 1
