"""Templates from strangers: bounded time and memory, one line for whatever they raise, and the text of transformers."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from q4kd.trainer.data.chats import renderer as module
from q4kd.trainer.data.chats.renderer import ChatRenderer, RenderError
from q4kd.trainer.data.chats.template import ChatTemplate
from q4kd.trainer.data.documents import Document
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.demo import student_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.student.model import load_tokenizer

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LOOP = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
LONG = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(student_path())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    monkeypatch.setattr(module, "SECONDS", 1.0)
    monkeypatch.setattr(module, "MEMORY_BYTES", 1 << 30)
    started = time.monotonic()
    yield started


@pytest.mark.parametrize(
    "template",
    [
        LONG + "{% endfor %}",
        "{{ 9**(9**9) }}",
        "{{ 'a' * 2000000000 }}",
        "{{ 'a'.center(3000000000) }}",
        "{{ '{:>3000000000}'.format('a') }}",
        "{{ '%3000000000d' % 1 }}",
        "{{ ('a' * 100000000).replace('a', 'a' * 1000) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'a' * 90000000 }}",
    ],
)
@pytest.mark.usefixtures("short")
def test_a_template_has_bounded_time_and_memory(template: str) -> None:
    renderer = ChatRenderer(template, {}, "2026-11-30")
    with pytest.raises(RenderError):
        renderer.render({"messages": CHAT})
    assert renderer._process is None or renderer._process.poll() is None
    renderer.close()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 2.0 ** 5000 }}", "OverflowError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ nothing.at_all }}", "UndefinedError"),
        ("{{ messages[0]['content'].__class__.__mro__ }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 400 + "1" + ")" * 400 + " }}", ""),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages | nothing }}", "TemplateAssertionError"),
        ("{% include 'x' %}", "TypeError"),
        ("{{ '\ud800' }}", "half a surrogate"),
        ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "SecurityError"),
    ],
)
def test_whatever_a_template_raises_is_one_line(tokenizer: Any, template: str, words: str) -> None:
    tokenizer.chat_template = template
    encoder = ChatTemplate(tokenizer, completion_only=False)
    for _ in range(2):  # and again, after the first
        with pytest.raises(InputError, match="chat c:1") as caught:
            encoder.encode(CHAT, "c:1")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    encoder.close()


def test_a_chat_is_refused_and_the_next_one_is_rendered() -> None:
    renderer = ChatRenderer("{{ 1 / (messages | length - 2) }}", {}, "2026-11-30")
    with pytest.raises(RenderError, match="ZeroDivision"):
        renderer.render({"messages": CHAT})
    assert renderer.render({"messages": CHAT[:1]})["examples"][0]["text"] == "-1.0"
    renderer.close()
    assert renderer.render({"messages": CHAT[:1]})["examples"][0]["text"] == "-1.0"
    renderer.close()


def test_a_process_ends_with_its_renderer() -> None:
    renderer = ChatRenderer(LOOP, {}, "2026-11-30")
    renderer.render({"messages": CHAT})
    process = renderer._process
    assert process is not None
    del renderer
    assert process.poll() is not None


def test_the_date_is_the_one_that_was_chosen_and_nothing_is_random() -> None:
    template = "{{ strftime_now('%d %b %Y') }} {{ range(1000) | random }} {{ lipsum(n=1) }}"
    first = [
        ChatRenderer(template, {}, "2026-11-30").render({"messages": CHAT})["examples"][0]["text"] for _ in range(2)
    ]
    assert first[0] == first[1]
    assert first[0].startswith("30 Nov 2026 ")


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{{ bos_token }}{{ messages | tojson }}{{ eos_token }}",
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ tools is defined }}{{ documents }}",
        "{%- for m in messages %}\n  {%- if loop.first %}{% continue %}{% endif %}\n{{ m.content|trim }}\n{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages[1].reasoning_content }}{{ messages[1].thinking }}{{ add_generation_prompt }}",
        "{{ dict(a=1) | items | list }}{{ 'é' | tojson }}",
    ],
)
def test_the_text_is_that_of_transformers(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    chat = [CHAT[0], {**CHAT[1], "reasoning": "why"}]
    # transformers 5.24 adds these two names of reasoning itself, 5.17 does not: the texts are compared, not the names.
    named = [CHAT[0], {"thinking": "why", **chat[1], "reasoning_content": "why"}]
    tools = [{"name": "é", "parameters": {"b": 1, "a": 2}}]
    wanted = tokenizer.apply_chat_template(named, tools=tools, tokenize=False)
    renderer = ChatRenderer(template, tokenizer.special_tokens_map, "2026-11-30")
    assert renderer.render({"messages": chat, "tools": tools})["examples"][0]["text"] == wanted
    renderer.close()


def test_chats_that_are_rendered_together_are_those_rendered_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ 7 // (messages | length - 2) }}" + LOOP
    chats = [CHAT[:1] * length for length in (1, 3, 2, 4)]
    documents = [Document(str(len(chat)), messages=tuple(chat)) for chat in chats] * 40
    alone = ChatTemplate(tokenizer, completion_only=False)
    together = DocumentEncoder(lambda texts: [], 0, chat=ChatTemplate(tokenizer, completion_only=False))
    good = [document for document in documents if document.name != "2"]
    wanted = [alone.encode(document.messages or (), document.name)[0].ids.tolist() for document in good]
    assert [found.ids.tolist() for found in together.encode(good)] == wanted
    with pytest.raises(InputError, match=r"chat 2: .*ZeroDivision"):
        list(together.encode(documents))
    alone.close()


@pytest.mark.usefixtures("short")
def test_of_chats_rendered_together_the_endless_one_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages | length == 2 %}" + LONG + "{% endfor %}{% endif %}" + LOOP
    documents = [Document(str(n), messages=tuple(CHAT[:1] * (2 if n == 5 else 1))) for n in range(9)]
    encoder = DocumentEncoder(lambda texts: [], 0, chat=ChatTemplate(tokenizer, completion_only=False))
    with pytest.raises(InputError, match=r"chat 5: .*processor time"):
        list(encoder.encode(documents))
