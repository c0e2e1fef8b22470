"""Tokenizers against recorded ids, chat prompts, and the two streams."""

import json
import re
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastkv_jax import text
from fastkv_jax.checkpoint import inspect
from fastkv_jax.checkpoint.gguf.file import open_gguf
from fastkv_jax.decoding import answers
from fastkv_jax.errors import CheckpointError, FastKVConfigError, InputError, ModelWarning

GOLDEN = json.loads((Path(__file__).parent / "golden" / "real" / "tokenizer.json").read_text())
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return text.load_tokenizer(smollm2_path)


def small_tokenizer(template=CHATML, **names):
    """One token per byte, and ChatML's markers."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def test_recorded_ids(smollm2):
    for case in GOLDEN["encode"]:
        assert smollm2(case["text"], add_special_tokens=False)["input_ids"] == case["ids"], case["text"]
        assert text.encode_raw(smollm2, case["text"]).token_ids == case["ids"]


def test_recorded_chats(smollm2):
    assert text.has_chat_template(smollm2)
    for case in GOLDEN["chat"]:
        rendered = smollm2.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
        assert rendered == case["text"]


def test_nothing_is_printed(smollm2_path, tmp_path):
    import subprocess
    import sys

    (tmp_path / "config.json").write_text("{}")
    code = f"""
import fastkv_jax.text as t
k = t.load_tokenizer({str(smollm2_path)!r})
k.save_pretrained({str(tmp_path)!r})
t.encode_raw(t.load_tokenizer({str(tmp_path)!r}), 'word ' * 20000)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_vocabulary(smollm2, smollm2_path):
    import dataclasses

    config = inspect(smollm2_path)
    text.check_vocabulary(smollm2, config)
    with pytest.raises(CheckpointError, match="49152 ids.*only 49000 rows"):
        text.check_vocabulary(smollm2, dataclasses.replace(config, vocab_size=49000))


@pytest.mark.parametrize(
    "prompt", ["What is 2+2?", "assistant", "question", " spaced \n", "\n.", "user", "<|im_end|>", "é😀"]
)
@pytest.mark.parametrize("system", [None, "Be brief, question or not."])
@pytest.mark.parametrize("prefill", [None, "The answer is"])
def test_window_end(smollm2, prompt, system, prefill):
    chat = text.encode_chat(smollm2, prompt, system, prefill)
    assert smollm2.decode(chat.token_ids[-chat.window_end :]) == TAIL + (prefill or "")
    head = smollm2.decode(chat.token_ids[: -chat.window_end])
    assert head.endswith("<|im_start|>user\n" + prompt) and (system is None or system in head)


def test_window_end_when_the_template_strips():
    tokenizer = small_tokenizer(CHATML.replace("m['content']", "m['content'].strip()"))
    chat = text.encode_chat(tokenizer, "  hello  ")
    assert tokenizer.decode(chat.token_ids[-chat.window_end :]) == TAIL
    assert tokenizer.decode(chat.token_ids[: -chat.window_end]).endswith("user\nhello")


def test_window_end_when_the_tail_depends_on_the_question():
    changed = "'<|im_end|>' + ('!' if 'hard' in m['content'] else '?') + '\n'"
    tokenizer = small_tokenizer(CHATML.replace("'<|im_end|>' + '\n'", changed))
    chat = text.encode_chat(tokenizer, "a hard one")
    assert tokenizer.decode(chat.token_ids[-chat.window_end :]) == "<|im_end|>!\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ 'a' * 10**7 }}", "adds"),
        ("{{ range(10**9) | list }}", "failed"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "failed"),
        ("{% if %}", "failed"),
    ],
)
def test_bad_templates(template, words):
    with pytest.raises(InputError, match=words):
        text.encode_chat(small_tokenizer(template), "hello", "system")


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_empty_prompt(prompt):
    with pytest.raises(InputError, match="prompt is empty"):
        text.encode_chat(small_tokenizer(), prompt)


