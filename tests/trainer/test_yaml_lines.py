"""Limits of YAML that may come from anybody: how many values a document may stand for."""

import pytest

from q4kd.trainer import yaml_lines
from q4kd.trainer.errors import InputError


@pytest.mark.parametrize(("aliases", "is_read"), [(8, True), (9, False)])
def test_an_alias_counts_as_the_values_it_stands_for(
    aliases: int, is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yaml_lines, "MAX_NODES", 10)  # the list, its first value, and eight more
    text = f"[&a 1{', *a' * aliases}]".encode()
    if is_read:
        assert yaml_lines.parse_yaml(text, "x.yaml").value == [1] * (aliases + 1)
        return
    with pytest.raises(InputError, match="at most 10 values"):
        yaml_lines.parse_yaml(text, "x.yaml")


@pytest.mark.parametrize(("aliases", "is_read"), [(2, True), (3, False)])
def test_an_alias_of_a_list_counts_as_all_its_values(
    aliases: int, is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yaml_lines, "MAX_NODES", 10)  # the outer list, and three lists of two values each
    text = f"[&a [1, 2]{', *a' * aliases}]".encode()
    if is_read:
        assert yaml_lines.parse_yaml(text, "x.yaml").value == [[1, 2]] * (aliases + 1)
        return
    with pytest.raises(InputError, match="at most 10 values"):
        yaml_lines.parse_yaml(text, "x.yaml")
