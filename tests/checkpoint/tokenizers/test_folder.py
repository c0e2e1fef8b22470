"""tokenizer.json against the classes of transformers that rebuild it with steps of their own."""

import json
import warnings

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastkv_jax import text
from fastkv_jax.checkpoint import Resolved
from fastkv_jax.errors import ModelWarning

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<eos>", "<bos>", "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]
TEXTS = ["Hello  world", "  leading", "a\nb\n\n c\td", "1234 12.5", "é 😀 中", "the </s> x", "the </s>x", ""]
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}<think>{% endfor %}"


def sentencepiece(kind):
    """legacy: a space before every piece between special tokens; first: before the text; never: none."""
    merges = [("▁", "a"), ("▁", "▁"), ("▁", "x"), ("h", "e"), ("e", "l"), ("▁", "w")]
    tokens = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdehlowrx1234Ht", *map("".join, merges), "\n"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "first":
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([*steps, *([] if kind == "never" else [decoders.Strip(" ", 1, 0)])])
    return made


def byte_level(_):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters, "12"])}, [("1", "2")]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    return made


def write(folder, made, kind, **settings):
    """A folder of a tokenizer that starts a text with its BOS; returns the tokenizer as its file has it."""
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | settings))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def read(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ModelWarning)
        found = text.load_tokenizer(Resolved("hugging_face", folder, "m"))
    return found, [str(warning.message) for warning in caught]


MISFITS = [
    *((sentencepiece, "legacy", f"{name}Tokenizer") for name in ("GPT2", "Qwen2", "Cohere", "Gemma", "Llama")),
    (sentencepiece, "never", "LlamaTokenizer"),
    *((byte_level, "", f"{name}Tokenizer") for name in ("Gemma", "CodeLlama", "GPT2")),
]
FITS = [
    *((sentencepiece, kind, "PreTrainedTokenizerFast") for kind in ("legacy", "first", "never")),
    (sentencepiece, "first", "LlamaTokenizer"),
    (sentencepiece, "never", "GemmaTokenizer"),
    *((byte_level, "", name) for name in ("PreTrainedTokenizerFast", "LlamaTokenizer", None)),
]


@pytest.mark.parametrize(("make", "kind", "name"), [*MISFITS, *FITS])
def test_texts_are_read_as_tokenizer_json_has_it(tmp_path, make, kind, name):
    made = make(kind)
    added = {i: {"content": token, "special": True, "normalized": False} for i, token in enumerate(SPECIAL)}
    added |= {made.get_vocab_size(): {"content": "<think>", "special": False, "normalized": False}}
    own = write(tmp_path, made, name, added_tokens_decoder=added)
    found, told = read(tmp_path)
    assert len(told) == ((make, kind, name) in MISFITS)
    assert all(f"the class {name} reads texts such as" in line for line in told)
    for words in TEXTS:
        ids = own.encode(words).ids
        assert text.encode_raw(found, words).token_ids == ids
        assert text.decode(found, ids) == own.decode(ids)
    assert found.chat_template == TEMPLATE
    assert text.continue_with(found, "<think>") == [own.get_vocab_size()]  # only the settings name it


def test_roles_that_only_the_class_names_are_kept(tmp_path):
    write(tmp_path, sentencepiece("legacy"), "LlamaTokenizer", pad_token="<pad>", add_bos_token=True)
    found, told = read(tmp_path)
    assert (found.bos_token, found.eos_token, found.unk_token, found.pad_token) == ("<s>", "</s>", "<unk>", "<pad>")
    assert len(told) == 1 and text.encode_raw(found, "a").token_ids[0] == 1


def test_added_tokens_that_the_settings_do_not_repeat(tmp_path):
    """A class that rebuilds the tokenizer believes the settings to be complete."""
    made = sentencepiece("first")
    only = {made.get_vocab_size(): {"content": "<think>", "special": False}}
    own = write(tmp_path, made, "LlamaTokenizer", added_tokens_decoder=only)
    found, told = read(tmp_path)
    assert len(told) == 1 and "the class LlamaTokenizer reads texts such as " in told[0]
    for words in ("a<bos>b", "a<pad> b", "</s>"):
        assert text.encode_raw(found, words).token_ids == own.encode(words).ids
    assert text.continue_with(found, "<think>") == [own.get_vocab_size()]
