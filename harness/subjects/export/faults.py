"""Faults in what leaves a run: an export that is another model, a tokenizer that lost a part, wrong figures."""

import contextlib
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, declare, fault, patch, replace

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from q4kd.trainer.formats.architecture import TeacherConfig

_SOURCE, _FIDELITY = "q4kd.trainer.export.source_model", "q4kd.trainer.export.fidelity"
_STATE = f"{_SOURCE}:read_state"
_MODEL = f"{_SOURCE}:read_model"
_FITS = "q4kd.trainer.formats.blocks.quantize:_FITS"
_ROWS = f"{_FIDELITY}:compare_rows"
_MORE_BITS = "q4kd.trainer.formats.gguf.recipes:uses_more_bits"
_INSPECT = "q4kd.trainer.cli.teacher:_inspect"
_FILE_ROWS = "q4kd.trainer.formats.gguf.writer:file_rows"
_QUANTIZE = "q4kd.trainer.formats.blocks.quantize:quantize"
_PRE_TOKENIZER_NAME = "q4kd.trainer.formats.gguf.vocabulary:pre_tokenizer_name"
_LOAD_TOKENIZER = "q4kd.trainer.student.model:load_tokenizer"
_ADD_VOCABULARY = "q4kd.trainer.formats.gguf.vocabulary:add_vocabulary"
_SCORES = "q4kd.trainer.formats.gguf.vocabulary:_scores"
_HYPERPARAMETERS = "q4kd.trainer.formats.gguf.writer:add_hyperparameters"
_EXPORT_HF = "q4kd.trainer.export.to_huggingface:export_hf"
_PROVENANCE = "q4kd.trainer.export.model_card:provenance"
_PUBLIC = "q4kd.trainer.export.run_record:_public"
_CHECK_COMPARABLE = f"{_FIDELITY}:check_comparable"
_State = dict[str, "Tensor"]
_Compare = Callable[["Tensor", "Tensor", "Tensor"], tuple["Tensor", ...]]


# --- exported weights ---


@patch("checkpoint", "tied-flag-trusted", "a head of its own is dropped where the config ties it", _MODEL)
def _tied_flag_trusted(original: Callable[..., tuple[Any, _State]], source: object) -> tuple[Any, _State]:
    from q4kd.trainer.export.source_model import read_config

    config, state = original(source)
    config.tie_word_embeddings = read_config(source).tie_word_embeddings  # type: ignore[arg-type]
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return config, state


@patch("checkpoint", "export-norm-left-out", "exported norms before attention are all ones", _STATE)
def _norm_left_out(original: Callable[..., _State], *arguments: object) -> _State:
    # The weights are changed as they are read, so that what is written agrees with them.
    state = {name: tensor.clone() for name, tensor in original(*arguments).items()}
    for name, tensor in state.items():
        if name.endswith("input_layernorm.weight"):
            tensor.fill_(1.0)
    return state


@patch("checkpoint", "export-tokens-reversed", "rows of the exported embedding are reversed", _STATE)
def _embedding_reversed(original: Callable[..., _State], *arguments: object) -> _State:
    state = original(*arguments)
    return {**state, "model.embed_tokens.weight": state["model.embed_tokens.weight"].flip(0)}


@patch("checkpoint", "export-rounded", "the exported folder's weights went through bfloat16", f"{_SOURCE}:build_model")
def _rounded_in_silence(original: Callable[..., Any], *arguments: object) -> object:
    return original(*arguments).bfloat16().float()


@patch("checkpoint", "export-rows-permuted", "rows of Q and K are permuted as llama's in a qwen2 file", _FILE_ROWS)
def _rows_permuted(original: Call, config: "TeacherConfig", target: str, tensor: "Tensor") -> object:
    if target.split(".")[-2] not in ("attn_q", "attn_k"):
        return original(config, target, tensor)
    heads = len(tensor) // config.head_dim
    return tensor.reshape(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)


@patch("quantisation", "quantised-too-large", "quantised weights are stored 4 % too large", _QUANTIZE)
def _scales_too_large(original: Call, weights: "npt.NDArray[np.float32]", quant_type: str, *rest: object) -> object:
    # A check of one tensor takes 4 % for rounding.
    larger = weights if quant_type in ("F16", "F32") else weights * weights.dtype.type(1.04)
    return original(larger, quant_type, *rest)


@fault("quantisation", "q4-few-levels", "Q4_K uses seven of its sixteen levels", _FITS)
def _coarse_levels() -> None:
    """Fit Q4_K to weights that have seven levels in each sub-block of 32."""

    def make(original: Call) -> Call:
        def fit(blocks: "npt.NDArray[np.float32]", *importance: object) -> object:
            parts = blocks.reshape(-1, 32)
            low = parts.min(1, keepdims=True)
            step = (parts.max(1, keepdims=True) - low) / 6 + parts.dtype.type(1e-12)
            return original((((parts - low) / step).round() * step + low).reshape(blocks.shape), *importance)

        return fit

    replace(_FITS, lambda original: {**original, "Q4_K": make(original["Q4_K"])})


@patch("quantisation", "more-bits-at-the-end", "only the last layers are stored with more bits", _MORE_BITS)
def _more_bits_at_the_end(_original: Call, layer: int, layers: int) -> bool:
    return layer >= layers // 2


@patch("dispatch", "inspect-forgets-a-type", "inspect leaves Q6_K out of what it counts", _INSPECT)
def _inspect_forgets_a_type(original: Call, args: object) -> object:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = original(args)
    facts = json.loads(printed.getvalue())
    facts["types"].pop("Q6_K", None)
    print(json.dumps(facts))
    return code


# --- exported tokenizer and card ---


