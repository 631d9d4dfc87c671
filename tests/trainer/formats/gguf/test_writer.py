"""Writing GGUF files, read back with the gguf package's own reader."""

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from q4kd.trainer.errors import InputError  # noqa: E402
from q4kd.trainer.files import write_json  # noqa: E402
from q4kd.trainer.formats.gguf.pre_tokenizers import LLAMA3_SPLIT, QWEN2_SPLIT  # noqa: E402
from q4kd.trainer.formats.gguf.recipes import Mixture, tensor_type, uses_more_bits  # noqa: E402
from q4kd.trainer.formats.gguf.vocabulary import pre_tokenizer_name  # noqa: E402
from q4kd.trainer.formats.gguf.writer import write_gguf, write_gguf_from_folder  # noqa: E402
from q4kd.trainer.formats.huggingface.reader import rope_factors  # noqa: E402

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
QWEN2 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
VOCAB = 40


def make_tokenizer():
    vocab = {chr(ord("a") + i): i for i in range(26)} | {"ab": 26, "abc": 27}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 28, "content": "<|endoftext|>", "special": True},
            {"id": 29, "content": "<think>", "special": False},
        ],
        "normalizer": None,
        "pre_tokenizer": GPT2,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], "ab c"]},
    }


def make_model(*, layers=2, hidden=256, tied=True, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 28,
    }
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(settings | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    return model


def write(path, model, *, recipe="f32", config=None, state=None, tokenizer=None):
    write_gguf(
        path,
        config=config or model.config,
        state=model.state_dict() if state is None else state,
        tokenizer=tokenizer or make_tokenizer(),
        recipe=recipe,
        name="tiny",
    )
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_keys(tmp_path):
    fields, _tensors = write(tmp_path / "m.gguf", make_model(), recipe="q4_k_m")
    expected = {
        "general.architecture": "qwen2",
        "general.name": "tiny",
        "general.quantization_version": 2,
        "general.file_type": 15,
        "qwen2.block_count": 2,
        "qwen2.context_length": 128,
        "qwen2.embedding_length": 256,
        "qwen2.feed_forward_length": 512,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.layer_norm_rms_epsilon": pytest.approx(1e-5, rel=1e-6),
        "qwen2.rope.freq_base": 12345.0,
        "qwen2.vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 28,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": ["a b", "ab c"],
    }
    assert {key: fields[key] for key in expected} == expected
    assert "tokenizer.ggml.bos_token_id" not in fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:2] == ["a", "b"]
    assert tokens[26:31] == ["ab", "abc", "<|endoftext|>", "<think>", "[PAD30]"]
    assert len(tokens) == len(types) == VOCAB
    assert types[26:31] == [1, 1, 3, 4, 5]


@pytest.mark.parametrize(("recipe", "file_type"), [("f32", 0), ("f16", 1), ("q8_0", 7), ("q4_k_m", 15), ("q6_k", 18)])
def test_file_type_follows_the_recipe(tmp_path, recipe, file_type):
    fields, _tensors = write(tmp_path / "m.gguf", make_model(layers=1), recipe=recipe)
    assert fields["general.file_type"] == file_type


@pytest.mark.parametrize("tied", [True, False])
def test_f32_tensors_are_exact(tmp_path, tied):
    model = make_model(tied=tied)
    _fields, tensors = write(tmp_path / "m.gguf", model)
    state = model.state_dict()
    assert ("output.weight" in tensors) is not tied
    assert len(tensors) == 2 + 12 * 2 + (0 if tied else 1)
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.0.attn_q.bias": "model.layers.0.self_attn.q_proj.bias",
        "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
        "blk.0.attn_k.bias": "model.layers.0.self_attn.k_proj.bias",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.1.attn_v.bias": "model.layers.1.self_attn.v_proj.bias",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
    }
    if not tied:
        names["output.weight"] = "lm_head.weight"
    for name, source in names.items():
        tensor = tensors[name]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == list(state[source].shape)[::-1]
        np.testing.assert_array_equal(tensor.data, state[source].numpy())


def test_bfloat16_weights_are_widened_exactly(tmp_path):
    model = make_model(layers=1).bfloat16()
    _fields, tensors = write(tmp_path / "m.gguf", model)
    expected = model.state_dict()["model.layers.0.mlp.up_proj.weight"].float().numpy()
    np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight"].data, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_q4_k_m_types_and_contents(tmp_path, tied):
    model = make_model(layers=4, tied=tied)
    _fields, tensors = write(tmp_path / "m.gguf", model, recipe="q4_k_m")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["token_embd.weight"] == ("Q6_K" if tied else "Q4_K")
    assert kinds.get("output.weight") == (None if tied else "Q6_K")
    for layer, expected in enumerate(["Q4_K", "Q4_K", "Q6_K", "Q6_K"]):
        assert kinds[f"blk.{layer}.attn_v.weight"] == kinds[f"blk.{layer}.ffn_down.weight"] == expected
        assert {kinds[f"blk.{layer}.{part}.weight"] for part in ("attn_q", "attn_k", "ffn_up", "ffn_gate")} == {"Q4_K"}
        assert {kinds[f"blk.{layer}.{part}"] for part in ("attn_q.bias", "attn_norm.weight")} == {"F32"}
    down = model.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    stored = tensors["blk.1.ffn_down.weight"]
    assert stored.shape.tolist() == [512, 256]
    decoded = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert 0.01 < np.linalg.norm(decoded - down) / np.linalg.norm(down) < 0.08


