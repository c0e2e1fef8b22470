"""Pictures show exactly what the cache holds; a page is one safe file."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fastkv_jax as fk
from examples import BUCKET, EXAMPLES, LENGTHS, PROMPTS, layers, model_a, ragged
from fastkv_jax.cache.segment import SegmentKV
from fastkv_jax.explanation.explanation import Explanation
from fastkv_jax.explanation.png import HEADER, LEFT, MAP, STRIP, WIDTH, resample

FASTKV, FULL = EXAMPLES["fastkv"][0], EXAMPLES["full"][0]
TOKENS, START = fk.pad_batch(PROMPTS, BUCKET)
HOSTILE = '</script><script>alert("x")</script> &amp; \' <!-- \n\x00\x1b\u202eé€😀<img src=x onerror=alert(1)>'


def byte_tokenizer():
    """One token per byte, of the bytes that HOSTILE and ASCII text need: few enough for the small model."""
    numbers = sorted({*range(32, 127), *HOSTILE.encode()})
    others = iter(range(256, 512))  # GPT-2's alphabet: bytes that do not print are numbered from U+0100 on
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    alphabet = {byte: chr(byte) if byte in prints else chr(next(others)) for byte in range(256)}
    vocabulary = {alphabet[byte]: i for i, byte in enumerate(numbers)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return SimpleNamespace(backend_tokenizer=backend)


def random_explanation(layers, heads, n, words=None, share=0.2):
    rng = np.random.default_rng(n)
    kept = rng.random((layers, heads, n)) < share
    words = tuple(words or [f" word{i % 50}" for i in range(n)])
    return Explanation(np.arange(n), words, True, kept, (heads,) * layers, rng.random(n) < share)


class Page(HTMLParser):
    """The scripts, the elements and the policy of a page."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.scripts, self.elements, self.policy = [], [], ""
        self.feed(self.text)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script" and data.strip():
            self.scripts.append(data)

    def bits(self, name):
        n = len(self.data["words"])
        rows = np.frombuffer(base64.b64decode(self.data[name]), np.uint8).reshape(-1, (n + 7) // 8)
        return np.unpackbits(rows, axis=1, bitorder="little")[:, :n].astype(bool)


@pytest.fixture
def page(tmp_path):
    def save(explanation):
        explanation.save(tmp_path / "page.html")
        return Page(tmp_path / "page.html")

    return save


# ---- What it holds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*EXAMPLES["fastkv"], FULL])
@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_it_holds_exactly_what_the_cache_holds(method, row):
    result = ragged(method)
    found = fk.explain(result, TOKENS, row=row, start=START)
    assert found.token_ids.tolist() == PROMPTS[row].tolist()
    assert found.words == tuple(map(str, PROMPTS[row]))
    assert found.heads == (model_a().config.num_kv_heads,) * model_a().config.num_layers
    for layer, (heads, entries) in enumerate(zip(found.heads, layers(result.cache), strict=True)):
        positions = entries.positions[row]
        for head in range(heads):
            expected = sorted(positions[head][positions[head] >= 0])
            assert np.flatnonzero(found.kept[layer, head]).tolist() == expected
    if method is FULL:
        assert found.kept.all() and found.propagated is None and found.boundary is None
    else:
        passed = np.asarray(result.propagated)[row]
        assert np.flatnonzero(found.propagated).tolist() == sorted(passed[passed >= 0])


def test_lists_are_accepted_and_no_start_means_no_padding():
    tokens = [PROMPTS[4].tolist()]
    result = fk.prefill(model_a(), tokens, method=FASTKV, max_new_tokens=0)
    assert (fk.explain(result, tokens).kept == fk.explain(result, np.array(tokens), start=[0]).kept).all()


def test_the_boundary_is_the_layer_after_the_tsp_layer():
    found = fk.explain(ragged(FASTKV), TOKENS, row=5, start=START)
    assert found.boundary == FASTKV.tsp_layer + 1
    assert not found.kept[found.boundary :, :, ~found.propagated].any()
    assert found.kept[FASTKV.tsp_layer][:, ~found.propagated].any()


def test_layers_may_differ_in_heads_and_capacity():
    positions = [np.array([[[-1, 0, 2], [1, 2, 3]]]), np.array([[[-1, 3], [0, 3], [2, 3], [-1, -1]]])]
    segments = tuple(SegmentKV(p[None, ..., None], p[None, ..., None], p[None]) for p in positions)
    result = ragged(FASTKV)
    cache = dataclasses.replace(
        result.cache, segments=segments, k_new=np.zeros((2, 1, 2, 0, 1)), position=np.array([4]), used=np.int32(0)
    )
    result = dataclasses.replace(result, logits=np.zeros((1, 9)), cache=cache, propagated=np.array([[-1, 0, 2, 3]]))
    found = fk.explain(result, [[5, 6, 7, 8]])
    assert found.heads == (2, 4)
    expected = [["1010", "0111", "0000", "0000"], ["0001", "1001", "0011", "0000"]]
    assert [["".join(map(str, row.astype(int))) for row in layer] for layer in found.kept] == expected
    np.testing.assert_allclose(found.share, np.array([2, 1, 3, 4]) / 6)
    assert found.boundary == 1
    assert found.summary() == (
        "4 tokens, 2 layers x 2-4 heads: 41.7 % of the KV entries kept, 0 tokens by every head\n"
        "3 tokens (75.0 %) were propagated to layers 1-1"
    )


def test_words_are_the_text_and_a_character_belongs_to_its_last_token():
    tokenizer = byte_tokenizer()
    tokens = [tokenizer.backend_tokenizer.encode("a é€😀" + HOSTILE).ids]
    found = fk.explain(fk.prefill(model_a(), tokens, method=FASTKV, max_new_tokens=0), tokens, tokenizer)
    assert found.words[:11] == ("a", " ", "", "é", "", "", "€", "", "", "", "😀")
    assert "".join(found.words) == "a é€😀" + HOSTILE


def test_bytes_that_are_no_text_are_shown_and_do_not_swallow_what_follows():
    tokenizer = byte_tokenizer()
    (broken,) = {tokenizer.backend_tokenizer.encode("é").ids[1]}
    a = tokenizer.backend_tokenizer.encode("a").ids[0]
    tokens = [[a, *[broken] * 20, a, broken]]
    words = fk.explain(fk.prefill(model_a(), tokens, method=FULL, max_new_tokens=0), tokens, tokenizer).words
    assert "".join(words) == "a" + "\ufffd" * 20 + "a\ufffd"


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS, {"row": 6, "start": START}, "row 6 is outside 0..5"),
        (TOKENS, {"row": -1, "start": START}, "row -1 is outside 0..5"),
        (TOKENS, {"row": True, "start": START}, "row True is outside 0..5"),
        (TOKENS[:3], {"start": START}, "tokens have 3 rows, the result has 6"),
        (TOKENS[0], {"start": START}, "of shape [batch, length], got int32 [256]"),
        (TOKENS.astype(float), {"start": START}, "of shape [batch, length], got float64 [6, 256]"),
        ([[1], [1, 2]], {}, "rows of different lengths"),
        (TOKENS, {"row": 4}, "row 4 has 256 tokens, the result was made from 131: pass its own start"),
        (TOKENS, {"start": START + 1}, "row 0 has 0 tokens, the result was made from 1"),
        (TOKENS, {"start": START[:2]}, "start must be 6 integers >= 0"),
        (TOKENS, {"start": -START}, "start must be 6 integers >= 0"),
        (TOKENS + 128, {"start": START}, "outside the result's vocabulary of 128"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tokens, options, message):
    with pytest.raises(fk.InputError, match=re.escape(message)) as error:
        fk.explain(ragged(FASTKV), tokens, **options)
    assert "\n" not in str(error.value)


