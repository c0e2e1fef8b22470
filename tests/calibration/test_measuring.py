"""Calibration: what it measures is what `prefill` and `generate` do, and its rules choose as they say."""

import dataclasses
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import fastkv_jax as fk
from examples import layers, model_a
from fastkv_jax.calibration import search, survey
from fastkv_jax.calibration.result import Calibration
from fastkv_jax.calibration.rules import Setting, best_answering, earliest_close, most_promising
from fastkv_jax.calibration.samples import Sample, digest, longest_run, make_samples
from fastkv_jax.chat_template import Rendering
from fastkv_jax.costs import layer_flops
from fastkv_jax.decoding import loop
from fastkv_jax.methods import presets
from fastkv_jax.methods.plan import effective_budgets
from fastkv_jax.prefilling.layers import leave, propagate, run_layers
from test_text import CHATML, small_tokenizer
from tolerances import LOGITS

calibrate = fk.calibrate
LAYERS, NEW = (0, 1, 2), 12
RATES = {"tsp_rate": 0.4, "retention_rate": 0.3}
GRID = {"window_sizes": (4, 8), "kernel_sizes": (3, 7)}
TRIED, OTHER = Setting(8, 7, "max"), Setting(4, 3, "max")
PROMPTS = [np.random.default_rng(n).integers(0, 128, n) for n in (140, 201, 255)]  # of one bucket
ENDS = (0, 3, 5)


def fastkv(setting: Setting, layer: int, **rates) -> fk.FastKV:
    return fk.FastKV(tsp_layer=layer, **{**RATES, **rates}, **setting._asdict())


def row(i: int):
    return *fk.pad_batch([PROMPTS[i]]), {"window_end": ENDS[i], "max_new_tokens": NEW}


@cache
def generated(i: int, method) -> tuple[int, ...]:
    tokens, start, options = row(i)
    return tuple(np.asarray(fk.generate(model_a(), tokens, start, method=method, **options).tokens)[0].tolist())


@cache
def read(i: int, method):
    tokens, start, options = row(i)
    return fk.prefill(model_a(), tokens, start, method=method, **options)


@cache
def samples() -> tuple[Sample, ...]:
    """The first answer is what full context says, the second what one setting says, the last stands in its prompt."""
    answers = generated(0, fk.FullKV())[1:4], generated(1, fastkv(TRIED, 0))[2:5], PROMPTS[2][60:67]
    return tuple(
        Sample(tuple(map(int, p)), end, tuple(map(int, a))) for p, end, a in zip(PROMPTS, ENDS, answers, strict=True)
    )


