"""Lines on which tokenizers differ: code, scripts, emoji, marks, digits, runs of spaces, text that looks special."""

# ruff: noqa: RUF001 - letters that look like others are what is drawn here

import random

_WORDS = (
    *(
        "def",
        "return",
        "self.value",
        "camelCaseName",
        "HTTPServer",
        "snake_case_1",
        "O'Brien's",
        "I'LL",
        "we've",
        "DON'T",
    ),
    *("naïve", "façade", "Straße", "İstanbul", "ΑΘΗΝΑ", "Привет", "мир", "ПРИВЕТ", "שלום", "مرحبا", "नमस्ते", "বাংলা"),
    *(
        "ภาษาไทย",
        "中文字符",
        "日本語テスト",
        "ひらがな",
        "カタカナ",
        "한국어",
        "ﬁn",
        "ǅ",
        "ʰ",
        "𝒳",
        "Ⅷ",
        "½",
        "٣٤٥",
        "๑๒๓",
    ),
)
_PIECES = (
    *("e\u0301", "a\u0308\u0301", "q\u0307\u0323", "\u0301", "ʼ", "\u200d", "\ufe0f", "\u00a0", "\u3000", "\u2028"),
    *(
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "👍🏽",
        "☃️",
        "…",
        "—",
        "«»",
        "“q”",
        "€5",
        "№7",
        "°",
        "→",
        "∑",
        "▁",
        "Ġ",
        "Ċ",
        "\ufffd",
    ),
    *("<s>", "</s>", "<|im_start|>", "<|end|>", "<0x0A>", "[INST]", "<unk>", "<|endoftext|>x", "{{ x }}", "<think>"),
    *("==", "!==", "->", "::", "//", "/*", "*/", "\\n", "$x", "#!", "&&", "||", "()", "[]", "{};", "'", '"', "`", "''"),
    *("0", "12", "345", "6789", "1234567", "3.14159", "1e-9", "0xFF", "1,000,000", "2026-11-30", "a1b2", "9" * 20),
)
_SPACES = (" ", " ", " ", " ", "", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n ", "        ", "\t\t", " \t", "\n    ")


def hard_lines(count: int, seed: int) -> list[str]:
    """Return ``count`` texts of up to nine pieces each, drawn with a seed."""
    drawn = random.Random(seed)  # noqa: S311 - nothing secret
    lines = []
    for _ in range(count):
        parts = []
        for _ in range(drawn.randint(1, 9)):
            kind = drawn.random()
            if kind < 0.45:
                parts.append(drawn.choice(_WORDS))
            elif kind < 0.85:
                parts.append(drawn.choice(_PIECES))
            else:  # any character of the planes that texts use, but surrogates and what no text has
                code = drawn.choice(
                    (drawn.randint(33, 0x24F), drawn.randint(0x250, 0xD7FF), drawn.randint(0x1F300, 0x1FAFF))
                )
                parts.append(chr(code))
            parts.append(drawn.choice(_SPACES))
        lines.append("".join(parts))
    return lines
