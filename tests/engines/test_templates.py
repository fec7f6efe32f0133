"""Holds the rendering of chat templates to what transformers and llama.cpp's server do, and to its bounds."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.errors import BadRequest, Unsupported
from tests.support.inside import need_llama_cpp
from tests.support.llama_server import LlamaServer
from tests.support.tiny_gguf import CHAT_TEMPLATE

pytestmark = pytest.mark.inprocess

QWEN = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}
{%- endfor %}{{- '\\n</tools>\\nWithin <tool_call></tool_call> tags.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') if '</think>' in message.content else message.content %}
    {{- '<|im_start|>assistant\\n' + content }}
    {%- for call in message.tool_calls or [] %}
      {%- set call = call.function %}
      {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}{{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
    {%- endfor %}{{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
  {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ m.content }} [/INST]{% endfor %}"
)
PARTS = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}\n{% endfor %}"

CALL = {"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"city": "Köln", "b": [1, 2.5]}'}}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.fixture
def template() -> Any:
    need_llama_cpp()  # jinja2 comes with it
    from llamacpp_mqtt_deploy.engines.inprocess.templates import ChatTemplate

    return lambda source: ChatTemplate(source, bos="<s>", eos="</s>")


def test_calls_and_results_of_a_history_are_rendered(template: Any) -> None:
    messages = [
        user("weather für <b>?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"city": "Köln"}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "warm"},
    ]
    text = template(QWEN).render(
        messages, tools=[{"type": "function", "function": {"name": "w", "description": "<&>"}}]
    )
    assert '{"name": "w", "arguments": {"city": "Köln"}}' in text
    assert '"description": "<&>"' in text  # not escaped as for HTML
    assert text.endswith("<tool_response>\nwarm\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("thinking,end", [(None, "assistant\n"), (True, "assistant\n"), (False, "</think>\n\n")])
def test_thinking_is_switched_where_the_template_can(template: Any, thinking: bool | None, end: str) -> None:
    made = template(QWEN)
    assert made.render([user("x")], thinking=thinking).endswith(end)
    assert made.thinking_tags == ("<think>", "</think>")
    assert made.tool_style == "hermes"


def test_a_refusal_of_the_template_is_the_clients_error(template: Any) -> None:
    with pytest.raises(BadRequest, match="roles must alternate"):
        template(STRICT).render([user("a"), user("b")])


def test_a_last_message_of_the_assistant_is_continued(template: Any) -> None:
    text = template(None).render([user("a"), {"role": "assistant", "content": "Once upon"}])
    assert text.endswith("<|im_start|>assistant\nOnce upon")


def test_a_model_without_a_template_gets_chatml(template: Any) -> None:
    assert template(None).render([user("a")]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_text_parts_are_joined_or_kept_as_the_template_wants(template: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb<" in template(None).render([user(parts)])
    assert template(PARTS).render([user("hello")]) == "user:hello"
    with pytest.raises(Unsupported):
        template(None).render([user([{"type": "image_url", "image_url": {"url": "data:"}}])])


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% generation %}a{% endgeneration %}",
        "a{{ strftime_now('%Y') if false }}",
        "{{ {'a': 1} | tojson(indent=2) | length and 'a' }}",
    ],
)
def test_what_templates_use_beyond_plain_jinja_is_there(template: Any, source: str) -> None:
    assert template(source).render([user("a"), user("b")]) == "a"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 9 ** 99999999 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ nothing.of.this }}",
    ],
)
def test_a_wild_template_ends_in_a_refusal_and_in_time(
    template: Any, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.engines.inprocess.templates.MAX_SECONDS", 0.2)
    made = template(source)
    started = time.monotonic()
    with pytest.raises(BadRequest):
        made.render([user("x" * 1000)])
    assert time.monotonic() - started < 2


@pytest.mark.engine
def test_the_server_renders_the_same(template: Any, llama_server: LlamaServer) -> None:
    made = template(CHAT_TEMPLATE)
    tools = [{"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {}}}}]
    chats: list[list[dict[str, Any]]] = [
        [user("a\n\n b  <|x|> für 水")],
        [{"role": "system", "content": "be"}, user("a"), {"role": "assistant", "content": "b"}, user("c")],
        [user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])],
        [user("a"), {"role": "assistant", "content": "begun"}],
        [
            user("a"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "warm"},
        ],
    ]
    for messages in chats:
        for given in (None, tools):
            body = {"messages": messages, **({"tools": given} if given else {})}
            request = urllib.request.Request(
                f"{llama_server.url}/apply-template", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=10) as response:
                expected = json.loads(response.read())["prompt"]
            ours = made.render(messages, tools=given, thinking=False)
            assert ours == expected
