"""Chats: what the template writes, and which tokens the assistant said."""

from typing import Any

import pytest

from q4kd.trainer.data.chat import ChatTemplate
from q4kd.trainer.demo import student_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.student.model import load_tokenizer

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</>\n"
    "{% endgeneration %}{% else %}{{ m['content'] }}</>\n{% endif %}{% endfor %}"
)
# Earlier assistant turns are cut when a user turn follows, as templates of reasoning models do.
REWRITING = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' and not loop.last %}-{% else %}"
    "{{ m['content'] }}{% endif %};{% endfor %}"
)
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "def mean(values):"},
    {"role": "assistant", "content": "return sum(values) / len(values)"},
    {"role": "user", "content": "and the median?"},
    {"role": "assistant", "content": "sorted(values)[len(values) // 2]"},
]


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(student_path())


def said(tokenizer: Any, template: str) -> str:
    tokenizer.chat_template = template
    encoded = ChatTemplate(tokenizer, completion_only=True).encode(CHAT, "c:1")
    assert encoded.learnt is not None
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(encoded.ids) == whole
    return str(tokenizer.decode(encoded.ids[encoded.learnt]))


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_what_the_assistant_says_is_learnt(tokenizer: Any, template: str) -> None:
    answers = [message["content"] for message in CHAT[1::2]]
    assert said(tokenizer, template) == "".join(f"{answer}</>\n" for answer in answers)


def test_everything_is_learnt_without_completion_only(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    encoded = ChatTemplate(tokenizer, completion_only=False).encode(CHAT, "c:1")
    assert encoded.learnt is None
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_a_template_that_rewrites_turns_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"chat c:1.*two ways") as caught:
        said(tokenizer, REWRITING)
    assert "message 2" in str(caught.value)


def test_no_template_and_refused_chats_are_one_line(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="one chat template"):
        ChatTemplate(tokenizer, completion_only=False).encode(CHAT, "c:1")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"c:1.*roles must alternate"):
        ChatTemplate(tokenizer, completion_only=False).encode(CHAT, "c:1")
    tokenizer.chat_template = "{{ messages[0]['content'].__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match="c:1"):
        ChatTemplate(tokenizer, completion_only=False).encode(CHAT, "c:1")
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(InputError, match="c:1"):
        ChatTemplate(tokenizer, completion_only=False).encode(CHAT, "c:1")