def write_tokenizer_gguf(path, model, tokens, kinds, change=lambda writer: None, scores=None, merges=None, pre="gpt-2"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
        writer.add_tokenizer_pre(pre)
    change(writer)
    writer.add_tensor("x", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(path, change=lambda writer: None, pre="gpt-2", merges=("a b", "ab c", "1 2"), extra=()):
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc", "12", "<s>", "</s>", *extra]
    return write_tokenizer_gguf(path, "gpt2", tokens, [1] * 259 + [3, 3] + [4] * len(extra), change, None, merges, pre)


def names_and_bos(writer):
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(260)


def test_bos_rules(tmp_path):
    def asked(writer):
        names_and_bos(writer)
        writer.add_add_bos_token(True)

    with_bos = text.load_tokenizer(byte_level(tmp_path / "a.gguf", asked))
    without = text.load_tokenizer(byte_level(tmp_path / "b.gguf", names_and_bos))
    by_habit = text.load_tokenizer(byte_level(tmp_path / "c.gguf", names_and_bos, pre="llama-bpe"))
    for tokenizer in (with_bos, by_habit):
        assert (
            text.encode_raw(tokenizer, "abc").token_ids == [259, 257] == text.encode_raw(tokenizer, "<s>abc").token_ids
        )
    assert text.encode_raw(without, "abc").token_ids == [257] and text.encode_raw(without, "<s>abc").token_ids == [
        259,
        257,
    ]
    with_bos.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}."
    assert text.encode_chat(with_bos, "abc").token_ids[:2] == [259, 257]
    assert text.encode_raw(without, "").token_ids == []


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_pre_tokenizers_are_lossless(tmp_path, pre):
    tokenizer = text.load_tokenizer(byte_level(tmp_path / "m.gguf", pre=pre))
    for sample in (case["text"] for case in GOLDEN["encode"]):
        ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", sample) if pre == "qwen2" else sample)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'m", " 1234567", "!?", " ok", "\n\n"]),
        ("smollm", ["I", "'m", " ", *"1234567", "!?", " ok", "\n\n"]),
        ("llama-bpe", ["I", "'m", " ", "123", "456", "7", "!?", " ok", "\n\n"]),
        ("qwen2", ["I", "'m", " ", *"1234567", "!?", " ok", "\n\n"]),
        ("tekken", ["I", "'m", " ", *"1234567", "!?", " ok", "\n\n"]),
        ("default", ["I", "'", "m", " ", "123", "456", "7", "!?", " ok", "\n\n"]),
    ],
)
def test_pre_tokenizer_pieces(tmp_path, pre, pieces):
    tokenizer = text.load_tokenizer(byte_level(tmp_path / "m.gguf", pre=pre)).backend_tokenizer
    sample = "I'm 1234567!? ok\n\n"
    found = [sample[first:last] for _, (first, last) in tokenizer.pre_tokenizer.pre_tokenize_str(sample)]
    assert found == pieces


def test_user_defined_tokens(tmp_path):
    tokenizer = text.load_tokenizer(byte_level(tmp_path / "m.gguf", extra=["<think>"]))
    assert text.encode_raw(tokenizer, "a<think>").token_ids == [text.encode_raw(tokenizer, "a").token_ids[0], 261]
    assert tokenizer.decode([261], skip_special_tokens=True) == "<think>"
    assert tokenizer.decode([260], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("alias", "pre"), [("smaug-bpe", "llama-bpe"), ("llama3", "llama-bpe"), ("deepseek-r1-qwen", "qwen2"),
                       ("starcoder", "smollm"), ("phi-2", "gpt-2")]
)  # fmt: skip
def test_pre_tokenizers_of_other_names(tmp_path, alias, pre):
    one, other = (text.load_tokenizer(byte_level(tmp_path / f"{name}.gguf", pre=name)) for name in (alias, pre))
    for sample in (case["text"] for case in GOLDEN["encode"]):
        assert text.encode_raw(one, sample).token_ids == text.encode_raw(other, sample).token_ids


