"""The seam between a saved document and a question: the tokens of both are those of one text."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastkv_jax import text
from fastkv_jax.chat_template import Rendering
from fastkv_jax.cli.asking import saved
from fastkv_jax.cli.asking.answering import Encoded, PromptOptions, encode
from fastkv_jax.cli.asking.prompts import Request
from fastkv_jax.cli.asking.saved import Saved, parts
from fastkv_jax.errors import InputError
from fastkv_jax.model.config import LlamaConfig


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and a full stop with a newline, and two newlines, are one token each."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), ".Ċ", "ĊĊ"]
    merges = [(".", "Ċ"), ("Ċ", "Ċ")]
    found = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found)


@pytest.fixture(scope="module")
def config(tiny_model) -> LlamaConfig:
    from fastkv_jax.checkpoint import inspect

    return inspect(tiny_model)


@pytest.mark.parametrize("document", ["The lamp is lit.", "The lamp is lit.\n", "No end", "é", "."])
@pytest.mark.parametrize("question", ["Who?", "\nWho?", " Who?"])
@pytest.mark.parametrize("tail", ["", "<e>"])
def test_document_and_question_have_the_tokens_of_one_text(tokenizer, config, document, question, tail):
    whole = text.encode_raw(tokenizer, f"{document}\n{question}{tail}").token_ids
    after = text.continue_with(tokenizer, tail)
    ids = [*text.encode_raw(tokenizer, document).token_ids, *after]
    words, rest, end = parts(tokenizer, Encoded(ids, 0, 0, tail=len(after)))
    assert [*words, *rest, *end] == ids and words and end == after
    kept = Saved(None, text.decode(tokenizer, rest), end, len(words), "full")  # type: ignore[arg-type]
    asked = kept.encode(tokenizer, Request(1, question), config, 1, split=False).token_ids
    if document != ".":  # something must be read, and a lone full stop is all there is
        assert [*words, *asked] == whole
    assert tokenizer.decode([*words, *asked]) == f"{document}\n{question}{tail}"


DOCUMENTS = [
    "the end.",
    "the end.\n",
    "the end\n\n",
    "the end. ",
    "the\n\n\n",
    "\n\nthe",
    "é",
    "the <|end|>",
    "<|end|> it\t",
]
ASKED = ["Who?", "Who?\n", " Who?", "\nWho?", "\n\nWho?", "  Who? ", "é?", ".", "it <|end|> x"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
TRIMS = TEMPLATE.replace("m.content", "m.content | trim")


def of_bytes(template: str) -> PreTrainedTokenizerFast:
    """Texts are cut as Llama 3's are: signs and the newlines after them, and newlines, are one piece."""
    merges = [(".", "Ċ"), ("Ċ", "Ċ"), (".Ċ", "Ċ"), ("?", "Ċ"), ("Ġ", "Ċ"), ("Ġ", "Ġ")]
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    found = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, merges))
    pieces = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), bytes_of])
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["<|start|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=found, chat_template=template)


def of_pieces(template: str) -> PreTrainedTokenizerFast:
    """Of sentencepiece's kind: a space before every text, tokens with newlines, bytes for what there is no token of."""
    merges = [("\n", "\n"), (".", "\n"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁")]
    letters = [*(f"<0x{i:02X}>" for i in range(256)), *"thendWoiasr.?▁\n", *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(letters))}
    found = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|start|>", "<|end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=found, chat_template=template)


@pytest.mark.parametrize("kind", [of_bytes, of_pieces])
@pytest.mark.parametrize("template", [TEMPLATE, TRIMS])
@pytest.mark.parametrize("split", [False, True])
def test_a_chat_about_a_saved_document_has_the_tokens_of_one(tmp_path, config, kind, template, split, monkeypatch):
    """Also where the template leaves out white space at the end of a message, or a newline merges with others."""
    tokenizer = kind(template)
    how = PromptOptions(True, 1, 4096, "limit", None, split, True, Rendering())
    notes = []
    monkeypatch.setattr(saved, "save_cache", lambda path, cache, model, tokenizer, note: notes.append(note))
    monkeypatch.setattr(saved, "load_note", lambda path: notes[-1])
    for document in DOCUMENTS:
        prompt = encode(tokenizer, Request(1, document), config, how)
        saved.save("it", None, None, tokenizer, prompt, None)  # type: ignore[arg-type]
        words = parts(tokenizer, prompt)[0]
        for question in ASKED:
            whole = encode(tokenizer, Request(1, f"{document}\n{question}"), config, how).token_ids
            asked = Saved.read("it").encode(tokenizer, Request(1, question), config, 1, split).token_ids
            assert [*words, *asked] == whole, (document, question)


def test_a_conversation_that_has_begun_takes_no_system_message(tokenizer, config):
    with pytest.raises(InputError, match="no place for a system message"):
        Saved(None, "", [], 3, "full").encode(tokenizer, Request(1, "a", system="b"), config, 1, False)  # type: ignore[arg-type]