@cache
def found() -> Calibration:
    steps = []
    result = calibrate(
        model_a(), samples(), name="A", layers=LAYERS, **GRID, **RATES, finalists=1, max_new_tokens=NEW,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    total = 3 * (1 + len(LAYERS))
    assert steps == [(done, total) for done in range(1, total + 1)]
    return result


def spans() -> list[tuple[int, int, int]]:
    return [(i, *span) for i, span in enumerate(found().spans) if span is not None]


# ---- What is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "layer"), [(TRIED, 0), (TRIED, 2), (OTHER, 1)])
def test_the_share_let_through_is_what_prefill_propagates(setting: Setting, layer: int):
    shares = []
    for i, first, stop in spans():
        passed = np.asarray(read(i, fastkv(setting, layer)).propagated)
        shares.append(np.isin(np.arange(first, stop), passed).mean())
    assert found().propagated[found().settings.index(setting), layer] == pytest.approx(np.mean(shares), abs=1e-12)


def test_the_shares_let_through_differ_between_settings_and_layers():
    assert found().propagated.shape == (4, 4)
    assert all(len(np.unique(found().propagated, axis=axis)) > 1 for axis in (0, 1))
    assert 0 < found().propagated.mean() < 1


@pytest.mark.parametrize("setting", [TRIED, OTHER], ids=str)
def test_the_share_kept_is_what_each_layers_heads_keep_of_the_full_context(setting: Setting):
    alone = fk.SnapKV(retention_rate=RATES["retention_rate"], **setting._asdict())
    place = found().settings.index(setting)
    for layer in range(4):
        for method in (alone, fastkv(TRIED, 2)) if setting == TRIED and layer <= 2 else (alone,):
            heads = []
            for i, first, stop in spans():
                kept = layers(read(i, method).cache)[layer].positions[0]
                heads.append([np.isin(np.arange(first, stop), head).mean() for head in kept])
            assert found().kept_mean[place, layer] == pytest.approx(np.mean(heads), abs=1e-12)
            assert found().kept_best[place, layer] == pytest.approx(np.max(heads, axis=1).mean(), abs=1e-12)


def test_the_overlap_is_that_of_the_sets_prefill_propagates():
    shares = []
    for i, end in enumerate(ENDS):
        one, other = (set(np.asarray(read(i, fastkv(TRIED, layer)).propagated)[0].tolist()) for layer in (0, 2))
        fixed = set(range(len(PROMPTS[i]) - TRIED.window_size - end, len(PROMPTS[i]))) | {-1}
        shares.append(len((one & other) - fixed) / len(one - fixed))
    overlap = found().overlap[found().settings.index(TRIED)]
    assert overlap[0, 2] == overlap[2, 0] == pytest.approx(np.mean(shares), abs=1e-6)
    np.testing.assert_allclose(np.diag(overlap), 1)


def hidden(logits) -> np.ndarray:
    """The final hidden state that the head, which has more rows than columns, made these logits of."""
    head = model_a().lm_head
    assert head is not None
    return np.linalg.lstsq(np.asarray(head[...], np.float64), np.asarray(logits, np.float64)[0], rcond=None)[0]


@pytest.mark.parametrize("layer", [0, 2])
def test_the_distance_is_that_of_the_hidden_states_behind_prefills_logits(layer: int):
    distances = []
    for i in range(len(PROMPTS)):
        full, other = (hidden(read(i, method).logits) for method in (fk.FullKV(), fastkv(TRIED, layer)))
        distances.append(((full - other) ** 2).sum() / (full**2).sum())
    assert found().finalists == (TRIED,)
    assert found().distance[0, layer] == pytest.approx(np.mean(distances), abs=LOGITS) and np.mean(distances) > 0.01


def test_right_answers_are_those_that_generate_gives():
    def right(method):
        said = zip(samples(), (generated(i, method) for i in range(len(PROMPTS))), strict=True)
        return sum(longest_run(made, sample.answer)[1] == len(sample.answer) for sample, made in said)

    assert found().right_full == right(fk.FullKV()) == 1 and found().answers == 3
    assert [found().right[0, layer] for layer in (0, 2)] == [right(fastkv(TRIED, layer)) for layer in (0, 2)] == [1, 0]
    assert found().decided_by == "answers" and (found().tsp_layer, found().right_chosen) == (0, 1)


def one_setting(samples, layers=LAYERS, **options):
    """A calibration of `TRIED` alone: after `found`, hardly anything is left to compile."""
    given = {"window_sizes": [8], "kernel_sizes": [7], "max_new_tokens": NEW, **RATES, **options}
    return calibrate(model_a(), samples, layers=layers, **given)


def test_with_all_tokens_the_distance_is_zero_at_every_layer():
    all_tokens = one_setting(samples(), tsp_rate=1.0)
    assert all_tokens.distance.shape == (1, 3) and all_tokens.distance.max() < 1e-10
    assert all_tokens.by_distance == 0 and all_tokens.flops_share == 1
    assert (all_tokens.propagated == 1).all() and all_tokens.kept_mean.mean() < 1


def test_options_are_described_as_they_are_taken():
    described = search.CalibrationOptions
    assert [field.name for field in dataclasses.fields(search.Search)] == list(described.__annotations__)
    for name in described.__annotations__:
        assert re.search(rf"^ +{name}: ", described.__doc__, re.MULTILINE), name


def test_the_candidates_are_the_middle_half_unless_given():
    assert [search._middle(n) for n in (30, 4, 2)] == [tuple(range(7, 23)), (1, 2), (0,)]
    assert one_setting(samples()[2:], None).layers == (1, 2)


def test_candidate_layers_compile_nothing_of_their_own():
    def programs():
        every = run_layers, propagate, leave, survey._look, loop._decode_chunk
        return [program._cache_size() for program in every]

    one_setting(samples()[2:], (1,))
    before = programs()
    one_setting(samples()[2:], (0, 1, 2))
    assert programs() == before


def test_the_cost_is_counted_from_shapes():
    c = model_a().config
    shares = []
    for prompt, end in zip(PROMPTS, ENDS, strict=True):
        runs = effective_budgets(found().method(), len(prompt), end, 4)
        flops = sum((run.last - run.first + 1) * layer_flops(c, run.tokens) for run in runs)
        shares.append(flops / (4 * layer_flops(c, len(prompt))))
    assert found().flops_share == pytest.approx(np.mean(shares))


def test_the_prefill_is_timed_when_asked_for():
    assert found().seconds is None
    timed = one_setting(samples()[2:], [1], timed=True)
    assert timed.seconds is not None and all(0 < s < 60 for s in timed.seconds)


# ---- What is chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "tolerance", "layer"),
    [
        ([1.0, 0.5, 0.2, 0.109, 0.1], 0.1, 13),
        ([1.0, 0.5, 0.2, 0.109, 0.1], 0.0, 14),  # the paper's rule as written: the last
        ([1.0, 0.5, 0.2, 0.109, 0.1], 1.0, 12),
        ([1.0, 0.1, 0.5, 0.3, 0.1], 0.0, 11),
        ([0.1, 0.4, 0.3, 0.2, 0.1], 0.1, 10),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0.1, 10),
    ],
)
def test_eq_3_takes_the_earliest_layer_within_the_tolerance(distance, tolerance, layer):
    assert earliest_close(range(10, 15), np.array(distance), tolerance) == layer


