"""What ends an answer, from files that agree, contradict each other, or say nothing."""

import dataclasses
import json
import warnings

import pytest
from etils import epath

from fastkv_jax.checkpoint import declared_end_tokens, inspect, load_model, resolve
from fastkv_jax.checkpoint.tokenizers.end_tokens import Vocabulary, end_tokens, vocabulary_of_folder
from fastkv_jax.checkpoint.tokenizers.turn_ends import turn_ends
from fastkv_jax.cli import convert
from fastkv_jax.errors import ModelWarning

SPECIAL = {"<end>": 5, "<end>2": 6, "<turn>": 7, "</s>": 8}
CHATML = "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}<end>\n{% endfor %}"


def test_files_that_agree_say_nothing():
    vocabulary = Vocabulary(SPECIAL, {"eos_token": "<end>"}, CHATML)
    assert end_tokens([("a", (5, 8)), ("b", (5,))], vocabulary, 10, "m") == (5, 8)
    assert end_tokens([("a", ()), ("b", (5,))], vocabulary, 10, "m") == (5, 8)  # the end of a text is no contradiction
    assert end_tokens([], Vocabulary(), 10, "m") == ()


@pytest.mark.parametrize(
    ("declared", "names", "template", "ends"),
    [
        ((8,), {"eos_token": "<end>"}, None, (8, 5)),
        ((8,), {}, CHATML, (8, 5)),
        ((8,), {"eos_token": "</s>"}, CHATML.replace("<end>", "{{ eos_token }}"), (8,)),
        ((), {"eos_token": "</s>"}, CHATML, (8, 5)),
        ((5,), {"unk_token": "</s>"}, None, (5,)),  # said to be something else
        ((5,), {}, None, (5, 8)),
    ],
)
@pytest.mark.filterwarnings("ignore::fastkv_jax.errors.ModelWarning")
def test_each_claim_ends_an_answer(declared, names, template, ends):
    assert end_tokens([("a", declared)], Vocabulary(SPECIAL, names, template), 10, "m") == ends


def test_a_contradiction_is_one_line_with_every_claim():
    with pytest.warns(ModelWarning, match=r"m: .*config.json </s> \(8\); its tokenizer <end> \(5\); its chat template"):
        end_tokens([("config.json", (8,))], Vocabulary(SPECIAL, {"eos_token": "<end>"}, CHATML), 10, "m")


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content.parts }}<turn>{% endfor %}", CHATML])
def test_the_text_of_a_token_tells_the_end_of_a_turn_that_nothing_else_tells(template):
    vocabulary = Vocabulary(SPECIAL | {"<|im_end|>": 3}, {}, template)
    with pytest.warns(ModelWarning, match="chat template <end>" if template == CHATML else r"texts of .*<\|im_end\|>"):
        assert 3 in end_tokens([("config.json", (8,))], vocabulary, 10, "m")


@pytest.mark.parametrize("impossible", [10, -1])
def test_an_id_that_the_model_cannot_say_is_left_out_and_said(impossible):
    with pytest.warns(ModelWarning, match=f"end token {impossible} is outside the 10 tokens"):
        assert end_tokens([("a", (impossible, 3))], Vocabulary(), 10, "m") == (3,)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, (5,)),
        (CHATML.replace("<end>", " <end>2"), (6,)),  # the longest that fits
        ("{% for m in messages %}{{ m.content }}{% if not loop.last %}<end>{% endif %}{% endfor %}", (5,)),
        ("{% for m in messages %}<turn>{{ m.content }}{% endfor %}", (7,)),  # the next turn's beginning
        ("{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}", (8,)),
        ("{% for m in messages %}{{ m.content | trim }}\n{% endfor %}", ()),
        ("{{ raise_exception('no assistants') }}", ()),
        ("{{ messages[7].content.x.y }}", ()),
        ("{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}", ()),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", ()),
        ("{% if %}", ()),
        (CHATML + "{% if tools is not none %}{{ tools | first }}{% endif %}", (5,)),  # a variable of transformers
        ("{{ messages[0] | tojson(ensure_ascii=False, indent=2) }}" + CHATML, (5,)),
        ("{{ strftime_now(format='%d') }}" + CHATML, (5,)),
        (CHATML.replace("m.content", "m.content | upper"), (5,)),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('rules first') }}{% endif %}" + CHATML, (5,)),
        ("{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}" + CHATML, (5,)),  # one question alone
        ("{{ strftime_now('%d') }}{{ messages[1].content }}<end>", (5,)),
    ],
)
def test_what_a_template_puts_behind_an_answer(template, ends):
    assert turn_ends(template, {"eos_token": "</s>"}, SPECIAL) == ends