def test_q8_0_and_q6_k_take_every_matrix(tmp_path):
    model = make_model(layers=1, tied=False)
    for recipe in ("q8_0", "q6_k"):
        _fields, tensors = write(tmp_path / "m.gguf", model, recipe=recipe)
        kinds = {tensor.tensor_type.name for name, tensor in tensors.items() if len(tensor.shape) == 2}
        assert kinds == {recipe.upper()}
        up = model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
        stored = tensors["blk.0.ffn_up.weight"]
        decoded = gguf.quants.dequantize(stored.data, stored.tensor_type)
        assert np.linalg.norm(decoded - up) < 0.02 * np.linalg.norm(up)


def test_the_28_layer_recipe_is_llama_cpps():
    more = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert [layer for layer in range(28) if uses_more_bits(layer, 28)] == more
    for part in ("attn_v", "ffn_down"):
        kinds = [
            tensor_type(f"blk.{layer}.{part}.weight", (512, 3584), Mixture("q4_k_m", 28, tied=False))
            for layer in range(28)
        ]
        assert [layer for layer, kind in enumerate(kinds) if kind == "Q6_K"] == more
        assert set(kinds) == {"Q4_K", "Q6_K"}


def test_one_matrix_of_q_k_and_v_is_stored_as_v():
    for recipe in ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q8_0", "iq4_xs"):
        mixture = Mixture(recipe, 28, tied=False)
        for layer in range(28):
            kinds = {tensor_type(f"blk.{layer}.{part}.weight", (512, 512), mixture) for part in ("attn_v", "attn_qkv")}
            assert len(kinds) == 1
    assert tensor_type("blk.0.attn_qkv.weight", (512, 512), Mixture("q4_k_m", 28, tied=False)) == "Q6_K"


def test_columns_without_superblocks_fall_back(tmp_path):
    model = make_model(hidden=96, intermediate_size=520)
    for recipe in ("q4_k_m", "q6_k", "q8_0"):
        _fields, tensors = write(tmp_path / "m.gguf", model, recipe=recipe)
        assert tensors["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"  # 96 columns: three blocks of 32
        assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "F16"  # 520 columns: no blocks at all
        expected = model.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy().astype(np.float16)
        np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"].data, expected)


def test_a_folder_writes_the_same_file(tmp_path):
    model, folder = make_model(tied=False), tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    write_json(folder / "tokenizer.json", make_tokenizer())
    write(tmp_path / "a.gguf", model, recipe="q4_k_m")
    write_gguf_from_folder(tmp_path / "b.gguf", model=folder, recipe="q4_k_m", name="tiny")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_rope_base_of_an_older_config(tmp_path):
    model = make_model(layers=1)
    config = model.config.to_dict() | {"rope_parameters": None, "rope_theta": 54321.0}
    fields, _tensors = write(tmp_path / "m.gguf", model, config=config)
    assert fields["qwen2.rope.freq_base"] == 54321.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type"),
        ({"model_type": "llama"}, "k_proj.bias"),
        ({"head_dim": 128}, "q_proj"),
        ({"intermediate_size": 256}, "mlp.gate_proj"),
        ({"num_hidden_layers": 1}, "unknown"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"vocab_size": 20}, "embed_tokens"),
    ],
)
def test_configs_that_do_not_describe_the_weights_are_refused(tmp_path, change, message):
    model = make_model()
    with pytest.raises(InputError, match=message):
        write(tmp_path / "m.gguf", model, config=model.config.to_dict() | change)
    assert list(tmp_path.iterdir()) == []


def make_llama(model_type="llama", **changes):
    config = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[model_type]
    model = {"llama": transformers.LlamaForCausalLM, "mistral": transformers.MistralForCausalLM}[model_type]
    settings = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return model(config(**(settings | changes)))