def without_pre(path, tokens, merges, kinds=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types(kinds or [1] * len(tokens))
    writer.add_tensor("x", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_missing_pre_tokenizer_is_said(tmp_path):
    """'1234' must not become one token, which gpt-2's rule would make of it."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "34", "1234"]
    path = without_pre(tmp_path / "m.gguf", tokens, ["1 2", "3 4", "12 34"])
    with pytest.warns(ModelWarning, match="tokenizer.ggml.pre is missing: 'default' is used"):
        assert text.encode_raw(text.load_tokenizer(path), "1234").token_ids == [
            256,
            tokens.index("3"),
            tokens.index("4"),
        ]


def test_a_missing_pre_tokenizer_of_a_known_vocabulary(tmp_path, smollm2, smollm2_path):
    found = open_gguf(smollm2_path).metadata
    tokens, merges, kinds = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges", "token_type"))
    path = without_pre(tmp_path / "m.gguf", tokens, merges, kinds)
    with pytest.warns(ModelWarning, match="its vocabulary is that of 'smollm'"):
        tokenizer = text.load_tokenizer(path)
    for case in GOLDEN["encode"]:
        assert text.encode_raw(tokenizer, case["text"]).token_ids == case["ids"]


def special_as_text(path, kinds, template=None):
    """A vocabulary with ChatML's signs, <think>, and words, typed as told."""
    tokens = ["<|im_start|>", "<|im_end|>", "<think>", "<b>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<b", "ab"]

    def change(writer):
        if template:
            writer.add_chat_template(template)

    return write_tokenizer_gguf(path, "gpt2", tokens, kinds + [1] * 258, change, None, ["< b", "<b >", "a b"])


@pytest.mark.parametrize("kinds", [[3, 1, 1, 1], [1, 3, 1, 1], [1, 1, 1, 1]])
@pytest.mark.parametrize("template", [None, CHATML])
def test_signs_typed_as_plain_text_are_one_token_and_said(tmp_path, kinds, template):
    with pytest.warns(ModelWarning, match="typed as plain text, .*<|im_"):
        tokenizer = text.load_tokenizer(special_as_text(tmp_path / "m.gguf", kinds, template))
    assert text.encode_raw(tokenizer, "<|im_start|>a<|im_end|>").token_ids[::2] == [0, 1]
    assert text.decode(tokenizer, [0, 1]) == ""
    assert len(text.encode_raw(tokenizer, "<b>").token_ids) == 3  # no sign of a chat, and left alone


def test_a_sign_that_only_the_template_knows_is_one_token_and_stays_visible(tmp_path):
    path = special_as_text(tmp_path / "m.gguf", [3, 3, 1, 1], CHATML + "<think>\n")
    with pytest.warns(ModelWarning, match="<think>"):
        tokenizer = text.load_tokenizer(path)
    assert text.encode_raw(tokenizer, "<think>").token_ids == [2] and text.decode(tokenizer, [2]) == "<think>"


WRITTEN = ["[gMASK]", "[user]", "### User:", "<human>", "User:"]
SEEN = ["<sop>", "<think>", "</s>", "<tool_call>", "<|turn>", "<turn|>", "[|user|]", "<|User Name|>"]


@pytest.mark.parametrize(("sign", "template"), [*((sign, "{}") for sign in WRITTEN + SEEN), *((s, None) for s in SEEN)])
def test_whole_entries_that_look_like_signs_or_that_the_template_writes_are_one_token(tmp_path, sign, template):
    tokens = ["<|end|>", sign, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12"]

    def change(writer):
        if template:
            writer.add_chat_template("{% for m in messages %}" + sign + "{{ m.content }}<|end|>{% endfor %}")

    path = write_tokenizer_gguf(tmp_path / "m.gguf", "gpt2", tokens, [3] + [1] * 258, change, None, ["1 2"])
    with pytest.warns(ModelWarning, match=f"read as one token: {re.escape(sign)}$"):
        tokenizer = text.load_tokenizer(path)
    assert text.encode_raw(tokenizer, f"a{sign}b").token_ids.count(1) == 1


@pytest.mark.parametrize("word", ["User", "user_name", "{%", "a.", "ab"])
def test_words_and_what_merges_make_are_left_alone(tmp_path, word):
    """Though the template writes them; `a.` is cut before it can be merged."""
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "a.", "ab", "User", "user_name", "{%"]

    def change(writer):
        writer.add_chat_template("{% for m in messages %}" + word + "{{ m.content }}<|end|>{% endfor %}")

    path = write_tokenizer_gguf(tmp_path / "m.gguf", "gpt2", tokens, [3] + [1] * 261, change, None, ["a .", "a b"])
    tokenizer = text.load_tokenizer(path)  # warnings are errors
    assert text.encode_raw(tokenizer, "a.").token_ids == [tokens.index("a"), tokens.index(".")]


def test_token_types_must_be_as_many_as_tokens(tmp_path):
    with pytest.raises(CheckpointError, match="token_type has 260 entries for 262 tokens"):
        text.load_tokenizer(special_as_text(tmp_path / "m.gguf", [3, 3]))


def test_stops_that_are_special_tokens_become_tokens():
    tokenizer = small_tokenizer()
    start, end = (tokenizer.convert_tokens_to_ids(sign) for sign in ("<|im_start|>", "<|im_end|>"))
    assert answers.split_stops(tokenizer, ["a", "<|im_end|>", "\n", "<|im_start|>\n", "<|im_end|>"]) == (
        ("a", "\n"), (end, start),
    )  # fmt: skip
    for stop, words in (("", "must not be empty"), ("so<|im_end|>", "mixes the special token <|im_end|> with text")):
        with pytest.raises(FastKVConfigError, match=re.escape(words)):
            answers.split_stops(tokenizer, ["a", stop])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pre": "mystery"}, "tokenizer.ggml.pre 'mystery'"),
        ({"merges": ("a ☃",)}, "merges do not fit"),
        ({"extra": ["ab"]}, "duplicates"),
    ],
)
def test_bad_gguf_tokenizers(tmp_path, arguments, words):
    with pytest.raises(CheckpointError, match=words):
        text.load_tokenizer(byte_level(tmp_path / "m.gguf", **arguments))


