"""The form of a conversation as a Jinja2 template, for programs that know it by that: transformers, vLLM, llama.cpp.

What nanochat.chat_format says in Python, said again: `apply_chat_template` of a tokenizer that was loaded from a
tokenizer directory gives the ids of `render_conversation`, and its {% generation %} marks the same mask. There is one
difference, which lies in those programs: they find special tokens inside text, where nanochat leaves them text. And
what a conversation may not be (a system message in the middle, two questions in a row) is an error here too.
"""

import json

CHAT_TEMPLATE = """\
{%- set system = namespace(text=none) -%}
{%- set turns = messages -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set system.text = messages[0].content -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in turns -%}
  {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('user and assistant take turns, after at most one system message') -}}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {{- '<|user_start|>' -}}
    {%- if loop.first and system.text is not none -%}{{- system.text + '\\n\\n' -}}{%- endif -%}
    {{- message.content + '<|user_end|>' -}}
  {%- else -%}
    {{- '<|assistant_start|>' -}}
    {%- if message.content is string -%}
      {%- generation -%}{{- message.content + '<|assistant_end|>' -}}{%- endgeneration -%}
    {%- else -%}
      {%- for part in message.content -%}
        {%- if part.type == 'text' -%}
          {%- generation -%}{{- part.text -}}{%- endgeneration -%}
        {%- elif part.type == 'python' -%}
          {%- generation -%}{{- '<|python_start|>' + part.text + '<|python_end|>' -}}{%- endgeneration -%}
        {%- elif part.type == 'python_output' -%}
          {{- '<|output_start|>' + part.text + '<|output_end|>' -}}
        {%- else -%}
          {{- raise_exception('unknown type of part: ' + part.type) -}}
        {%- endif -%}
      {%- endfor -%}
      {%- generation -%}{{- '<|assistant_end|>' -}}{%- endgeneration -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


def tokenizer_config(special_tokens: list[str]) -> str:
    """The text of tokenizer_config.json, by which transformers loads tokenizer.json as a fast tokenizer."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "additional_special_tokens": special_tokens,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return json.dumps(config, indent=2) + "\n"
