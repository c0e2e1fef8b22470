"""Prompts made here fit, hold their answers, and are the same everywhere."""

import re
from collections import Counter

import pytest

from fastkv_jax.errors import InputError
from fastkv_jax.evals.suites import ruler
from fastkv_jax.evals.suites import ruler_generator as generator
from fastkv_jax.evals.suites.ruler import PAPER, TASKS
from fastkv_jax.evals.texts import haystack, words

LENGTHS = (1024, 4096)


def count(text: str) -> int:
    """Words and marks: a tokenizer that every machine has."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def rows(name: str, length: int = 1024, samples: int = 3, **options):
    return list(generator.rows(name, length, samples, count, **options))


# -------------------------------------------------------------------------------------------------------- every task


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_fill_the_length_and_never_exceed_it(name: str, length: int):
    for row in rows(name, length, template_tokens=20):
        used = count(row["input"] + row["answer_prefix"]) + TASKS[name].max_new_tokens + 20
        assert row["length"] == used <= length
        assert used > 0.93 * length


@pytest.mark.parametrize("name", PAPER)
def test_rows_become_samples_whose_answers_stand_in_the_context(name: str):
    made = rows(name)
    for row, sample in zip(made, ruler.from_rows(made, name, "1024"), strict=True):
        assert sample.context + sample.question == row["input"] and sample.prefill == row["answer_prefix"]
        before, after, prefix = TASKS[name].template.split("{context}")[0], sample.question, sample.prefill
        assert sample.context.startswith(before.split("{")[0])
        assert after.startswith("\n") and prefix.startswith(" ")
        assert all(answer in sample.context for answer in sample.answers)
        assert not any(answer in sample.question + sample.prefill for answer in sample.answers)
        assert TASKS[name].score(sample, ", ".join(sample.answers)).score == 1
        assert TASKS[name].score(sample, "I do not know").score == 0


@pytest.mark.parametrize("name", PAPER)
def test_a_length_too_small_is_named_with_the_one_that_does(name: str):
    with pytest.raises(InputError, match=f"{name} does not fit into length 16: the least is .* tokens") as error:
        generator.rows(name, 16, 1, count)
    least = int(re.findall(r"([\d,]+) tokens", str(error.value))[0].replace(",", ""))
    assert rows(name, least, 1)
    with pytest.raises(InputError, match="does not fit"):
        generator.rows(name, least - 1, 1, count)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("name", PAPER)
def test_it_ends_where_a_tokenizer_finds_next_to_nothing(name: str, tokens: int):
    assert len(list(generator.rows(name, 300, 2, lambda text: tokens))) == 2


@pytest.mark.parametrize("name", PAPER)
def test_it_ends_where_a_tokenizer_finds_too_much(name: str):
    with pytest.raises(InputError, match=f"{name} does not fit into length 300: the least is 1,000,000,"):
        list(generator.rows(name, 300, 2, lambda text: 10**9))


def test_it_ends_when_a_later_sample_takes_more():
    calls = []

    def growing(text: str) -> int:
        calls.append(text)
        return count(text) + 10 * len(calls)

    with pytest.raises(InputError, match=r"niah_single_1 sample \d+ does not fit: the least is"):
        list(generator.rows("niah_single_1", 600, 50, growing))


# The content of the files. They change when a word list, the chronicle or a rule does; results from before and after
# are then of different prompts.
DIGESTS = {
    "niah_single_1": "4a8d87045efb647121944283d6167963ca0e08b6687b208726d47ee7797b0d7c",
    "niah_single_2": "93c4ccddc02196e1d4b4861c73beb7d529f766cd090f11e1d5957ca806a3003e",
    "niah_single_3": "af262b280b2267d25767664f72ada2c8178d8a2bacedd5ebc029fbc34d1b1a87",
    "niah_multikey_1": "4dd988aaf308b1824dd45f8140ecab96c2ba7b003790c9f1b5a4ac5b3781cf00",
    "niah_multikey_2": "f9b446739cd78c6d360e978f6afa416cef927d6c3a3b6652e606ec30318cbc7c",
    "niah_multikey_3": "7024c7c0569f9f567785df1ba822a063baae4652a3f48218f3428645b8dd4477",
    "niah_multivalue": "89f32633a783e610727274d9dc127925feda02ed8a70bcb7c8f41c7c903ddb45",
    "niah_multiquery": "1b4dc86179e35b7195fe045488e6af273972e0a601a1511696b11fc4b9e54296",
    "vt": "a849842d4eed7afe3790ff389f888c845ed510f71924756e59d3ad45a25ad8bf",
    "cwe": "8f279d95c872d899223bd86f68a1d9944ae4f97c5673b1b8beda633e87118504",
    "fwe": "8ddac4eeccc875c950f9fc1a5dc7af047a64ecb33cb1e5b013f3cac8ab17a5e3",
}


@pytest.mark.parametrize("name", PAPER)
def test_rows_are_the_same_everywhere(name: str, tmp_path):
    made = rows(name)
    assert generator.digest(made) == DIGESTS[name]
    path = tmp_path / "x.jsonl"
    path.write_text(generator.json_lines(made), encoding="utf-8")
    assert ruler.read(path, name) == ruler.from_rows(made, name)


def test_another_seed_gives_other_rows():
    for name in PAPER:
        assert rows(name, seed=1)[0]["outputs"] != rows(name, seed=2)[0]["outputs"]


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_about_documents_cannot_be_made(name: str):
    with pytest.raises(InputError, match=f"{name} cannot be generated: give a file of NVIDIA's generator"):
        generator.rows(name, 4096, 1, count)


def test_more_words_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr(words, "COUNT", 200)
    with pytest.raises(InputError, match="cwe cannot fill length 9,000: there are words for [0-9],[0-9]{3} tokens"):
        generator.rows("cwe", 9000, 1, count)


# --------------------------------------------------------------------------------------------------------- by the task


def needles(text: str) -> list[tuple[str, str]]:
    return re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)


@pytest.mark.parametrize(("name", "hidden", "asked"), [
    ("niah_single_1", 1, 1), ("niah_single_2", 1, 1), ("niah_single_3", 1, 1), ("niah_multikey_1", 4, 1),
    ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4),
])  # fmt: skip
def test_needles_in_text(name: str, hidden: int, asked: int):
    for row in rows(name):
        found = needles(row["input"])
        assert len(found) == len({value for _, value in found}) == hidden
        assert len(row["outputs"]) == asked
        keys = {key for key, value in found if value in row["outputs"]}
        assert all(key in row["answer_prefix"] for key in keys)
        assert {value for key, value in found if key in keys} == set(row["outputs"])


@pytest.mark.parametrize(("name", "form"), [("niah_multikey_2", r"\w+-\w+"), ("niah_multikey_3", r"[0-9a-f-]{36}")])
def test_needles_among_needles(name: str, form: str):
    for row in rows(name):
        found = dict(needles(row["input"]))
        assert len(found) == len(needles(row["input"])) > 20 and all(re.fullmatch(form, key) for key in found)
        (key,) = [key for key in found if key in row["answer_prefix"]]
        assert row["outputs"] == [found[key]]


def test_chains_of_variables():
    for row in rows("vt"):
        example, text = row["input"].split("\n\nMemorize")
        assert set(row["outputs"]).isdisjoint(re.findall(r"[A-Z]{3,}", example))
        value = re.search(r"assigned the value (\d{5}) in the text above\.$", text)
        assert value is not None and value[1] not in example
        steps = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)", text, re.MULTILINE)
        assert [name for name, _ in steps] == row["outputs"] and len(set(row["outputs"])) == 5
        assert [given for _, given in steps] == [value[1], *row["outputs"][:-1]]
        assert re.search(r"they are:  [A-Z]{3}( [A-Z]{3}){4}$", example)


@pytest.mark.parametrize(
    ("length", "common", "rare", "form"),
    [(1024, 6, 1, "[a-z]+"), (4096, 30, 3, "[a-z]+"), (16384, 30, 3, "[a-z]+-[a-z]+")],
)
def test_common_words(length: int, common: int, rare: int, form: str):
    for row in rows("cwe", length, template_tokens=30):  # the template does not make 4,096 a short length
        listed = re.findall(rf"(\d+)\. ({form})(?![^\s])", row["input"].rsplit("most often.\n", 1)[1])
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        times = Counter(word for _, word in listed)
        assert {times.pop(answer) for answer in row["outputs"]} == {common} and set(times.values()) == {rare}
        example = row["input"].rsplit("most often.\n", 1)[0]
        assert not any(answer in example for answer in row["outputs"]) and len(row["outputs"]) == 10


@pytest.mark.parametrize("length", [280, 500, 1024, 4096])
def test_frequent_words(length: int):
    for row in rows("fwe", length, 2):
        text = row["input"].split("coded words. ")[1].split("\nQuestion")[0].split()
        ranked = Counter(text).most_common()
        assert ranked[0][0] == "..." and [word for word, _ in ranked[1:4]] == row["outputs"]
        numbers = [times for _, times in ranked] + [0]
        assert numbers[1] > numbers[2] > numbers[3] > numbers[4]


def test_essays_of_the_user_s(tmp_path):
    with pytest.raises(InputError, match="there are no .txt files with words in it"):
        rows("niah_single_2", essays=tmp_path)
    (tmp_path / "b.txt").write_text("Second file. \xe9t\xe9.")
    (tmp_path / "a.txt").write_text("First  file.\nIt is short.")
    row = rows("niah_single_2", essays=tmp_path)[0]
    words_only = re.sub(r"One of .*?\d\. ?", "", row["input"].split("afterwards.\n")[1])
    assert words_only.startswith("First file. It is short. Second file. \xe9t\xe9. First file.")


# --------------------------------------------------------------------------------------------------- what it is made of


def test_no_word_is_a_part_of_another():
    made = [words.word(i) for i in range(words.COUNT)]
    assert len(set(made)) == words.COUNT > 80_000
    first, second = (list({word.split("-")[i] for word in made}) for i in (0, 1))
    assert not [one for one in first for other in first if one != other and other.endswith(one)]
    assert not [one for one in second for other in second if one != other and other.startswith(one)]
    single = words.SINGLE
    assert not [one for one in single for other in single if one is not other and one in other]
    asked = TASKS["cwe"].template + TASKS["cwe"].answer_prefix
    assert not [word for word in single if word in asked.lower()]


def test_the_haystack_holds_no_fact_and_no_number_but_days():
    text = haystack.words(3000, 0)
    assert len(text) == 3000 and not [word for word in text if re.search(r"\d{5}", word)]


@pytest.mark.parametrize("limit", range(-1, 60, 7))
@pytest.mark.parametrize("smallest", [0, 1, 5])
def test_the_largest_size_that_fits(limit: int, smallest: int):
    fits = [size for size in range(smallest, 31) if 2 * size + 3 <= limit]
    assert haystack.largest(lambda size: 2 * size + 3, limit, smallest, 30) == max(fits, default=smallest)


def test_a_size_shrinks_until_it_fits():
    assert haystack.shrunk(lambda size: 2 * size, 100, 50, 1) == (50, 100)
    assert haystack.shrunk(lambda size: 2 * size, 99, 50, 1) == (49, 98)
    assert haystack.shrunk(lambda size: 2 * size, 10, 50, 7) is None
    asked = []
    assert haystack.shrunk(lambda size: asked.append(size) or 101, 100, 1_000_000, 1) is None
    assert len(asked) < 30