def test_special_tokens_of_a_gguf_outside_its_vocabulary_are_not_used(tmp_path):
    def change(writer):
        writer.add_bos_token_id(259)
        writer.add_eos_token_id(999)
        writer.add_pad_token_id(2**32 - 1)

    with pytest.warns(ModelWarning) as told:
        tokenizer = text.load_tokenizer(byte_level(tmp_path / "m.gguf", change))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", None, None)
    assert [str(one.message).removeprefix(f"{tmp_path / 'm.gguf'}: ") for one in told] == [
        "end token 999 is outside the 261 tokens; not used",  # as the model says it, so that it is said once
        f"padding token {2**32 - 1} is outside the 261 tokens; not used",
    ]


def sentencepiece(path, change=lambda writer: None):
    pieces = ["▁", "a", "b", "c", "ab", "abc", "▁a", "▁ab", "▁abc", "bc"]
    scores = [-9.0, -9.0, -9.0, -9.0, -1.0, -3.0, -2.0, -1.5, -4.0, -2.5]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]

    def all_changes(writer):
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        change(writer)

    kinds = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    return write_tokenizer_gguf(path, "llama", tokens, kinds, all_changes, [0.0] * 259 + scores)


def test_sentencepiece(tmp_path):
    """Merges in the order of their scores; unknown characters as bytes; the space in front comes and goes."""
    tokenizer = text.load_tokenizer(sentencepiece(tmp_path / "m.gguf"))
    names = tokenizer.convert_ids_to_tokens
    assert names(text.encode_raw(tokenizer, "abc bc").token_ids) == ["<s>", "▁abc", "▁", "bc"]
    assert names(text.encode_raw(tokenizer, "aé").token_ids) == ["<s>", "▁a", "<0xC3>", "<0xA9>"]
    for sample in ("abc bc", " a", "é😀 a", "a  b"):
        ids = text.encode_raw(tokenizer, sample).token_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == sample
        stream = answers.TextStream(tokenizer)
        assert "".join(stream.push(i) for i in ids) + stream.flush() == sample