SMALL, LONG, DEEP = Setting(8, 7, "max"), Setting(32, 7, "max"), Setting(8, 21, "max")


@pytest.mark.parametrize(
    ("right", "wanted", "chosen"),
    [
        ([[2, 8, 5, 8], [1, 7, 8, 8], [0, 8, 8, 8]], 8, (11, SMALL)),
        ([[2, 7, 5, 8], [1, 8, 8, 8], [0, 8, 8, 8]], 8, (11, LONG)),
        ([[0, 0, 0, 9], [0, 0, 9, 9], [8, 8, 8, 8]], 8, (10, DEEP)),  # more than full context is as good
        ([[2, 3, 6, 5], [1, 6, 6, 5], [0, 6, 6, 5]], 8, (11, LONG)),  # nobody answers all: the most
    ],
)
def test_the_earliest_layer_then_the_smallest_kernel_and_window_that_answers_enough(right, wanted, chosen):
    layers, counts = (10, 11, 12, 13), np.array(right)
    for shares in (np.full((3, 4), 0.9), np.full((3, 4), np.nan)):
        assert best_answering(layers, (SMALL, LONG, DEEP), counts, wanted, shares) == chosen
        assert best_answering(layers, (DEEP, LONG, SMALL), counts[::-1], wanted, shares) == chosen


def test_right_answers_that_were_cut_count_as_luck():
    right = np.array([[8, 8, 8, 2], [8, 7, 8, 8]])
    shares = np.array([[0.8, 0.97, 0.985, 1.0], [0.6, 1.0, 0.99, 1.0]])
    assert best_answering((10, 11, 12, 13), (SMALL, LONG), right, 8, shares) == (12, SMALL)
    assert best_answering((10, 11, 12, 13), (SMALL, LONG), right, 8, shares[:, ::-1]) == (10, SMALL)


def test_the_most_promising_settings_pass_tsp_and_are_held_by_a_later_head():
    passes = np.array([[0.0, 0.5, 0.5, 0.9], [0.0, 0.9, 0.9, 0.9], [0.0, 0.903, 0.903, 0.9], [0.0, 1.0, 1.0, 0.9]])
    held = np.array([[1.0] * 4, [1.0] * 4, [1.0] * 4, [1.0, 1.0, 0.2, 0.2]])
    assert most_promising(passes, held, (1, 2)) == [1, 2, 0, 3]  # 0.903 is no better than 0.9, and comes later


def test_without_right_answers_the_distance_decides():
    other = int(next(t for t in range(128) if t not in generated(2, fk.FullKV())))
    lost = dataclasses.replace(samples()[2], answer=(other,) * 3)
    for sample in (lost, dataclasses.replace(lost, answer=())):
        one = one_setting([sample])
        assert one.decided_by == "distance" and one.right_full == 0 and one.answers == bool(sample.answer)
        assert one.tsp_layer == one.by_distance == earliest_close(LAYERS, one.distance[0], 0.1)


# ---- Samples --------------------------------------------------------------------------------------------------------


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


# ---- Errors ---------------------------------------------------------------------------------------------------------

