"""A measurement of the tokenizers that ``q4kd export`` writes into GGUF files, by the ids that are read back."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from q4kd.harness.inputs.arrays import Arrays, save_arrays
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import read_json, write_json


def write_vocabulary(path: Path, content: Mapping[str, Any]) -> Any:
    """Write a GGUF that holds a tokenizer.json's tokenizer and nothing else; return what is read of a model there."""
    import gguf

    from q4kd.trainer.formats.gguf.added_tokens import name_for
    from q4kd.trainer.formats.gguf.vocabulary import Vocabulary, add_vocabulary

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name_for("model", content))
    rows = 1 + max(*content["model"]["vocab"].values(), *(added["id"] for added in content["added_tokens"]))
    add_vocabulary(writer, Vocabulary(content=content), rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata: dict[str, Any] = {key: part.contents() for key, part in gguf.GGUFReader(path).fields.items()}
    # A file of a tokenizer alone is no model that a teacher could be.
    return SimpleNamespace(path=path, metadata=metadata, tokens=tuple(metadata["tokenizer.ggml.tokens"]))


@probe("tokenizer-files")
def tokenizer_files(contents: Path, out: Path, facts: Path) -> None:
    """Write each tokenizer into a GGUF, read it back, and save checksums of the ids it gives; say how it is named."""
    # It brings what makes inputs, which no other probe has to load.
    from q4kd.harness.subjects.export.tokenizers import id_digests, tokenizer_lines
    from q4kd.trainer.formats.gguf.tokenizer import read_tokenizer

    arrays: Arrays = {}
    names: dict[str, str] = {}
    for number, (name, content) in enumerate(read_json(contents).items()):
        model = write_vocabulary(Path(f"{number}.gguf"), content)
        found = (model.metadata[key] for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre", "general.name"))
        names[name] = " ".join(found)
        read = read_tokenizer(model)
        arrays[name] = id_digests([encoding.ids for encoding in read.encode_batch(tokenizer_lines(number))])
        model.path.unlink()
    save_arrays(out, arrays)
    write_json(facts, {"names": names})