def test_a_stream_goes_on_after_bytes_that_are_no_text(tmp_path):
    """A newline, half an emoji, a letter: a decoder that takes the newline for settled raises here."""
    ids = [3 + 0x0A, 3 + 0xF0, 260, 3 + 0xF0, 3 + 0x9F, 3 + 0x98, 3 + 0x80, 261]
    tokenizer = text.load_tokenizer(sentencepiece(tmp_path / "m.gguf"))
    stream = answers.TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == text.decode(tokenizer, ids) == tokenizer.decode(ids) == "\ufffd\ufffda😀b"


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return text.load_tokenizer(sentencepiece(tmp_path_factory.mktemp("spm") / "m.gguf"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 268), st.sampled_from([3 + 0x0A, 3 + 0xC3, 3 + 0xA9, 259, 2])), max_size=14))
def test_a_stream_of_any_tokens_is_their_text(spm, ids):
    """Byte tokens, special tokens, spaces and words in any order; whatever a piece shows is never taken back."""
    for skip in (True, False):
        stream = answers.TextStream(spm, skip_special_tokens=skip)
        whole = "".join(stream.push(i) for i in ids) + stream.flush()
        assert whole == spm.decode(ids, skip_special_tokens=skip)


def test_what_goes_on_has_no_space_that_nobody_wrote(tmp_path):
    tokenizer = text.load_tokenizer(sentencepiece(tmp_path / "m.gguf"))
    for before, after in (("abc", "\nab"), ("abc", "\n\nab c"), ("a", "b"), ("abc ", "bc"), ("\n", " a")):
        one = text.encode_raw(tokenizer, before).token_ids + text.continue_with(tokenizer, after)
        assert tokenizer.decode(one, skip_special_tokens=True) == before + after
    whole = text.encode_raw(tokenizer, "abc\na").token_ids
    assert text.encode_raw(tokenizer, "abc").token_ids + text.continue_with(tokenizer, "\na") == whole
    assert text.continue_with(tokenizer, "") == []


def test_split_special_tokens_writes_no_spaces(tmp_path):
    tokenizer = text.load_tokenizer(sentencepiece(tmp_path / "m.gguf"))
    tokenizer.chat_template = "{{ bos_token }}a\n{{ messages[0].content }}\nb"
    for prompt in ("bc", " bc"):
        whole, split = (text.encode_chat(tokenizer, prompt, split_special_tokens=split) for split in (False, True))
        assert split == whole
    split = text.encode_chat(tokenizer, "bc</s>", split_special_tokens=True)
    assert 2 not in split.token_ids and tokenizer.decode(split.token_ids[split.first : split.end]) == "bc</s>"


def test_sentencepiece_without_prefix_space(tmp_path):
    path = sentencepiece(tmp_path / "m.gguf", lambda writer: writer.add_add_space_prefix(False))
    tokenizer = text.load_tokenizer(path)
    assert tokenizer.convert_ids_to_tokens(text.encode_raw(tokenizer, "abc a").token_ids) == ["<s>", "abc", "▁a"]


def test_folders(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        text.load_tokenizer(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    assert (
        text.encode_raw(text.load_tokenizer(tmp_path), "a").token_ids
        == text.encode_raw(small_tokenizer(), "a").token_ids
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        text.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_custom_code_is_refused(tmp_path):
    marker = tmp_path / "ran"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "own"}))
    settings_ = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings_))
    (model / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        text.load_tokenizer(model)
    assert not marker.exists()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
@example("a\ufffd")  # could become another character with the next token, so it is held back
def test_stream_is_exact(sample):
    tokenizer = small_tokenizer()
    ids = text.encode_raw(tokenizer, sample).token_ids
    stream = answers.TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    said = "".join(pieces)
    assert said + stream.flush() == sample and (said == sample or sample.endswith("\ufffd"))
    assert all("\ufffd" not in piece or "\ufffd" in sample for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 257), max_size=12))
def test_stream_of_any_bytes(ids):
    tokenizer = small_tokenizer()
    stream = answers.TextStream(tokenizer)
    out = "".join(stream.push(i) for i in ids) + stream.flush()
    assert out == tokenizer.decode(ids, skip_special_tokens=True)
