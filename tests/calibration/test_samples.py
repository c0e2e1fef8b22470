"""Questions, answers, and where those stand in the prompt."""

import pytest

import fastkv_jax as fk
from fastkv_jax.calibration.samples import Sample, longest_run, make_samples
from fastkv_jax.chat_template import Rendering
from test_text import CHATML, small_tokenizer


@pytest.mark.parametrize(
    ("ids", "wanted", "run"),
    [
        ([1, 2, 3, 4, 5], [3, 4], (2, 2)),
        ([3, 9, 3, 4, 9, 3, 4, 5], [3, 4, 5], (5, 3)),
        ([3, 4, 0, 3, 4], [3, 4], (0, 2)),
        ([0, 4, 5, 0], [3, 4, 5], (1, 2)),
        ([7, 7, 7], [7, 7], (0, 2)),
        ([1, 2], [3], (0, 0)),
        ([1, 2], [], (0, 0)),
    ],
)
def test_the_longest_run(ids, wanted, run):
    assert longest_run(ids, wanted) == run


def test_an_answer_stands_in_the_prompt_if_half_of_it_does():
    assert Sample((1, 2, 3, 4), 0, (9, 9, 2, 3)).span == (1, 3)
    assert Sample((1, 2, 3, 4), 0, (9, 9, 9, 2, 3)).span is None
    assert Sample((1, 2, 3, 4)).span is None


def test_samples_from_text(smollm2_path):
    tokenizer = fk.load_tokenizer(smollm2_path)
    prompt = "The number is 4072915. The lamp is kept in the cellar of the old bakery. Where is it?"
    rows = [{"prompt": prompt, "answer": a} for a in ("4072915", "cellar of the old bakery")]
    rows.append({**rows[0], "prefill": "The number is"})
    number, phrase, begun = made = make_samples(tokenizer, rows)
    for sample, row_ in zip(made, rows, strict=True):
        assert sample.span is not None
        first, stop = sample.span
        assert tokenizer.decode(sample.token_ids[first:stop]).strip() == row_["answer"] and stop - first == len(
            sample.answer
        )
        before = len(sample.token_ids) - sample.window_end
        assert tokenizer.decode(sample.token_ids[:before]).endswith("Where is it?")
    assert number.token_ids == phrase.token_ids and len(begun.token_ids) > len(number.token_ids)
    tail = tokenizer.decode(begun.token_ids[-begun.window_end :])
    assert tail == "<|im_end|>\n<|im_start|>assistant\nThe number is"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "x"}, "row 2: prompt must be a text, found None"),
        ({"prompt": " ", "answer": "x"}, "row 2: prompt must be a text, found ' '"),
        ({"prompt": "x", "answer": 3}, "row 2: answer must be a text, found 3"),
        ({"prompt": "x", "answer": "y", "prefill": []}, "row 2: prefill must be a text, found []"),
    ],
)
def test_a_bad_row_is_named(row, message, smollm2_path):
    with pytest.raises(fk.InputError) as error:
        make_samples(fk.load_tokenizer(smollm2_path), [{"prompt": "x", "answer": "y"}, row])
    assert str(error.value) == message


def test_samples_are_rendered_as_the_template_is_told():
    tokenizer, rows = small_tokenizer(CHATML + "{{ style }}"), [{"prompt": "hello", "answer": "ll"}]
    (plain,), (terse,) = (make_samples(tokenizer, rows, Rendering(arguments=given)) for given in ({}, {"style": "a"}))
    assert terse.token_ids[:-1] == plain.token_ids and terse.window_end == plain.window_end + 1
