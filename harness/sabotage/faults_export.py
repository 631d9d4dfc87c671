"""Faults in what leaves a run: an export that is another model, a tokenizer that lost a part, wrong figures."""

import functools
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_SOURCE, _FIDELITY = "q4kd.trainer.source_model", "q4kd.trainer.fidelity"
_Call = Callable[..., Any]


# --- exported weights ---


def _state_changed(change: Callable[[dict[str, Any]], None]) -> None:
    """Let ``change`` at the weights as they are read, so that what is written agrees with them."""

    def make(original: _Call) -> _Call:
        def read(*arguments: Any) -> Any:
            state = {name: tensor.clone() for name, tensor in original(*arguments).items()}
            change(state)
            return state

        return read

    replace(f"{_SOURCE}:read_state", make)


def _norm_left_out() -> None:
    def flatten(state: dict[str, Any]) -> None:
        for name, tensor in state.items():
            if name.endswith("input_layernorm.weight"):
                tensor.fill_(1.0)

    _state_changed(flatten)


def _embedding_reversed() -> None:
    def flip(state: dict[str, Any]) -> None:
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].flip(0)

    _state_changed(flip)


def _rounded_in_silence() -> None:
    def make(original: _Call) -> _Call:
        return lambda *arguments: original(*arguments).bfloat16().float()

    replace(f"{_SOURCE}:build_model", make)


def _rows_permuted() -> None:
    """Permute the rows of Q and K as llama's, for every architecture."""

    def make(original: _Call) -> _Call:
        def rows(config: Any, target: str, tensor: Any) -> Any:
            if target.split(".")[-2] not in ("attn_q", "attn_k"):
                return original(config, target, tensor)
            heads = len(tensor) // config.head_dim
            return tensor.reshape(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)

        return rows

    replace("q4kd.trainer.gguf_write:file_rows", make)


def _scales_too_large() -> None:
    """Store blocks that decode to weights 4 % too large, which a check of one tensor takes for rounding."""

    def make(original: _Call) -> _Call:
        def quantize(weights: Any, quant_type: str) -> Any:
            return original(weights if quant_type in ("F16", "F32") else weights * weights.dtype.type(1.04), quant_type)

        return quantize

    replace("q4kd.trainer.quantize:quantize", make)


def _coarse_levels() -> None:
    """Fit Q4_K to weights that have seven levels in each sub-block of 32."""

    def make(original: _Call) -> _Call:
        def fit(blocks: Any) -> Any:
            parts = blocks.reshape(-1, 32)
            low = parts.min(1, keepdims=True)
            step = (parts.max(1, keepdims=True) - low) / 6 + parts.dtype.type(1e-12)
            return original((((parts - low) / step).round() * step + low).reshape(blocks.shape))

        return fit

    def fits(original: Any) -> Any:
        return {**original, "Q4_K": make(original["Q4_K"])}

    replace("q4kd.trainer.quantize:_FITS", fits)


# --- exported tokenizer and card ---


def _vocabulary_without(part: str) -> None:
    def make(original: _Call) -> _Call:
        import dataclasses

        return lambda *arguments: dataclasses.replace(original(*arguments), **{part: {}})

    replace(f"{_SOURCE}:read_vocabulary", make)


def _another_split() -> None:
    replace("q4kd.trainer.gguf_vocabulary:pre_tokenizer_name", lambda _original: lambda _tokenizer: "gpt-2")


def _folder_template_dropped() -> None:
    def make(original: _Call) -> _Call:
        def load(*arguments: Any) -> Any:
            tokenizer = original(*arguments)
            tokenizer.chat_template = None
            return tokenizer

        return load

    replace("q4kd.trainer.student:load_tokenizer", make)


def _card_without_provenance() -> None:
    replace("q4kd.trainer.model_card:provenance", lambda _original: lambda _record: {})


def _card_with_paths() -> None:
    replace("q4kd.trainer.run_record:_public", lambda _original: lambda value: value)


# --- refusals ---


def _smoke_run_exported() -> None:
    def make(original: _Call) -> _Call:
        def find(path: Any, checkpoint: str | None = None, *rest: Any) -> Any:
            unfinished = not (path / "model").is_dir() and not (path / "config.json").is_file()
            return original(path, "last" if checkpoint is None and unfinished else checkpoint, *rest)

        return find

    replace("q4kd.trainer.run_record:find_source", make)


