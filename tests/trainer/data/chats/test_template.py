"""Chats: what the template writes, and which tokens the assistant said."""

from typing import Any

import pytest

from q4kd.trainer.data.chats.template import ChatTemplate
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
    (encoded,) = ChatTemplate(tokenizer, completion_only=True).encode(CHAT, "c:1")
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
    (encoded,) = ChatTemplate(tokenizer, completion_only=False).encode(CHAT, "c:1")
    assert encoded.learnt is None
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)


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


TOOLS = [{"type": "function", "function": {"name": "look"}}]
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + PLAIN
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% else %}"
    "ASSISTANT: {{ m['content'] }}</>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<system>You are helpful</>\n{% endif %}" + PLAIN
CALLS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ CONTENT }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def learnt(tokenizer: Any, template: str, chat: list[dict[str, Any]], *more: Any, only: bool = True) -> str:
    tokenizer.chat_template = template
    encoder = ChatTemplate(tokenizer, completion_only=only)
    (encoded,) = encoder.encode(chat, "c:1", *more)
    encoder.close()
    assert encoded.learnt is not None
    return str(tokenizer.decode(encoded.ids[encoded.learnt]))


def test_the_first_token_of_an_answer_is_learnt_where_it_begins_before_it(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "name"}, {"role": "assistant", "content": "import os"}] * 2
    assert learnt(tokenizer, SPACED, chat) == " import os</> import os</>"


@pytest.mark.parametrize("template", [PLAIN, DEFAULT_SYSTEM, MARKED])
def test_of_a_first_turn_only_what_is_said_is_learnt(tokenizer: Any, template: str) -> None:
    assert learnt(tokenizer, template, [CHAT[1], CHAT[0], CHAT[3]]) == (
        f"{CHAT[1]['content']}</>\n{CHAT[3]['content']}</>\n"
    )


def test_tools_are_written_or_the_chat_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = WITH_TOOLS
    (encoded,) = ChatTemplate(tokenizer, completion_only=False).encode(CHAT, "c:1", {"tools": TOOLS})
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False)
    assert learnt(tokenizer, WITH_TOOLS, CHAT, {"tools": TOOLS}).count("</>") == 2
    tokenizer.chat_template = PLAIN
    for chat, context in ((CHAT, {"tools": TOOLS}), ([CHAT[0], {**CHAT[1], "reasoning_content": "hm"}], {})):
        with pytest.raises(InputError, match="does not name it") as caught:
            ChatTemplate(tokenizer, completion_only=False).encode(chat, "c:1", context)
        assert "--ignore-fields" in str(caught.value)


@pytest.mark.parametrize("content", ["m.content", "'' if m.content is none else m.content", "'' + m.content"])
def test_a_call_without_content_is_written_and_never_as_none(tokenizer: Any, content: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    said = learnt(tokenizer, CALLS.replace("CONTENT", content), [CHAT[0], call])
    assert said == '[{"name": "look"}]</>\n'


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_weights_say_which_answers_are_learnt(tokenizer: Any, template: str) -> None:
    answer = f"{CHAT[3]['content']}</>\n"
    assert learnt(tokenizer, template, CHAT, {}, (None, False, None, None)) == answer
    rest = learnt(tokenizer, template, CHAT, {}, (None, False, None, None), only=False)
    assert CHAT[1]["content"] not in rest
    assert rest.startswith("<user>") and rest.endswith(answer)
    if template == PLAIN:
        assert CHAT[2]["content"] in learnt(tokenizer, template, CHAT, {}, (None, None, True, None))
    else:
        with pytest.raises(InputError, match="weight"):
            learnt(tokenizer, template, CHAT, {}, (False, None, None, None))