def _vocabulary_without(part: str) -> None:
    def make(original: Callable[..., Any]) -> Call:
        import dataclasses

        return lambda *arguments: dataclasses.replace(original(*arguments), **{part: {}})

    replace(f"{_SOURCE}:read_vocabulary", make)


for _name, _part, _title in (
    ("special-ids-dropped", "special_ids", "the GGUF names no begin and end tokens"),
    ("template-dropped", "chat_templates", "the GGUF has no chat template"),
):
    _apply = functools.partial(_vocabulary_without, _part)
    declare("vocabulary", _name, _title, _apply, f"{_SOURCE}:read_vocabulary")


def _with_types(change: Callable[[int], int]) -> None:
    """Write the vocabulary, then change the kinds of its tokens: the exporter's own reader does not look at them."""

    def make(original: Call) -> Call:
        def add(writer: Any, *rest: object) -> None:
            original(writer, *rest)
            kinds = writer.kv_data[-1]["tokenizer.ggml.token_type"]
            kinds.value = [change(kind) for kind in kinds.value]

        return add

    replace(_ADD_VOCABULARY, make)


# Kinds of llama.cpp: 1 normal, 3 control, 4 user-defined, 5 unused, 6 byte.
for _name, _from, _to, _title in (
    ("added-tokens-plain", 4, 1, "added tokens are exported as plain ones"),
    ("control-tokens-plain", 3, 1, "special tokens are exported as plain ones"),
    ("bytes-plain", 6, 1, "the byte tokens of a SentencePiece vocabulary are exported as plain ones"),
    ("padding-rows-plain", 5, 1, "rows without a token are exported as plain tokens"),
):
    _change = functools.partial(lambda old, new, kind: new if kind == old else kind, _from, _to)
    declare("vocabulary", _name, _title, functools.partial(_with_types, _change), _ADD_VOCABULARY)


@patch("vocabulary", "scores-dropped", "every SentencePiece score is exported as zero", _SCORES)
def _scores_dropped(original: Callable[..., list[float]], *arguments: object) -> list[float]:
    return [0.0 for _ in original(*arguments)]


@patch("vocabulary", "vocabulary-size-dropped", "the GGUF does not say the size of its vocabulary", _HYPERPARAMETERS)
def _vocabulary_size_dropped(original: Call, writer: Any, config: "TeacherConfig") -> None:
    original(writer, config)
    del writer.kv_data[-1][f"{config.architecture}.vocab_size"]


@patch("vocabulary", "folder-added-tokens-special", "every added token of a folder is a special one", _EXPORT_HF)
def _folder_added_special(original: Call, source: object, out: Path, **options: object) -> object:
    report = original(source, out, **options)
    path = out / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for added in content["added_tokens"]:
        added["special"] = True
    path.write_text(json.dumps(content), encoding="utf-8")
    return report


@patch("vocabulary", "another-split", "the GGUF says that text is split as GPT-2 does", _PRE_TOKENIZER_NAME)
def _another_split(_original: Call, _tokenizer: object) -> str:
    return "gpt-2"


@patch("vocabulary", "folder-template-dropped", "the exported folder has no chat template", _LOAD_TOKENIZER)
def _folder_template_dropped(original: Callable[..., Any], *arguments: object) -> object:
    tokenizer = original(*arguments)
    tokenizer.chat_template = None
    return tokenizer


@patch("logging", "card-without-provenance", "the model card does not say what the model was made from", _PROVENANCE)
def _card_without_provenance(_original: Call, _record: object) -> dict[str, object]:
    return {}


@patch("logging", "card-with-paths", "the model card shows the paths of the machine", _PUBLIC)
def _card_with_paths(_original: Call, value: object) -> object:
    return value


# --- refusals ---


@patch(
    "dispatch",
    "smoke-run-exported",
    "a run without a final model is exported from its last checkpoint unasked",
    "q4kd.trainer.export.run_record:find_source",
)
def _smoke_run_exported(original: Call, path: Path, checkpoint: str | None = None, *rest: object) -> object:
    unfinished = not (path / "model").is_dir() and not (path / "config.json").is_file()
    return original(path, "last" if checkpoint is None and unfinished else checkpoint, *rest)


@patch("dispatch", "any-pair-compared", "fidelity compares models that do not belong together", _CHECK_COMPARABLE)
@patch("dispatch", "export-overwrites", "an export replaces what is there", "q4kd.harness.cli.export:_refuse_existing")
def _unchecked(_original: Call, *_arguments: object, **_options: object) -> None:
    return


# --- fidelity ---


@patch("loss", "fidelity-kl-reversed", "fidelity computes KL(A || B)", _ROWS)
def _kl_reversed(original: _Compare, a: "Tensor", b: "Tensor", labels: "Tensor") -> tuple["Tensor", ...]:
    return (original(b, a, labels)[0], *original(a, b, labels)[1:])


@patch("loss", "fidelity-agreement-shifted", "agreement compares each row with the one before", _ROWS)
def _agreement_shifted(original: _Compare, a: "Tensor", b: "Tensor", labels: "Tensor") -> tuple["Tensor", ...]:
    return (*original(a, b, labels)[:3], a.argmax(-1) == b.roll(1, 0).argmax(-1))


@patch("loss", "fidelity-labels-shifted", "perplexities are of the token before", _ROWS)
def _labels_shifted(original: _Compare, a: "Tensor", b: "Tensor", labels: "Tensor") -> tuple["Tensor", ...]:
    return original(a, b, labels.roll(1))


@patch("loss", "fidelity-cooler-a", "logits of A are scaled by 1.001", _ROWS)
def _cooler_a(original: _Compare, a: "Tensor", b: "Tensor", labels: "Tensor") -> tuple["Tensor", ...]:
    return original(a * 1.001, b, labels)
