"""Chat templates of reasoning models, cut down to how they write earlier turns; the published ones are elsewhere.

What an answer looks like when it is asked for, and when more follows it, is as in the templates of the models named;
their system texts and formats of tools are left out. ``harness/inputs/published/templates`` has them whole.
"""

_LAST_USER = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
_TOOLS = "{%- if tools -%}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{%- endif -%}"

# Qwen3: the reasoning is written of what follows the last question, and of the last message in any case.
QWEN3 = (
    f"{_TOOLS}{_LAST_USER}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- set content = m.content -%}{%- set thought = '' -%}"
    "{%- if m.reasoning_content is defined -%}{%- set thought = m.reasoning_content -%}"
    "{%- elif '</think>' in content -%}{%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) -%}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content -}}"
    "{%- else -%}{{- '<|im_start|>assistant\n' + content -}}{%- endif -%}{{- '<|im_end|>\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}"
)
# Qwen3.5: an answer is opened with its reasoning, or with an empty one, and written with it only where it has some.
QWEN35 = (
    f"{_TOOLS}{_LAST_USER}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last -%}"
    "{{- '<|im_start|>assistant\n<think>\n' + m.reasoning_content|trim + '\n</think>\n\n' + m.content + '<|im_end|>\n'"
    " -}}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}"
    "{%- else -%}{{- '<think>\n' -}}{%- endif -%}{%- endif -%}"
)
# gpt-oss: the last answer ends in another token, and takes the reasoning out of the calls before it.
GPT_OSS = (
    "{%- for m in messages -%}{%- if m.role != 'assistant' -%}"
    "{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}"
    "{%- elif m.tool_calls is defined -%}{%- set ns = namespace(answered=false) -%}"
    "{%- for later in messages[loop.index:] -%}{%- if later.role == 'assistant' and later.tool_calls is not defined -%}"
    "{%- set ns.answered = true -%}{%- endif -%}{%- endfor -%}"
    "{%- if m.thinking and not ns.answered -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}{%- endif -%}"
    "{{- '<|start|>assistant to=' + m.tool_calls[0].name + '<|message|>' + m.tool_calls[0].arguments + '<|call|>' -}}"
    "{%- elif loop.last and not add_generation_prompt -%}"
    "{%- if m.thinking is defined -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}{%- endif -%}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' -}}"
    "{%- else -%}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
)
# Gemma 4: reasoning is never written; where none is asked for, an answer is opened with an empty one.
GEMMA4 = (
    "{%- macro said(text) -%}{{- text.split('<channel|>')[-1] | trim -}}{%- endmacro -%}"
    "{%- for m in messages -%}{%- set role = 'model' if m.role == 'assistant' else m.role -%}"
    "{{- '<|turn>' + role + '\n' -}}{%- if role == 'model' -%}{{- said(m.content) -}}{%- else -%}"
    "{{- m.content | trim -}}{%- endif -%}{{- '<turn|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|turn>model\n' -}}"
    "{%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\n<channel|>' -}}{%- endif -%}{%- endif -%}"
)
# DeepSeek-R1: reasoning is never written, and every answer is opened with it.
DEEPSEEK_R1 = (
    "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- set content = m.content -%}{%- if '</think>' in content -%}"
    "{%- set content = content.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<|Assistant|>' + content + '<|end|>' -}}"
    "{%- else -%}{{- '<|User|>' + m.content -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}"
)
# GLM-4.7: an earlier answer begins with the end of a reasoning that it does not have.
GLM47 = (
    "[gMASK]<sop>"
    f"{_LAST_USER}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- if loop.index0 > ns.last and m.reasoning_content -%}{{- '<think>' + m.reasoning_content + '</think>' -}}"
    "{%- else -%}{{- '</think>' -}}{%- endif -%}{{- m.content -}}"
    "{%- else -%}{{- '<|' + m.role + '|>' + m.content -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' + ('</think>' if enable_thinking is defined and not"
    " enable_thinking else '<think>') -}}{%- endif -%}"
)