def test_a_folder(tmp_path, tiny):
    """The tokenizer's files and the template count, wherever they are; what other programs go by can be asked for."""
    folder = tiny.write_hugging_face(tmp_path / "m", tiny.model())
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<end>"}, "added_tokens_decoder": {"5": {"content": "<end>"},
                                                                                "7": {"content": "<stop>"}}})
    )  # fmt: skip
    (folder / "chat_template.jinja").write_text(CHATML.replace("<end>", "<stop>"))
    with pytest.warns(ModelWarning, match="different end tokens"):
        assert inspect(folder).stop_tokens == (9, 2, 5, 7)
    with pytest.warns(ModelWarning):
        assert load_model(folder, "float32").config.stop_tokens == (9, 2, 5, 7)
    assert declared_end_tokens(folder) == (9,)
    with warnings.catch_warnings(action="ignore"):
        assert convert.main([str(folder), str(tmp_path / "ours"), "--quiet"]) == 0
    with pytest.warns(ModelWarning):
        ours = inspect(tmp_path / "ours")
    assert set(ours.stop_tokens) == {9, 2, 5, 7} and declared_end_tokens(tmp_path / "ours") == (9,)


def test_a_tokenizer_brought_along_brings_its_end(tmp_path, tiny):
    folder = tiny.write_hugging_face(tmp_path / "m", tiny.model())
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 11, "content": "<bye>"}]}))
    (other / "tokenizer_config.json").write_text('{"eos_token": "<bye>"}')
    assert inspect(folder).stop_tokens == (2,)
    with pytest.warns(ModelWarning, match=r"<bye> \(11\)"):
        assert inspect(resolve(folder, tokenizer=other)).stop_tokens == (2, 11)


@pytest.mark.parametrize("damage", ["{", "[]", '{"added_tokens_decoder": {"x": 1}, "chat_template": 3}'])
def test_damaged_tokenizer_files_say_nothing_here(tmp_path, damage):
    (tmp_path / "tokenizer_config.json").write_text(damage)
    (tmp_path / "tokenizer.json").write_text(damage)
    assert dataclasses.astuple(vocabulary_of_folder(epath.Path(tmp_path)))[0] == {}


@pytest.mark.parametrize(
    ("named", "chosen"), [({"tool_use": "a", "default": "b"}, "b"), ({"chat": "a"}, "a"), ({"x": "a", "y": "b"}, None)]
)
def test_templates_by_name(tmp_path, named, chosen):
    listed = [{"name": name, "template": template} for name, template in named.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert vocabulary_of_folder(epath.Path(tmp_path)).template == chosen


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": "<|im_start|>"}}},
         "tokenizer.json": {"added_tokens": [{"id": 2, "content": "<|im_end|>"}]}},
        {"tokenizer.json": {"added_tokens": [], "model": {"vocab": {"a": 0, "<|im_end|>": 2}}}},
        {"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0], ["<|im_end|>", -2.0]]}}},
        {"vocab.json": {"a": 0, "<|im_end|>": 2}},
        {"added_tokens.json": {"<|im_end|>": 2}},
        {"tokenizer_config.json": {"extra_special_tokens": {"turn": "<|im_end|>"}}, "vocab.json": {"<|im_end|>": 2}},
        {"special_tokens_map.json": {"eos_token": {"content": "bye"}}, "vocab.json": {"bye": 2, "a": 0}},
    ],
)  # fmt: skip
def test_special_tokens_are_found_wherever_files_list_them(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = vocabulary_of_folder(epath.Path(tmp_path))
    assert 2 in found.special.values() and "a" not in found.special
    assert 2 in end_tokens([], found, 3, "m")
