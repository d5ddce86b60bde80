"""Chat templates: the language that publishers use, and what a hostile one cannot do."""

from __future__ import annotations

import re

import pytest
from llmc.ir.errors import InputError
from llmc.runtime.chat_template import ChatTemplate

CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "1 < 2 & 'quoted'"},
]


def render(source: str, messages: object = CHAT, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **variables)  # pyright: ignore[reportArgumentType]


def test_chatml():
    source = (
        "{% for message in messages %}\n"
        "    {% if loop.first and message['role'] != 'system' %}no system{% endif %}\n"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n\n<|im_start|>user\n1 < 2 & 'quoted'<|im_end|>\n\n"
    assert render(source) == expected + "<|im_start|>assistant\n"
    assert render(source, add_generation_prompt=False) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages|length }}{{ eos_token }}", "<s>2</s>"),
        ("{{ {'a': '<b>&\\'é', 'c': [1, none]}|tojson }}", '{"a": "<b>&\'é", "c": [1, null]}'),
        ("{{ [1]|tojson(indent=2) }}", "[\n  1\n]"),
        (
            "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
            "system",
        ),
        ("{% generation %}x{% endgeneration %}y", "xy"),
        (
            "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}",
            "2",
        ),
        ("{%- for m in messages if m.role == 'user' -%} {{ m.content[:5] }} {%- endfor -%}", "1 < 2"),
        ("{{ messages[1]['content'].split('&')[0].strip() ~ '!' }}", "1 < 2!"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}{{ f('a') }}", "[1][a]"),
        ("{{ messages|map(attribute='role')|join(', ') }}", "system, user"),
        ("{{ 'x' * 3 }}{{ 7 % 4 }}{{ '{:>3}'.format(1) }}{{ 'ab'.replace('b', 'c') }}", "xxx3  1ac"),
        ("{% if tools %}tools{% else %}none{% endif %}{{ missing }}", "none"),
        ("{{ messages[::-1][0].role }}{{ messages|selectattr('role', 'eq', 'user')|list|length }}", "user1"),
        (
            "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
            "role=system;content= Be brief. ;",
        ),
        ("{% for m in messages %}{{ loop.length }}{{ loop.last }}{% endfor %}", "2False2True"),
    ],
)
def test_what_templates_use(source: str, expected: str):
    assert render(source) == expected


def test_variables_tools_and_the_date():
    assert (
        render("{{ tools[0].name }}{{ enable_thinking }}", tools=[{"name": "f"}], enable_thinking=False)
        == "fFalse"
    )
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))


def test_a_refusal_of_the_template_comes_with_its_words_and_line():
    with pytest.raises(InputError, match=r"chat template, line 2: System role not supported") as caught:
        render(
            "{% if messages[0].role == 'system' %}\n"
            "{{ raise_exception('System role not supported') }}{% endif %}"
        )
    assert caught.value.exit_code == 2


def test_a_syntax_error_names_its_line():
    with pytest.raises(InputError, match=r"chat template, line 3: "):
        ChatTemplate("a\nb\n{% if %}")


@pytest.mark.parametrize(
    "messages",
    [[], "hi", {"role": "user"}, [{}], ["hi"], [{"role": 1}], [{"role": "user", "content": 5}], None],
)
def test_messages_that_are_none(messages: object):
    with pytest.raises(InputError, match="messages"):
        render("x", messages)


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ ''['__class__'] }}",
    "{{ (messages|map(attribute='__class__')|list)[0] }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ [1]|tojson(cls=messages[0].__class__) }}",
]
DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = CHANGE %}{% endfor %}"
SQUARING = "{% set ns = namespace(x='a' * 9999) %}{% for i in range(9) %}{% set ns.x = CHANGE %}{% endfor %}"
HOGS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999)|list %}{% for i in r %}{{ r|sort|first }}{% endfor %}",
    "{% set r = range(99999)|list %}{% for i in r %}{% set x = r|map('string')|list %}{% endfor %}",
    "{{ 'a' * 100000000000 }}",
    "{{ 100000000000 * 'a' }}",
    "{{ (range(99999)|list) * 1000000 }}",
    DOUBLING.replace("CHANGE", "ns.x ~ ns.x"),
    DOUBLING.replace("CHANGE", "ns.x + ns.x"),
    DOUBLING.replace("CHANGE", "ns.x|replace('a', 'aa')"),
    DOUBLING.replace("CHANGE", "ns.x.replace('a', 'aa')"),
    SQUARING.replace("CHANGE", "ns.x.join(ns.x)"),
    SQUARING.replace("CHANGE", "ns.x|join(ns.x)"),
    "{{ 'a'|center(1000000000) }}",
    "{{ 'a'|indent(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.ljust(width=1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 1000000000) }}",
    "{{ 2 ** 1000000000 }}",
    "{{ [1]|tojson(indent=1000000000) }}",
    "{{ lipsum(n=100000) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '{:>1000000000}'|format(1) }}",
]


@pytest.mark.parametrize("source", ATTACKS + HOGS)
def test_attacks_are_refused(source: str):
    with pytest.raises(InputError):
        render(source)


@pytest.mark.parametrize(
    "source", ["{{" * 100_000, "{% for i in x %}" * 60 + "{% endfor %}" * 60, "x" * (2 << 20)]
)
def test_templates_too_large_or_deep_for_the_compiler(source: str):
    with pytest.raises(InputError):
        ChatTemplate(source)


def test_a_long_conversation_stays_within_the_limits():
    messages = [{"role": "user", "content": "word " * 4000}] * 200
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim + '\\n' }}{% endfor %}"
    assert len(render(source, messages)) > 4_000_000