ONE = {"layers": (1,), "window_sizes": (4,), "kernel_sizes": (3,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 3)}, "tsp_layer 3 is outside 0…2 for a 4-layer model"),
        ({"layers": (-1,)}, "tsp_layer must be an integer >= 0, got -1"),
        ({"layers": ()}, "layers must hold at least one each, got none"),
        ({"kernel_sizes": ()}, "window_sizes, kernel_sizes and poolings must hold at least one each, got none"),
        ({"kernel_sizes": (4,)}, "kernel_size must be an odd integer >= 1, got 4"),
        ({"window_sizes": (0,)}, "window_size must be an integer >= 1, got 0"),
        ({"poolings": ("sum",)}, "pooling must be 'max' or 'avg', got 'sum'"),
        ({"tsp_rate": 1.5}, "tsp_rate must be in (0, 1], got 1.5"),
        ({"retention_rate": 0}, "retention_rate must be in (0, 1], got 0"),
        ({"tolerance": -0.1}, "tolerance must be >= 0, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance must be >= 0, got nan"),
        ({"finalists": 0}, "finalists must be an integer >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"samples": ()}, "samples must hold at least one each, got none"),
        ({"samples": (Sample((1, 2, 3)), Sample((200,) * 16))},
         "sample 2: token id 200 at [0, 0] is outside the vocabulary of 128"),
        ({"samples": (Sample((1, 2, 3), 3),)}, "sample 1: window_end 3 leaves no question in row 0 (3 tokens)"),
        ({"samples": (Sample((1, 2, 3)),), "kernel_sizes": (3, 5)},
         "no sample has an answer: 2 settings cannot be compared, give one window and one kernel"),
        ({"samples": (Sample((1, 2, 3), 0, (4,)),), "kernel_sizes": (3, 5)},
         "no answer stands in its prompt: 2 settings cannot be compared, give one window and one kernel"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_runs(options, message, monkeypatch):
    monkeypatch.setattr("fastkv_jax.calibration.measuring.survey", lambda *_: pytest.fail("something ran"))
    given = {**ONE, **options}
    with pytest.raises((fk.FastKVConfigError, fk.InputError)) as error:
        calibrate(model_a(), given.pop("samples", (Sample((1, 2, 3), 0, (2,)),)), **given)
    assert str(error.value) == message


# ---- The preset and the picture -------------------------------------------------------------------------------------


def test_a_saved_preset_is_one(tmp_path, monkeypatch):
    found().save(tmp_path / "mine.yaml")
    configs = tmp_path / "configs"
    (configs / "methods").mkdir(parents=True)
    (configs / "models").mkdir()
    shutil.copy(tmp_path / "mine.yaml", configs / "models")
    by_path = presets.load(str(tmp_path / "mine.yaml"))
    chosen = dataclasses.replace(found().method(), min_prompt_to_compress=512)
    settings = list(found().preset())
    monkeypatch.setattr(presets, "_configs", lambda: configs)
    for preset in (by_path, presets.load("mine"), presets.for_model("mine")):
        assert (preset.name, preset.window_end) == ("mine", "question")
        assert presets.build("fastkv", preset, {}, 4) == chosen
    shipped = Path(__file__).parents[2] / "configs" / "models" / "smollm2-135m.yaml"
    assert settings == list(yaml.safe_load(shipped.read_text())["preset"])


def test_a_saved_preset_brings_its_evidence(tmp_path):
    found().save(tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    saved = yaml.safe_load(text)["calibration"]
    assert text.startswith(f"# A: {found().right_chosen} of 3 answers right, full context 1; ")
    assert saved == found().evidence() and saved["samples_sha256"] == found().digest
    for setting, distance in zip(found().finalists, found().distance, strict=True):
        np.testing.assert_allclose(saved["finalists"][str(setting)]["distance"], distance, rtol=1e-3)
    assert (saved["layers"], saved["right_full"], saved["tolerance"]) == ([0, 1, 2], 1, 0.1)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_samples_are_rendered_as_the_template_is_told():
    tokenizer, rows = small_tokenizer(CHATML + "{{ style }}"), [{"prompt": "hello", "answer": "ll"}]
    (plain,), (terse,) = (make_samples(tokenizer, rows, Rendering(arguments=given)) for given in ({}, {"style": "a"}))
    assert terse.token_ids[:-1] == plain.token_ids and terse.window_end == plain.window_end + 1


def test_the_digest_tells_samples_apart():
    one = samples()[0]
    others = [dataclasses.replace(one, window_end=1), dataclasses.replace(one, answer=(1,)), samples()[1]]
    assert len({digest([sample]) for sample in [one, *others]}) == 4
    assert digest(samples()) == found().digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "has no usable section 'preset'"),
        ("other: 1", "has no usable section 'preset'"),
        ("preset: {window_end: x}", "window_end must be 'question' or 'prompt', got 'x'"),
        ("preset: {window_end: prompt, kernel: 3}", "kernel is not a setting; there are: "),
    ],
)
def test_a_preset_file_that_is_none_is_named(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(fk.FastKVConfigError) as error:
        presets.load(str(tmp_path / "mine.yaml"))
    assert message in str(error.value) and str(tmp_path / "mine.yaml") in str(error.value)


def test_the_picture_is_drawn_with_and_without_answers(tmp_path):
    nothing = np.full_like(found().propagated, np.nan)
    blank = dataclasses.replace(found(), answers=0, propagated=nothing, kept_mean=nothing, kept_best=nothing)
    pictures = []
    for result in (found(), blank):
        result.plot(tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            pictures.append(np.asarray(picture.convert("L")))
        assert pictures[-1].shape == (984, 1620)
    assert (pictures[0] != pictures[1]).mean() > 0.01


def test_a_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    for write, suffix in ((found().save, ".yaml"), (found().plot, ".png")):
        with pytest.raises(fk.FastKVConfigError, match=f"its name must end in {suffix}"):
            write(tmp_path / "x.txt")
        with pytest.raises(fk.InputError, match="there is no folder"):
            write(tmp_path / "no" / f"x{suffix}")
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(fk.FastKVConfigError, match=r"pip install 'fastkv-jax\[explain\]'"):
        found().plot(tmp_path / "x.png")