def test_a_result_can_be_explained_until_decoding_takes_its_cache():
    tokens = [PROMPTS[3]]
    result = fk.prefill(model_a(), tokens, method=FASTKV, max_new_tokens=2)
    before = fk.explain(result, tokens)
    _, cache = fk.decode_step(model_a(), np.array([1]), result.cache)
    with pytest.raises(fk.InputError, match="given to decoding"):
        fk.explain(result, tokens)
    result = dataclasses.replace(result, cache=cache)
    assert (fk.explain(result, tokens).kept == before.kept).all()
    with pytest.raises(fk.InputError, match="row 0 has 82 tokens, the result was made from 80"):
        fk.explain(result, [[1, 1, *PROMPTS[3]]])
    longer = dataclasses.replace(cache, position=np.array([80]))
    with pytest.raises(fk.InputError, match="the cache holds position 79, the tokens given end at 78"):
        fk.explain(dataclasses.replace(result, cache=longer), [PROMPTS[3][1:]])


# ---- The page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FASTKV, FULL])
def test_the_page_holds_the_same_bits(method, page):
    found = fk.explain(ragged(method), TOKENS, row=4, start=START)
    saved = page(found)
    assert (saved.bits("kept") == found.kept.reshape(-1, 131)).all()
    if found.propagated is None:
        assert saved.data["propagated"] is None
    else:
        assert (saved.bits("propagated")[0] == found.propagated).all()
    assert saved.data["words"] == list(found.words) and saved.data["ids"] is None
    assert (saved.data["heads"], saved.data["boundary"]) == (list(found.heads), found.boundary)


