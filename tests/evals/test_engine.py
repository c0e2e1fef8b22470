"""Answers of a model with a real tokenizer: the same in a batch as alone, cut as asked, with their costs."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import fastkv_jax as fk
from fastkv_jax import text
from fastkv_jax.evals import prompts
from fastkv_jax.evals.engine import ModelEngine, OnePass
from fastkv_jax.evals.protocols import FASTKV, UPSTREAM
from fastkv_jax.evals.sample import Sample
from fastkv_jax.evals.suites import needle_grid

METHOD = fk.FastKV(tsp_layer=2, tsp_rate=0.5, retention_rate=0.5, window_size=16, kernel_size=21,
                   min_prompt_to_compress=0)  # fmt: skip
TIMES = ("ttft_s", "token_s", "compiled", "rows")


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return fk.load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def engine(load_short, tokenizer):
    return ModelEngine(load_short(), tokenizer, METHOD, 512)


@pytest.fixture(scope="module")
def needles(tokenizer):
    count = lambda words: len(text.continue_with(tokenizer, words))  # noqa: E731
    return needle_grid.samples([250, 200], [0, 60], count, template_tokens=40, max_new_tokens=12)


def without_times(answers):
    return [{name: value for name, value in answer.items() if name not in TIMES} for answer in answers]


def test_a_ragged_batch_answers_as_each_row_alone(engine, needles):
    batch = [engine.encode(sample) for sample in needles]
    assert len({len(prompt.tokens) for prompt in batch}) > 1
    together = engine.answer(batch)
    alone = [engine.answer([prompt])[0] for prompt in batch]
    assert without_times(together) == without_times(alone)
    for sample, answer in zip(needles, together, strict=True):
        assert answer["finish"] in ("stop", "length") and 0 < answer["new_tokens"] <= sample.max_new_tokens
        assert 0.4 < answer["kv_bytes"] < 0.6 and 0.5 < answer["prefill_flops"] < 0.9
        assert answer["ttft_s"] > 0 and answer["token_s"] > 0
    assert engine.answer(batch)[0]["compiled"] == 0


def test_one_pass_answers_as_each_engine_alone(engine, needles):
    rest = Sample("perplexity", "0", needles[0].context, "", (" The boats come back at night.",), 0, chat=False)
    settings = {"retention_rate": 0.3, "window_size": 16, "min_prompt_to_compress": 0}
    methods = (fk.SnapKV(**settings, kernel_size=21), fk.AdaKV(**settings))
    engines = tuple(dataclasses.replace(engine, method=method) for method in methods)
    for samples in (needles[:2], [rest]):
        batch = [engine.encode(sample) for sample in samples]
        together = OnePass(engines).answer_all(batch)
        for mine, one in zip(together, engines, strict=True):
            alone = one.answer(batch)
            for answer, other in zip(mine, alone, strict=True):
                assert answer.pop("nll", 0) == pytest.approx(other.pop("nll", 0), rel=1e-4)
            assert without_times(mine) == without_times(alone)
            assert "ttft_s" in alone[0] and "ttft_s" not in mine[0]  # the seconds are of all methods together
            assert ("token_s" in mine[0]) == (samples != [rest])
    assert together[0][0]["kv_bytes"] == pytest.approx(0.3, abs=0.02)


def test_an_answer_ends_before_its_stop(engine, needles):
    (whole,) = engine.answer([engine.encode(needles[0])])
    stop = whole["prediction"][5:8]
    (cut,) = engine.answer([engine.encode(dataclasses.replace(needles[0], stop=(stop,)))])
    assert cut["prediction"] == whole["prediction"][: whole["prediction"].index(stop)] and cut["finish"] == "stop"


def test_full_context_says_what_generate_says(engine, needles):
    full = dataclasses.replace(engine, method=fk.FullKV())
    prompt = full.encode(needles[0])
    made = fk.generate(full.model, [prompt.tokens], method=fk.FullKV(), max_new_tokens=12)
    ids = np.asarray(made.tokens)[0][: int(made.lengths[0])]
    (answer,) = full.answer([prompt])
    assert answer["prediction"] == full.tokenizer.decode(ids, skip_special_tokens=True)
    assert answer["kv_bytes"] == answer["prefill_flops"] == 1.0


def test_the_likelihood_of_a_text_is_that_of_its_logits(engine):
    full = dataclasses.replace(engine, method=fk.FullKV())
    words, rest = "The harbour lies in the east. The boats go out at dawn", " and they come back at night."
    sample = Sample("perplexity", "0", words, "", (rest,), 0, chat=False)
    (answer,) = full.answer([full.encode(sample)])
    before, after = (text.continue_with(full.tokenizer, part) for part in (words, rest))
    found = 0.0
    for i in range(1, len(after)):
        logits = fk.prefill(full.model, [[*before, *after[:i]]], method=fk.FullKV(), max_new_tokens=0).logits[0]
        found -= float(jax.nn.log_softmax(logits)[after[i]])
    assert answer["nll"] == pytest.approx(found / (len(after) - 1), abs=1e-4) and answer["prediction"] == ""


def test_query_agnostic_compression_never_sees_the_question(engine, needles):
    agnostic = dataclasses.replace(engine, query_aware=False, method=fk.FullKV())
    prompt = agnostic.encode(needles[0])
    context, question = agnostic._split(prompt)
    assert [*context, *question] == prompt.tokens
    assert needles[0].question.strip()[-20:] in agnostic.tokenizer.decode(question)
    assert needles[0].question.strip()[-20:] not in agnostic.tokenizer.decode(context)
    full = dataclasses.replace(engine, method=fk.FullKV())
    assert agnostic.answer([prompt])[0]["prediction"] == full.answer([prompt])[0]["prediction"]


@pytest.fixture(scope="module")
def spread(engine, load_short):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    return dataclasses.replace(engine, model=load_short(mesh))


def test_on_a_mesh_every_device_has_rows(engine, spread, needles):
    batch = [engine.encode(sample) for sample in needles[:1]]
    assert without_times(spread.answer(batch)) == without_times(engine.answer(batch))


def test_one_pass_on_a_mesh_keeps_8_bits_and_answers_as_each_engine_alone(spread, needles):
    settings = {"retention_rate": 0.3, "window_size": 16, "min_prompt_to_compress": 0}
    engines = tuple(
        dataclasses.replace(spread, method=method, kv_dtype="int8")
        for method in (fk.FullKV(), fk.SnapKV(**settings, kernel_size=21))
    )
    batch = [spread.encode(needles[0])]
    together = OnePass(engines).answer_all(batch)
    for mine, one in zip(together, engines, strict=True):
        assert without_times(mine) == without_times(one.answer(batch)) and len(mine) == 1
    assert together[0][0]["kv_bytes"] == pytest.approx((64 + 2) / (4 * 64), rel=0.01)  # a byte each, and a scale


def test_what_ends_an_answer_is_what_the_protocol_names(engine, tokenizer):
    models = engine.model.config.stop_tokens
    assert engine._ends() == models == dataclasses.replace(engine, protocol=UPSTREAM)._ends()
    assert dataclasses.replace(engine, protocol=UPSTREAM, published_ends=(5,))._ends() == (5,)
    assert dataclasses.replace(engine, protocol=FASTKV)._ends() == (tokenizer.eos_token_id,)
    nameless = SimpleNamespace(eos_token_id=None)  # a tokenizer that names no end
    assert dataclasses.replace(engine, protocol=FASTKV, tokenizer=nameless)._ends() == models


# --------------------------------------------------------------------------------------------------------- prompts

LONG = Sample("samsum", "0", "word " * 300, "Who came first?", ("x",), 16, stop=("\n",))


def test_what_is_too_long_loses_its_middle(tokenizer):
    whole, cut = prompts.encode(tokenizer, LONG, 1000), prompts.encode(tokenizer, LONG, 100)
    assert len(whole.tokens) == whole.whole == cut.whole > 100 == len(cut.tokens)
    assert cut.tokens[:20] == whole.tokens[:20] and cut.tokens[-20:] == whole.tokens[-20:]
    assert cut.window_end == whole.window_end > 0
    with pytest.raises(fk.InputError, match="the template alone has"):
        prompts.encode(tokenizer, LONG, 10)


def test_upstream_cuts_before_the_template_and_fastkv_after(tokenizer):
    upstream, fastkv = (prompts.encode(tokenizer, LONG, 100, protocol) for protocol in (UPSTREAM, FASTKV))
    said = [tokenizer.decode(found.tokens) for found in (upstream, fastkv)]
    assert "<|im_start|>user" in said[0] and said[0].endswith("<|im_start|>assistant\n")
    assert "<|im_start|>" not in said[1] and "user\nword" in said[1].replace("user\n ", "user\n")
    assert all("Who came first?" in text for text in said)
    assert upstream.window_end > 0 == fastkv.window_end
    assert max(len(upstream.tokens), len(fastkv.tokens)) <= 100


def test_where_a_protocol_has_it_an_answer_does_not_end_before_it_begins(engine, tokenizer):
    result = fk.prefill(engine.model, [[1, 2, 3]], method=fk.FullKV(), max_new_tokens=1)
    batch = [prompts.encode(tokenizer, LONG, 400)]
    newline = text.continue_with(tokenizer, "\n")[-1]
    for protocol, banned in ((None, set()), (UPSTREAM, {newline, *engine.model.config.stop_tokens}),
                             (FASTKV, {newline, tokenizer.eos_token_id})):  # fmt: skip
        logits = dataclasses.replace(engine, protocol=protocol)._with_a_first_token(result, batch).logits[0]
        assert set(np.flatnonzero(np.asarray(logits) < -1e29).tolist()) == banned
