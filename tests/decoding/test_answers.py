"""An answer ends at its first end token, stop token, stop string or length, and its text is what stands before."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastkv_jax import text
from fastkv_jax.decoding import answers
from fastkv_jax.errors import FastKVConfigError


def letters_and_bytes() -> SimpleNamespace:
    """a, b and c are 0, 1 and 2; the bytes of an emoji follow, then two special tokens."""
    emoji = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("😀")[0][0]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["a", "b", "c", *emoji])}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<stop>"])
    return SimpleNamespace(backend_tokenizer=backend)


TOKENIZER = letters_and_bytes()
END, STOP = 7, 8


def cut_by_hand(whole, stops):
    """Character by character: stop as soon as a stop string is complete, drop it (the longest, if several are)."""
    for end in range(len(whole) + 1):
        complete = [len(stop) for stop in stops if whole[:end].endswith(stop)]
        if complete:
            return whole[: end - max(complete)], True
    return whole, False


words = st.text("abc", min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(st.lists(words, max_size=3), st.lists(st.text("abc", max_size=5), max_size=6))
def test_stop_matcher(stops, pieces):
    matcher, printed, stopped = answers.StopMatcher(stops), "", False
    for i, piece in enumerate(pieces):
        safe, stopped = matcher.push(piece)
        printed += safe
        rest = "".join(pieces[: i + 1])
        # What is printed is never taken back, and no more is held than could begin a stop string.
        assert rest.startswith(printed)
        if not stopped:
            assert len(rest) - len(printed) < max(map(len, stops), default=1)
    printed += matcher.flush()
    assert (printed, stopped) == cut_by_hand("".join(pieces), stops)


def test_after_a_stop_nothing_comes():
    matcher = answers.StopMatcher(["##"])
    assert matcher.push("a#") == ("a", False)
    assert matcher.push("#b") == ("", True)
    assert matcher.push("c") == ("", True) and matcher.flush() == ""
    with pytest.raises(FastKVConfigError, match="empty"):
        answers.StopMatcher(["a", ""])


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, STOP), max_size=12),
    stops=st.lists(words, max_size=2),
    limit=st.none() | st.integers(1, 8),
)
def test_a_transcript_is_what_stands_before_the_first_end(ids: list[int], stops: list[str], limit: int | None):
    said = answers.Transcript(TOKENIZER, {END}, stop_tokens=[STOP], stops=stops, limit=limit)
    pieces = []
    for token in ids:
        pieces.append(said.push(token))
        assert said.text == "".join(pieces)
    pieces.append(said.close())
    first = next((i for i, token in enumerate(ids) if token in (END, STOP)), len(ids))
    mine = ids[:first] if limit is None else ids[: min(first, limit)]
    whole, stopped = cut_by_hand(text.decode(TOKENIZER, mine), stops)
    assert said.text == "".join(pieces) == whole
    by_token = first < len(ids) and (limit is None or first < limit)
    assert said.finish == ("stop" if stopped or by_token and ids[first] == STOP else "eos" if by_token else "length")
    assert said.words == len(mine) or stopped and said.words < len(mine)
    assert said.push(0) == said.close() == "" and said.text == whole