def test_the_page_leaves_out_heads_that_a_layer_does_not_have(page):
    whole = random_explanation(3, 4, 13)
    whole.kept[1, 2:] = False
    saved = page(dataclasses.replace(whole, heads=(4, 2, 4)))
    expected = np.concatenate([whole.kept[0], whole.kept[1, :2], whole.kept[2]])
    assert (saved.bits("kept") == expected).all()


def test_hostile_text_reaches_the_page_as_data_only(page):
    tokenizer = byte_tokenizer()
    tokens = [tokenizer.backend_tokenizer.encode(HOSTILE).ids]
    result = fk.prefill(model_a(), tokens, method=FULL, max_new_tokens=0)
    harmless = page(random_explanation(1, 1, 3))
    # Character by character as a tokenizer gives it, and whole, as one token might have it.
    for found in (fk.explain(result, tokens, tokenizer), random_explanation(1, 1, 2, [HOSTILE, "%DATA%\udc80"])):
        saved = page(found)
        assert saved.elements == harmless.elements
        assert not re.search("[<>&]", saved.scripts[0])
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", saved.text)
        shown = "".join(saved.data["words"]).removesuffix("%DATA%?")
        assert shown == HOSTILE.replace("\x00", "␀").replace("\x1b", "␛").replace("\u202e", "\ufffd")


def test_the_page_needs_and_allows_nothing_from_outside(page):
    saved = page(random_explanation(2, 2, 40))
    assert saved.text.startswith("<!doctype html>")
    assert set(re.findall(r"https?://[^\s\"']+", saved.text)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not [attributes for _, attributes in saved.elements if {"src", "href"} & set(attributes)]
    digest = base64.b64encode(hashlib.sha256(saved.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in saved.policy and f"script-src 'sha256-{digest}'" in saved.policy


def test_the_page_of_a_long_prompt_is_small(tmp_path):
    random_explanation(30, 3, 8000).save(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 400_000


# ---- The picture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "heads", "n"), [(4, 2, 125), (30, 3, 5000), (40, 32, 300), (1, 1, 1)])
def test_the_picture_has_the_size_it_should(layers, heads, n, tmp_path):
    random_explanation(layers, heads, n).save(tmp_path / "picture.PNG")
    with Image.open(tmp_path / "picture.PNG") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width == WIDTH and 300 < picture.height < 1200


def test_every_pixel_of_the_picture_is_what_was_kept(tmp_path):
    found = dataclasses.replace(random_explanation(4, 2, 125), propagated=None)
    found.save(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        grey = np.asarray(picture.convert("L"))
    top, layer_height, head_height = HEADER + STRIP + 16, 40, 19
    for layer, head in np.ndindex(4, 2):
        row = top + layer * layer_height + head * head_height + head_height // 2
        dark = grey[row, LEFT + 5 : LEFT + MAP : MAP // 125] < 128
        assert (dark == found.kept[layer, head]).all()


def test_many_tokens_to_a_pixel_are_averaged_and_few_repeated():
    values = np.array([1, 0, 0, 1, 1, 1, 0], bool)
    np.testing.assert_allclose(resample(values, 3), [1 / 2, 1 / 2, 2 / 3])
    assert resample(values[:3], 6).tolist() == [1, 1, 0, 0, 0, 0]
    bits = np.random.default_rng(0).random(131_072) < 0.1
    sizes = np.diff(np.append(np.arange(MAP) * bits.size // MAP, bits.size))
    assert (resample(bits, MAP) * sizes).sum() == pytest.approx(bits.sum())


# ---- Saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("picture.pdf", "picture.pdf: its name must end in .png or .html"),
        ("picture", "picture: its name must end in .png or .html"),
        ("folder.png", "folder.png: it is a folder"),
        ("missing/picture.html", "there is no folder"),
    ],
)
def test_a_path_that_cannot_be_written_is_one_clear_line(name, message, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises((fk.FastKVConfigError, fk.InputError), match=re.escape(message)) as error:
        random_explanation(1, 1, 3).save(tmp_path / name)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["folder.png"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("old")

    def fail(*_):
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk"):
            random_explanation(1, 1, 3).save(target)
    assert os.listdir(tmp_path) == ["page.html"] and target.read_text() == "old"
    random_explanation(1, 1, 3).save(str(target))
    assert os.listdir(tmp_path) == ["page.html"] and target.read_text().startswith("<!doctype html>")


def test_only_the_picture_needs_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    random_explanation(1, 1, 3).save(tmp_path / "page.html")
    with pytest.raises(fk.FastKVConfigError, match="needs matplotlib: pip install"):
        random_explanation(1, 1, 3).save(tmp_path / "picture.png")
    assert os.listdir(tmp_path) == ["page.html"]