def test_llama_rows_are_permuted_as_llama_cpp_does(tmp_path):
    model = make_llama()
    fields, tensors = write(tmp_path / "m.gguf", model)
    assert fields["general.architecture"] == "llama"
    assert fields["llama.rope.dimension_count"] == 16
    assert "rope_freqs.weight" not in tensors
    state = model.state_dict()
    for name, heads in (("q", 4), ("k", 2)):
        rows = state[f"model.layers.0.self_attn.{name}_proj.weight"].numpy()
        # LlamaModel.permute of convert_hf_to_gguf.py
        expected = rows.reshape(heads, 2, len(rows) // heads // 2, 64).swapaxes(1, 2).reshape(rows.shape)
        np.testing.assert_array_equal(tensors[f"blk.0.attn_{name}.weight"].data, expected)
    value = state["model.layers.0.self_attn.v_proj.weight"].numpy()
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight"].data, value)


def test_llama3_factors_are_a_tensor_and_mistral_is_written_as_llama(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    _fields, tensors = write(tmp_path / "m.gguf", make_llama(rope_parameters=rope))
    assert tensors["rope_freqs.weight"].tensor_type.name == "F32"
    np.testing.assert_array_equal(
        tensors["rope_freqs.weight"].data, rope_factors(make_llama(rope_parameters=rope).config.to_dict())
    )
    fields, tensors = write(tmp_path / "m.gguf", make_llama("mistral", sliding_window=None))
    assert fields["general.architecture"] == "llama"
    assert "rope_freqs.weight" not in tensors


def test_a_head_size_of_its_own_is_written(tmp_path):
    fields, tensors = write(tmp_path / "m.gguf", make_llama("mistral", head_dim=32, sliding_window=None))
    assert (fields["llama.attention.key_length"], fields["llama.attention.value_length"]) == (32, 32)
    assert tensors["blk.0.attn_q.weight"].shape.tolist() == [64, 128]


def test_an_untied_head_cannot_be_dropped_silently(tmp_path):
    model = make_model(tied=False)
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        write(tmp_path / "m.gguf", model, config=model.config.to_dict() | {"tie_word_embeddings": True})


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": GPT2 | {"add_prefix_space": True}},
        {"pre_tokenizer": GPT2 | {"use_regex": False}},
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Lowercase"}, "pre_tokenizer": QWEN2},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [QWEN2["pretokenizers"][0], GPT2]}},
        {"model": {"type": "Unigram", "vocab": {}, "merges": []}},
    ],
)
def test_tokenizers_that_llama_cpp_would_read_differently_are_refused(change):
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        pre_tokenizer_name(make_tokenizer() | change)


def test_pre_tokenizer_names():
    assert pre_tokenizer_name(make_tokenizer()) == "gpt-2"
    qwen2 = make_tokenizer() | {"pre_tokenizer": QWEN2}
    assert pre_tokenizer_name(qwen2) == "qwen2"
    assert pre_tokenizer_name(qwen2 | {"normalizer": {"type": "NFC"}}) == "qwen2"
    model = make_tokenizer()["model"] | {"ignore_merges": True}
    split = QWEN2["pretokenizers"][0] | {"pattern": {"Regex": LLAMA3_SPLIT}}
    llama3 = make_tokenizer() | {"pre_tokenizer": QWEN2 | {"pretokenizers": [split, QWEN2["pretokenizers"][1]]}}
    assert pre_tokenizer_name(llama3 | {"model": model}) == "llama-bpe"
    assert pre_tokenizer_name(llama3) == "dbrx"
    # Where merges make every token, taking whole words changes nothing; where they do not, the name would be wrong.
    assert pre_tokenizer_name(qwen2 | {"model": model}) == "qwen2"
    word = model["vocab"] | {"unreached": len(model["vocab"])}
    for wrong in (
        llama3 | {"model": model, "normalizer": {"type": "NFC"}},
        qwen2 | {"model": model | {"vocab": word}},
    ):
        with pytest.raises(InputError):
            pre_tokenizer_name(wrong)
    other = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "."}}, GPT2]}
    with pytest.raises(InputError):
        pre_tokenizer_name(make_tokenizer() | {"pre_tokenizer": other})


@pytest.mark.parametrize(("first", "expected"), [("SpecialToken", True), ("Sequence", False)])
def test_a_tokenizer_that_begins_every_text_says_so(tmp_path, first, expected):
    template = {"type": "TemplateProcessing", "single": [{first: {"id": "A", "type_id": 0}}]}
    post = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    fields, _tensors = write(tmp_path / "m.gguf", make_llama(), tokenizer=make_tokenizer() | {"post_processor": post})
    assert fields["tokenizer.ggml.add_bos_token"] is expected


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    path, model = tmp_path / "m.gguf", make_model()
    path.write_bytes(b"old")
    state = dict(model.state_dict())
    state["model.layers.1.mlp.down_proj.weight"] = torch.full_like(state["model.layers.1.mlp.down_proj.weight"], np.nan)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj"):
        write(path, model, recipe="q4_k_m", state=state)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["m.gguf"]


def test_an_unknown_recipe_and_too_many_tokens_are_refused(tmp_path):
    with pytest.raises(InputError, match="q4_k_m"):
        write(tmp_path / "m.gguf", make_model(), recipe="q3_k")
    tokenizer = make_tokenizer()
    tokenizer["added_tokens"].append({"id": VOCAB, "content": "<x>", "special": False})
    with pytest.raises(InputError, match="vocab_size"):
        write(tmp_path / "m.gguf", make_model(), tokenizer=tokenizer)
