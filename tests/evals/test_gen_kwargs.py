"""The harness's generation arguments: honoured, or refused by name and value."""

import pytest

from fastkv_jax.decoding.sampling import Greedy, Sample
from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.evals.gen_kwargs import LENGTHS, check, read


@pytest.mark.parametrize(
    ("given", "sampler"),
    [
        ({}, Greedy()),
        ({"do_sample": False}, Greedy()),
        ({"do_sample": False, "temperature": 0.7}, Greedy()),
        ({"temperature": 0}, Greedy()),
        ({"do_sample": True, "temperature": 0.0}, Greedy()),
        ({"temperature": 0.7}, Sample(0.7)),
        ({"temperature": "0.7", "do_sample": None}, Sample(0.7)),
        ({"do_sample": True}, Sample(1.0)),
        ({"top_p": 1, "top_k": 0, "min_p": None}, Greedy()),
        ({"do_sample": False, "top_p": 0.9}, Greedy()),
        ({"temperature": 0.0, "top_k": 5}, Greedy()),
        ({"do_sample": True, "temperature": 2, "top_p": 0.9, "top_k": 5.0, "min_p": 0.1}, Sample(2, 0.9, 5, 0.1)),
    ],
)
def test_sampling(given, sampler):
    assert read(given, 7).sampler == sampler


@pytest.mark.parametrize("name", LENGTHS)
def test_every_name_of_a_length(name):
    assert read({name: 3}, 7).new_tokens == read({name: "3"}, 7).new_tokens == 3
    assert read({name: None}, 7).new_tokens == 7


@pytest.mark.parametrize(
    ("until", "stops"),
    [(None, ()), ("", ()), ([""], ()), ([], ()), ("\n", ("\n",)), (["a", "", None, "b", "a"], ("a", "b"))],
)
def test_stops(until, stops):
    assert read({"until": until}, 7).stops == stops


def test_what_we_do_anyway_is_allowed():
    assert read({"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "seed": 3}, 7).seed == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1"),
        ({"max_tokens": "many"}, "max_tokens must be a number"),
        ({"max_tokens": 2.5}, "max_tokens must be an integer"),
        ({"max_tokens": 2, "max_gen_toks": 3}, "different lengths"),
        ({"until": 3}, "until must be a text"),
        ({"until": [3]}, "until must be a text"),
        ({"do_sample": "yes"}, "do_sample must be true or false"),
        ({"temperature": -1.0}, "temperature must be finite and > 0"),
        ({"temperature": "nan"}, "temperature must be a number"),
        ({"temperature": 1.0, "top_p": 2}, "top_p must be in"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"seed": 2**32}, r"seed must be in 0 ... 2\*\*32 - 1, got 4294967296"),
        ({"seed": 2**70, "temperature": 1.0}, r"seed must be in 0 ... 2\*\*32 - 1"),
        ({"max_tokens": 10**400}, "max_tokens must be a number"),
        ({"top_p": 0.5}, "top_p=0.5 does nothing without do_sample=True or a temperature"),
        ({"top_p": 1, "top_k": 5}, "top_k=5 does nothing"),
        ({"min_p": 0.1}, "min_p=0.1 does nothing"),
        ({"top_p": 0}, "top_p must be in"),
        ({"top_k": -1, "do_sample": False}, "top_k must be an integer >= 0"),
        ({"min_p": 2, "temperature": 0}, "min_p must be in"),
    ],
)
def test_refused(given, words):
    with pytest.raises(FastKVConfigError, match=words):
        read(given, 7)


def test_each_by_itself():
    """What the command line says may be added to what a task says."""
    assert check({"top_p": 0.5, "until": "a", "seed": None}) == {"top_p": 0.5, "until": ("a",)}
    with pytest.raises(FastKVConfigError, match="top_k must be an integer >= 0"):
        check({"top_k": -1})
