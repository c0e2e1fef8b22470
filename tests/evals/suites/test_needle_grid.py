"""A needle at each depth of each length, and the picture of what was found."""

import re
from pathlib import Path

import numpy as np
import pytest

from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.evals.reports import heat_map
from fastkv_jax.evals.reports.heat_map import table
from fastkv_jax.evals.suites import needle_grid
from fastkv_jax.evals.suites.needle_grid import Needle, depths, insertion


def count(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


OWN = Needle("The cook keeps saffron in the blue jar.", "Where is the saffron?", "in the blue jar.", "words")


def cells(lengths=(300, 1000), places=(0, 40, 100), **options):
    return needle_grid.samples(lengths, places, count, **options)


def test_depths_are_spread_evenly():
    assert depths() == [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]
    assert depths(1) == [0] and depths(3) == [0, 50, 100]


def test_a_cell_for_each_length_and_depth():
    made = cells()
    assert [cell.group for cell in made] == ["300/0", "300/40", "300/100", "1000/0", "1000/40", "1000/100"]
    assert len({cell.id for cell in made}) == 6
    for cell in made:
        assert cell.answers[0] in cell.context and cell.answers[0] not in cell.question
        assert Needle().score(cell, f"It is {cell.answers[0]}.").score == 1
        assert Needle().score(cell, "It is 4.").score == 0
    assert len({cell.answers for cell in made}) == 6


@pytest.mark.parametrize("needle", [Needle(), OWN])
def test_cells_fill_their_length_and_never_exceed_it(needle: Needle):
    for cell in cells(needle=needle, max_new_tokens=25, template_tokens=15):
        used, length = count(cell.context + cell.question) + 40, int(cell.group.split("/")[0])
        assert 0.97 * length < used <= length


def test_a_needle_of_the_user_s():
    for cell in cells(needle=OWN, chat=False):
        assert OWN.text in cell.context and cell.answers == (OWN.answer,) and not cell.chat
        assert OWN.score(cell, "In the BLUE cup").score == 3 / 4


def test_cells_are_the_same_every_time_and_others_with_another_seed():
    assert cells() == cells()
    assert cells(lengths=(1000,)) == cells(lengths=(1000,), places=(0, 40, 100))
    assert not {cell.answers for cell in cells()} & {cell.answers for cell in cells(seed=1)}


def test_the_needle_stands_behind_a_full_stop():
    words = "One two. Three four five. Six seven".split()
    assert [insertion(words, depth) for depth in (0, 28, 29, 70, 72, 99, 100)] == [0, 0, 2, 2, 5, 5, 7]
    for cell in cells(places=range(0, 100, 7)):
        before = cell.context.partition(" The magic number")[0] if " The magic" in cell.context else "."
        assert before.endswith(".")


def test_deeper_needles_stand_later():
    made = cells(lengths=(2000,), places=depths())
    places = [cell.context.index("The magic number") / len(cell.context) for cell in made]
    assert places == sorted(places) and places[0] < 0.02 and places[-1] > 0.97


def test_the_user_s_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(f"File {name}. ")
    (cell,) = cells(lengths=(120,), places=(100,), folder=tmp_path)
    assert "follows.\n\nFile a. File b. File c. File a. " in cell.context


def test_what_cannot_be_is_named():
    with pytest.raises(InputError, match="needle does not fit into length 50: the least is 69 tokens"):
        cells(lengths=(50,))
    with pytest.raises(InputError, match="depths must lie between 0 and 100 per cent, got 101"):
        cells(places=(5, 101))
    with pytest.raises(InputError, match=r"lengths must be 1 token or more, got \[\]"):
        cells(lengths=())


@pytest.mark.parametrize("tokens", [0, 1, 10**9])
def test_it_ends_whatever_the_tokenizer_says(tokens: int):
    try:
        assert len(needle_grid.samples([300], [50], lambda text: tokens)) == 1
    except InputError:
        assert tokens == 10**9


# ---------------------------------------------------------------------------------------------------------- heat map

SCORES = [("1024/0", 1.0), ("1024/100", 0.5), ("1024/100", 0.0), ("2048/0", 0.75)]
CELLS = [{"group": group, "score": score} for group, score in SCORES]


def test_the_table_holds_the_means_of_the_cells():
    lengths, places, means = table(CELLS)
    assert (lengths, places) == ([1024, 2048], [0, 100])
    np.testing.assert_array_equal(means, [[1.0, 0.75], [0.25, np.nan]])


@pytest.mark.parametrize(("name", "start"), [("map.png", b"\x89PNG"), ("map.PDF", b"%PDF")])
def test_the_picture_is_written_whole(name: str, start: bytes, tmp_path):
    heat_map.heat_map(CELLS, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert Path(tmp_path, name).read_bytes().startswith(start)


def test_colours_go_from_red_to_green_and_the_title_is_the_mean(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    grid = [{"group": f"{length}/{depth}", "score": depth / 100} for length in (3000, 5000) for depth in (0, 50, 100)]
    heat_map.heat_map(grid, tmp_path / "map.png")
    axes = drawn[0].axes[0]
    assert axes.get_title() == "Mean score 0.500"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3,000", "5,000"]
    colours = np.asarray(axes.collections[0].get_facecolor())
    found = ["#" + "".join(f"{round(255 * part):02X}" for part in colours[row][:3]) for row in (0, 2, 4)]
    assert found[0] == heat_map.COLOURS[0] and found[2] == heat_map.COLOURS[2]
    middle = [int(heat_map.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)]
    assert np.abs(np.array(middle) - [int(found[1][i : i + 2], 16) for i in (1, 3, 5)]).max() <= 3


def test_what_cannot_be_drawn_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"a heat map is written as \.png or \.pdf, got .*map\.svg"):
        heat_map.heat_map(CELLS, tmp_path / "map.svg")
    with pytest.raises(InputError, match="a heat map needs one cell at least"):
        heat_map.heat_map([], tmp_path / "map.png")
    with pytest.raises(InputError, match="group must be <length>/<depth>, got '4k'"):
        heat_map.heat_map([{"group": "4k", "score": 1}], tmp_path / "map.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.style", None)
    with pytest.raises(FastKVConfigError, match=r"pip install 'fastkv-jax\[evaluate\]'"):
        heat_map.heat_map(CELLS, tmp_path / "map.png")
    assert not list(tmp_path.iterdir())
