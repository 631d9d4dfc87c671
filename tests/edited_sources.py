"""Syntax trees of this installation, as they would be after an edit."""

from q4kd.harness.syntax_trees import Source, SyntaxTrees, read_source


def edited(module: str, old: str, new: str) -> SyntaxTrees:
    """Return trees in which ``old``, which must be there, reads ``new`` in one module."""

    def read(name: str) -> Source | None:
        source = read_source(name)
        if name != module or source is None:
            return source
        assert old in source.text, f"{module} does not say {old!r}"
        return source._replace(text=source.text.replace(old, new))

    return SyntaxTrees(read)
