"""A chat template with the features of the published one, written for these tests, and checkpoints that hold one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dgemma.text.tokens import Tokenizer
from tiny import VOCAB, tiny_checkpoint

TEMPLATE = """\
{%- macro quoted(text) -%}<|"|>{{ text }}<|"|>{%- endmacro -%}
{%- macro value(x) -%}
{%- if x is none -%}null
{%- elif x is boolean -%}{{ 'true' if x else 'false' }}
{%- elif x is string -%}{{ quoted(x) }}
{%- elif x is mapping -%}{ {{- pairs(x) -}} }
{%- elif x is iterable -%}[{% for one in x %}{{ value(one) }}{{ ',' if not loop.last }}{% endfor %}]
{%- else -%}{{ x }}{%- endif -%}
{%- endmacro -%}
{%- macro pairs(x) -%}
{%- for key, one in x | dictsort -%}{{ key }}:{{ value(one) }}{{ ',' if not loop.last }}{%- endfor -%}
{%- endmacro -%}
{%- macro answer(text) -%}
{%- set seen = namespace(text='') -%}
{%- for part in text.split('<channel|>') -%}
{%- set seen.text = seen.text + (part.split('<|channel>') | first) -%}
{%- endfor -%}
{{ seen.text | trim }}
{%- endmacro -%}
{%- macro said(message) -%}
{%- if message.content is string -%}
{{ answer(message.content) if message.role == 'assistant' else message.content | trim }}
{%- else -%}
{%- for part in message.content -%}{{ part.text | trim if part.type == 'text' else '<|image|>' }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set system = messages[0].role == 'system' -%}
{%- if system or enable_thinking -%}
{{ '<|turn>system\\n' }}{{ '<|think|>\\n' if enable_thinking }}{{ messages[0].content | trim if system }}
{{- '<turn|>\\n' }}
{%- endif -%}
{%- set state = namespace(last='', names={}) -%}
{%- for message in messages[1 if system else 0:] -%}
{%- if message.role == 'tool' -%}
<|tool_response>response:{{ message.name }}{value:{{ quoted(said(message)) }}}<tool_response|>
{%- elif message.role in ('user', 'assistant', 'system') -%}
{%- if state.last != 'tool' -%}{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- endif -%}
{%- if message.reasoning -%}{{ '<|channel>thought\\n' ~ message.reasoning ~ '\\n<channel|>' }}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
<|tool_call>call:{{ call.function.name }}{ {{- pairs(call.function.arguments) -}} }<tool_call|>
{%- endfor -%}
{%- if message.content is defined -%}{{ said(message) }}{%- endif -%}
{%- if not message.tool_calls -%}{{ '<turn|>\\n' }}{%- endif -%}
{%- else -%}{{ raise_exception('no role ' + message.role) }}
{%- endif -%}
{%- set state.last = message.role -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if state.last != 'tool' -%}{{ '<|turn>model\\n' }}
{%- elif enable_thinking -%}{{ '<|channel>thought\\n' }}{%- endif -%}
{%- endif -%}
"""


def with_template(parent: Path, template: str | None = TEMPLATE, *, name: str = "one", **settings: Any) -> Path:
    """Write what a tokenizer needs of a checkpoint; `settings` are keys of tokenizer_config.json."""
    source = tiny_checkpoint(parent, name="whole") if not (parent / "whole").exists() else parent / "whole"
    folder = parent / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(source / "tokenizer.json", folder)
    data = json.loads((source / "tokenizer_config.json").read_text()) | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(data))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def opened(folder: Path) -> Tokenizer:
    return Tokenizer(folder, vocab_size=VOCAB, bos_token_id=2)


def laid_out(tokenizer: Tokenizer, *messages: Any, **options: Any) -> str:
    """What the model reads, with its control tokens spelled out."""
    return tokenizer.decode(tokenizer.render(messages, **options), special=True)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}
