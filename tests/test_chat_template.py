"""Chat templates: what they are told, and what is refused in one line however they fail."""

from datetime import datetime

import pytest

from fastkv_jax.chat_template import Rendering, parse_arguments, parse_date, render
from fastkv_jax.errors import FastKVConfigError, InputError, ModelWarning
from fastkv_jax.text import encode_chat
from test_text import CHATML, small_tokenizer

QUESTION = [{"role": "user", "content": "hello"}]


def test_the_date_is_the_one_given():
    tokenizer = small_tokenizer("{{ strftime_now('%d %b %Y %H:%M') }} {{ messages[0].content }}")
    assert render(tokenizer, QUESTION, Rendering(datetime(2024, 7, 26))) == "26 Jul 2024 00:00 hello"
    assert render(tokenizer, QUESTION).endswith("hello") and str(datetime.now().year) in render(tokenizer, QUESTION)


def test_the_clock_is_that_of_strftime():
    moment = datetime(2026, 2, 3, 4, 5, 6)
    form = "%A %a %d %-d %B %b %m %y %Y %H:%M:%S %I %p %j %F %T 100%"
    template = "{% if strftime_now is defined %}{% set now = strftime_now('FORM') %}{% endif %}"
    tokenizer = small_tokenizer(template.replace("FORM", form) + "{{ now }} {{ messages[0].content }}")
    assert render(tokenizer, QUESTION, Rendering(moment)) == moment.strftime(form) + " hello"


@pytest.mark.parametrize("call", ["strftime_now('FORM')", "strftime_now(format='FORM')", "strftime_now(form)"])
def test_every_code_of_strftime_is_known_however_it_is_given(call):
    moment = datetime(2026, 2, 3, 4, 5, 6)
    form = "%_d %^b %^B %0d %#d %k %l %P %h %C %g %r %s %Od %OI %Ey %10Y %e %% %%d %d%% %n|"
    template = "{{ " + call.replace("FORM", form) + " }}"
    tokenizer = small_tokenizer("\n  " + template + "\n{{ messages[0].content }}")
    rendering = Rendering(moment, {"form": form})
    plain = small_tokenizer("\n  NOW\n{{ messages[0].content }}")  # the clock leaves the template's own spaces alone
    assert render(tokenizer, QUESTION, rendering) == render(plain, QUESTION).replace("NOW", moment.strftime(form))


def test_one_question_is_rendered_at_one_moment():
    """A template that writes the time must not write two times while its tail is looked for."""
    tokenizer = small_tokenizer(CHATML + "{{ strftime_now('%f') }}")
    chat = encode_chat(tokenizer, "hello")
    head = tokenizer.decode(chat.token_ids[: -chat.window_end])
    assert head.endswith("user\nhello")


def test_arguments_reach_the_template():
    tokenizer = small_tokenizer(
        "{{ messages[0].content }}{% if enable_thinking is defined %} {{ enable_thinking }}{% endif %}"
    )
    rendering = Rendering(arguments={"enable_thinking": False})
    rendering.check(tokenizer)
    assert render(tokenizer, QUESTION, rendering) == "hello False" and render(tokenizer, QUESTION) == "hello"


@pytest.mark.parametrize("name", ["tokenize", "messages", "conversation", "add_generation_prompt", "strftime_now"])
def test_arguments_that_are_ours_are_refused(name):
    with pytest.raises(FastKVConfigError, match=f"'{name}' is set by fastkv_jax"):
        Rendering(arguments={name: 1}).check(small_tokenizer())


def test_an_argument_that_is_never_read_is_said():
    with pytest.warns(ModelWarning, match="never reads 'enable_thinkin'"):
        Rendering(arguments={"enable_thinkin": False}).check(small_tokenizer())


@pytest.mark.parametrize("given", ["", "x", "[1]", "3", "null", '{"a": NaN}', '{"a": 1'])
def test_arguments_that_are_no_object(given):
    with pytest.raises(FastKVConfigError, match="must be"):
        parse_arguments(given)


def test_dates():
    assert parse_date("2026-11-27") == datetime(2026, 11, 27)
    assert parse_date("2026-11-27T18:30") == datetime(2026, 11, 27, 18, 30)
    for given in ("tomorrow", "2026-13-01", ""):
        with pytest.raises(FastKVConfigError, match="YYYY-MM-DD"):
            parse_date(given)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{{ messages[9]['content'] }}",
        "{{ {}['key'].x }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' + 1 }}",
        "{% include 'x' %}",
        "{{ strftime_now(3) }}",
        "{{ raise_exception('') }}",
        "{{ nothing() }}",
        "{{ '\\ud800' }}",
    ],
)
def test_every_failure_of_a_template_is_one_line(template):
    with pytest.raises(InputError, match="the model's chat template (failed|writes half)") as error:
        render(small_tokenizer(template), QUESTION)
    assert "\n" not in str(error.value)


def test_a_system_message_that_would_be_dropped_is_refused():
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    assert encode_chat(small_tokenizer(template), "hello").token_ids
    with pytest.raises(InputError, match="leaves the system message out"):
        encode_chat(small_tokenizer(template), "hello", "be brief")


def test_a_system_message_counts_as_left_out_whatever_else_the_template_says():
    template = "You are brief.{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="leaves the system message out"):
        encode_chat(small_tokenizer(template), "hello", "You are")
    template = "{% for m in messages %}{{ m.content | upper if m.role == 'system' else m.content }}{% endfor %}"
    assert encode_chat(small_tokenizer(template), "hello", "be brief").token_ids


def test_words_that_a_template_changes_are_said():
    with pytest.warns(ModelWarning, match="changes the words"):
        encode_chat(small_tokenizer("{{ messages[0].content | upper }}"), "hello")