def _unchecked(target: str) -> None:
    replace(target, lambda _original: lambda *_arguments, **_options: None)


# --- fidelity ---


def _rows_compared(change: Callable[[_Call, Any, Any, Any], Any]) -> None:
    def make(original: _Call) -> _Call:
        return lambda logits_a, logits_b, labels: change(original, logits_a, logits_b, labels)

    replace(f"{_FIDELITY}:compare_rows", make)


def _kl_reversed() -> None:
    def change(original: _Call, a: Any, b: Any, labels: Any) -> Any:
        return (original(b, a, labels)[0], *original(a, b, labels)[1:])

    _rows_compared(change)


def _agreement_shifted() -> None:
    def change(original: _Call, a: Any, b: Any, labels: Any) -> Any:
        return (*original(a, b, labels)[:3], a.argmax(-1) == b.roll(1, 0).argmax(-1))

    _rows_compared(change)


def _labels_shifted() -> None:
    _rows_compared(lambda original, a, b, labels: original(a, b, labels.roll(1)))


def _cooler_a() -> None:
    _rows_compared(lambda original, a, b, labels: original(a * 1.001, b, labels))


_READ = f"{_SOURCE}:read_state"
declare("checkpoint", "export-norm-left-out", "exported norms before attention are all ones", _norm_left_out, _READ)
declare(
    "checkpoint", "export-tokens-reversed", "rows of the exported embedding are reversed", _embedding_reversed, _READ
)
declare(
    "checkpoint",
    "export-rounded",
    "the exported folder's weights went through bfloat16",
    _rounded_in_silence,
    f"{_SOURCE}:build_model",
)
declare(
    "checkpoint",
    "export-rows-permuted",
    "rows of Q and K are permuted as llama's in a qwen2 file",
    _rows_permuted,
    "q4kd.trainer.gguf_write:file_rows",
)
declare(
    "quantisation",
    "quantised-too-large",
    "quantised weights are stored 4 % too large",
    _scales_too_large,
    "q4kd.trainer.quantize:quantize",
)
declare(
    "quantisation",
    "q4-few-levels",
    "Q4_K uses seven of its sixteen levels",
    _coarse_levels,
    "q4kd.trainer.quantize:_FITS",
)
for _name, _part, _title in (
    ("special-ids-dropped", "special_ids", "the GGUF names no begin and end tokens"),
    ("template-dropped", "chat_templates", "the GGUF has no chat template"),
):
    _apply = functools.partial(_vocabulary_without, _part)
    declare("vocabulary", _name, _title, _apply, f"{_SOURCE}:read_vocabulary")
declare(
    "vocabulary",
    "another-split",
    "the GGUF says that text is split as GPT-2 does",
    _another_split,
    "q4kd.trainer.gguf_vocabulary:pre_tokenizer_name",
)
declare(
    "vocabulary",
    "folder-template-dropped",
    "the exported folder has no chat template",
    _folder_template_dropped,
    "q4kd.trainer.student:load_tokenizer",
)
declare(
    "logging",
    "card-without-provenance",
    "the model card does not say what the model was made from",
    _card_without_provenance,
    "q4kd.trainer.model_card:provenance",
)
declare(
    "logging",
    "card-with-paths",
    "the model card shows the paths of the machine",
    _card_with_paths,
    "q4kd.trainer.run_record:_public",
)
declare(
    "dispatch",
    "smoke-run-exported",
    "a run without a final model is exported from its last checkpoint unasked",
    _smoke_run_exported,
    "q4kd.trainer.run_record:find_source",
)
for _name, _target, _title in (
    ("any-pair-compared", f"{_FIDELITY}:check_comparable", "fidelity compares models that do not belong together"),
    ("export-overwrites", "q4kd.harness.commands_export:_refuse_existing", "an export replaces what is there"),
):
    declare("dispatch", _name, _title, functools.partial(_unchecked, _target), _target)
_ROWS = f"{_FIDELITY}:compare_rows"
declare("loss", "fidelity-kl-reversed", "fidelity computes KL(A || B)", _kl_reversed, _ROWS)
declare(
    "loss", "fidelity-agreement-shifted", "agreement compares each row with the one before", _agreement_shifted, _ROWS
)
declare("loss", "fidelity-labels-shifted", "perplexities are of the token before", _labels_shifted, _ROWS)
declare("loss", "fidelity-cooler-a", "logits of A are scaled by 1.001", _cooler_a, _ROWS)
