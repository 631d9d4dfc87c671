"""Templates that write earlier turns anew: one chat is several examples, each answer after what the model will see."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from reduced_templates import DEEPSEEK_R1, GEMMA4, GLM47, GPT_OSS, QWEN3, QWEN35

from q4kd.harness.inputs.published.chat_templates import published_template
from q4kd.trainer.data.chats.renderer import ChatRenderer, RenderError
from q4kd.trainer.data.chats.template import ChatTemplate
from q4kd.trainer.data.corpus import load_corpus
from q4kd.trainer.data.documents import Document, SourceSettings, is_held_out
from q4kd.trainer.data.encoding import DocumentEncoder, Encoded
from q4kd.trainer.data.sources.account import SourceAccount
from q4kd.trainer.data.token_set import TokenSet
from q4kd.trainer.demo import student_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.student.model import load_tokenizer

Chat = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


PLAIN: Chat = [user("q1"), answer("a1"), user("q2"), answer("a2")]
THOUGHT: Chat = [user("q1"), answer("a1", reasoning_content="t1"), user("q2"), answer("a2", reasoning_content="t2")]
CALL = {"role": "assistant", "thinking": "t0", "tool_calls": [{"name": "f", "arguments": "{}"}]}
CALLED: Chat = [user("q1"), CALL, {"role": "tool", "content": "r"}, *THOUGHT[1:]]


def rendered(template: str, chat: Chat, *, whole: bool = False, **more: Any) -> list[str]:
    """Return each example with what is learnt in it between « and »."""
    renderer = ChatRenderer(template, {}, "2026-11-30")
    turns = [] if whole else [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    try:
        examples = renderer.render({"messages": chat, "turns": turns, "whole": whole, **more})["examples"]
    finally:
        renderer.close()
    found = []
    for example in examples:
        text, spans = example["text"], [(example["fresh"], len(example["text"]))] if whole else example["spans"]
        for begin, end in reversed(spans):
            text = f"{text[:begin]}«{text[begin:end]}»{text[end:]}"
        found.append(text)
    return found


def qwen(*turns: tuple[str, str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{opened}{said}<|im_end|>\n" for role, opened, said in turns)


@pytest.mark.parametrize(
    ("template", "chat", "wanted"),
    [
        (
            QWEN3,
            THOUGHT,
            [
                "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n«<think>\nt1\n</think>\n\na1<|im_end|>\n»",
                "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n"
                "<|im_start|>assistant\n«<think>\nt2\n</think>\n\na2<|im_end|>\n»",
            ],
        ),
        (
            QWEN35,
            THOUGHT[:2],
            ["<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\n«t1\n</think>\n\na1<|im_end|>\n»"],
        ),
        (
            QWEN35,
            PLAIN[:2],  # it is asked for without reasoning
            ["<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«a1<|im_end|>\n»"],
        ),
        (
            GPT_OSS,
            CALLED,
            [
                "<|start|>user<|message|>q1<|end|><|start|>assistant«<|channel|>analysis<|message|>t0<|end|>"
                "<|start|>assistant to=f<|message|>{}<|call|>»<|start|>tool<|message|>r<|end|><|start|>assistant"
                "«<|channel|>analysis<|message|>t1<|end|><|start|>assistant<|channel|>final<|message|>a1<|return|>»",
                "<|start|>user<|message|>q1<|end|><|start|>assistant to=f<|message|>{}<|call|><|start|>tool<|message|>r"
                "<|end|><|start|>assistant<|channel|>final<|message|>a1<|end|><|start|>user<|message|>q2<|end|>"
                "<|start|>assistant«<|channel|>analysis<|message|>t2<|end|><|start|>assistant<|channel|>final<|message|>"
                "a2<|return|>»",
            ],
        ),
        (
            GEMMA4,
            PLAIN,
            [
                "<|turn>user\nq1<turn|>\n<|turn>model\n<|channel>thought\n<channel|>«a1<turn|>\n»",
                "<|turn>user\nq1<turn|>\n<|turn>model\na1<turn|>\n<|turn>user\nq2<turn|>\n"
                "<|turn>model\n<|channel>thought\n<channel|>«a2<turn|>\n»",
            ],
        ),
        (
            DEEPSEEK_R1,
            [user("q1"), answer("<think>\nt > 1\n</think>\n\na1"), user("q2"), answer("<think></think>a2")],
            [
                "<|User|>q1<|Assistant|><think>\n«t > 1\n</think>\n\na1<|end|>»",
                "<|User|>q1<|Assistant|>\n\na1<|end|><|User|>q2<|Assistant|><think>\n«</think>a2<|end|>»",
            ],
        ),
        (
            GLM47,
            [*THOUGHT[:3], answer("a2")],
            [
                "[gMASK]<sop><|user|>q1<|assistant|><think>«t1</think>a1»",
                "[gMASK]<sop><|user|>q1<|assistant|></think>a1<|user|>q2<|assistant|></think>«a2»",
            ],
        ),
    ],
    ids=["qwen3", "qwen3.5", "qwen3.5 without reasoning", "gpt-oss", "gemma4", "deepseek-r1", "glm-4.7"],
)
def test_each_answer_is_learnt_after_what_the_model_will_see(template: str, chat: Chat, wanted: list[str]) -> None:
    assert rendered(template, chat) == wanted


INLINE: Chat = [user("q1"), answer("<think>\nt1\n</think>\n\na1")]
# Qwen3.8 writes an empty reasoning before an answer whose content brings its own.
QWEN38 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}"
    "\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize("chat", [THOUGHT[:2], INLINE], ids=["field", "content"])
def test_an_answer_with_reasoning_is_asked_for_with_reasoning(chat: Chat) -> None:
    wanted = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\n«t1\n</think>\n\na1<|im_end|>\n»"
    assert rendered(published_template("qwen3.5-small"), chat) == [wanted]
    with pytest.raises(RenderError, match="closes the reasoning of message 2"):
        rendered(published_template("qwen3.5-small"), chat, variables={"enable_thinking": False})


def test_reasoning_behind_an_empty_one_is_refused() -> None:
    assert rendered(QWEN38, THOUGHT[:2])[0].endswith("<think>\n«t1\n</think>\n\na1<|im_end|>\n»")
    with pytest.raises(RenderError, match=r"message 2.*give its reasoning \(reasoning_content\)"):
        rendered(QWEN38, INLINE)


def test_what_is_before_an_answer_is_what_the_template_asks_with() -> None:
    renderer = ChatRenderer(QWEN3, {}, "2026-11-30")
    (asked,) = renderer.render({"messages": THOUGHT[:3], "variables": {"add_generation_prompt": True}})["examples"]
    assert rendered(QWEN3, THOUGHT)[1].partition("«")[0] == asked["text"]
    renderer.close()


def test_a_chain_of_calls_is_one_example_as_long_as_nothing_is_rewritten() -> None:
    assert len(rendered(GPT_OSS, CALLED[:4])) == 1
    assert len(rendered(GLM47, PLAIN)) == 1


def test_everything_else_is_learnt_in_the_first_example_that_has_it() -> None:
    assert rendered(QWEN3, THOUGHT, whole=True) == [
        "«<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\nt1\n</think>\n\na1<|im_end|>\n»",
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\n"
        "«q2<|im_end|>\n<|im_start|>assistant\n<think>\nt2\n</think>\n\na2<|im_end|>\n»",
    ]
    assert rendered(QWEN3, THOUGHT[:3], whole=True)[1] == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\n«q2<|im_end|>\n»"
    )


@pytest.mark.parametrize(
    ("template", "chat", "more", "words"),
    [
        (DEEPSEEK_R1, PLAIN, {}, r"message 2.*<\|Assistant\|><think>.*give its reasoning"),
        (GEMMA4, THOUGHT, {}, "reasoning of message 2"),
        (QWEN3, THOUGHT, {"variables": {"enable_thinking": False}}, "message 2"),
        (QWEN35, PLAIN, {"variables": {"enable_thinking": True}}, "message 2"),
        ("{% for m in messages %}{{ loop.revindex }}{% endfor %}", PLAIN, {}, "message 2"),
    ],
)
def test_an_answer_that_does_not_go_on_from_its_opening_is_refused(
    template: str, chat: Chat, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(RenderError, match=words):
        rendered(template, chat, **more)


@pytest.mark.parametrize("template", [QWEN3, DEEPSEEK_R1.replace("<think>\n", "")])
def test_reasoning_that_the_answer_repeats_is_not_taken_for_it(template: str) -> None:
    (found,) = rendered(template, [user("2 + 2"), answer("<think>4</think>4")])
    assert found.partition("«")[2].count("4") == 2


def test_examples_are_bounded_together() -> None:
    long = [part for n in range(40) for part in (user("q" * 200_000), answer(str(n)))]
    with pytest.raises(RenderError, match=r"characters|memory|processor time"):
        rendered(QWEN3, long)


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(student_path())


def encoded(tokenizer: Any, template: str, chat: Chat, learns: Any = None, *, only: bool = True) -> list[Encoded]:
    tokenizer.chat_template = template
    encoder = ChatTemplate(tokenizer, completion_only=only)
    found = encoder.encode(chat, "c:1", {}, learns)
    encoder.close()
    return found


def learnt(tokenizer: Any, found: list[Encoded]) -> list[str]:
    return [str(tokenizer.decode(one.ids[one.learnt])) for one in found]


def test_weights_say_which_answers_are_learnt_and_all_are_history(tokenizer: Any) -> None:
    found = encoded(tokenizer, QWEN3, THOUGHT, (None, False, None, None))
    assert [one.part for one in found] == [(0, 2), (1, 2)]
    assert learnt(tokenizer, found) == ["", "<think>\nt2\n</think>\n\na2<|im_end|>\n"]
    found = encoded(tokenizer, QWEN3, THOUGHT, (None, False, None, None), only=False)
    assert "t1" not in learnt(tokenizer, found)[0] and "q1" in learnt(tokenizer, found)[0]
    assert learnt(tokenizer, found)[1].startswith("q2<|im_end|>")


def test_marks_of_an_earlier_answer_are_not_learnt_again(tokenizer: Any) -> None:
    marked = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last %}{{ m.reasoning_content }}:{% endif %}{{ m.content }};{% endgeneration %}"
        "{% else %}{{ m.content }};{% endif %}{% endfor %}"
    )
    assert learnt(tokenizer, encoded(tokenizer, marked, THOUGHT)) == ["t1:a1;", "t2:a2;"]
    assert learnt(tokenizer, encoded(tokenizer, marked, THOUGHT, (None, None, None, False))) == ["t1:a1;", ""]
    with pytest.raises(InputError, match="weight"):
        encoded(tokenizer, marked, THOUGHT, (False, None, None, None))


def test_the_examples_of_a_record_stay_together_and_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = QWEN3
    chats = [[user(f"q{n}"), answer("a"), user(f"r{n}"), answer("b")][: 2 if n % 3 == 0 else 4] for n in range(60)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    encoder = DocumentEncoder(lambda texts: [], 0, chat=ChatTemplate(tokenizer, completion_only=True))
    account = SourceAccount()
    corpus = load_corpus(path, encoder, SourceSettings(), account=account)
    held = [n for n in range(60) if is_held_out(f"chats.jsonl:{n + 1}")]
    assert 0 < len(held) < 60

    def questions(tokens: TokenSet) -> set[int]:
        return {int(number) for number in re.findall(r"[qr](\d+)", tokenizer.decode(tokens.ids))}

    assert (questions(corpus.held_out), questions(corpus.train)) == (set(held), set(range(60)) - set(held))
    assert corpus.train.num_documents + corpus.held_out.num_documents == 20 + 2 * 40
    counted = account.to_json()["learnt_turn_by_turn"]
    assert (counted["chats"], counted["examples"]) == (40, 80)
    one = list(encoder.encode([Document("c", messages=tuple(chats[1]))]))
    assert 0 < counted["learnt"] == 40 * sum(int(part.learnt.sum()) for part in one if part.learnt is not None)
    (line,) = account.lines()
    assert line.startswith("data: chats are learnt turn by turn") and "40 chats, 80 examples" in line
    encoder.close()
