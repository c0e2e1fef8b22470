"""The rules choose as they say."""

import numpy as np
import pytest

from fastkv_jax.calibration.rules import Setting, best_answering, earliest_close, most_promising


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
