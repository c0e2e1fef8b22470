"""The seam between a saved document and a question: the tokens of both are those of one text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastkv_jax import text
from fastkv_jax.cli.engine import Encoded
from fastkv_jax.cli.prompts import Request
from fastkv_jax.cli.saved import Saved, parts
from fastkv_jax.config import LlamaConfig
from fastkv_jax.errors import InputError


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
    saved = Saved(None, text.decode(tokenizer, rest), end, len(words), "full")  # type: ignore[arg-type]
    asked = saved.encode(tokenizer, Request(1, question), config, 1, split=False).token_ids
    if document != ".":  # something must be read, and a lone full stop is all there is
        assert [*words, *asked] == whole
    assert tokenizer.decode([*words, *asked]) == f"{document}\n{question}{tail}"


def test_a_conversation_that_has_begun_takes_no_system_message(tokenizer, config):
    with pytest.raises(InputError, match="no place for a system message"):
        Saved(None, "", [], 3, "full").encode(tokenizer, Request(1, "a", system="b"), config, 1, False)  # type: ignore[arg-type]
