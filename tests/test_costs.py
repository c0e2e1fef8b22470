"""Operations and bytes from shapes, against sums written out by hand."""

import jax
import pytest

import fastkv_jax as fk
from examples import EXAMPLES, PROMPTS, model_a
from fastkv_jax import costs

WEIGHTS = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, MLP of the small model
HEAD = 2 * 64 * 128


def one_layer(n: int) -> int:
    return 2 * n * WEIGHTS + 2 * 2 * 64 * n * (n + 1) // 2


def test_a_layer_is_its_products_and_half_a_square():
    assert costs.layer_flops(model_a().config, 200) == one_layer(200)


def test_a_prefill_is_its_layers_and_one_row_of_the_head():
    c = model_a().config
    assert costs.prefill_flops(c, fk.FullKV(), 200) == 4 * one_layer(200) + HEAD
    assert costs.prefill_flops(c, fk.FastKV(tsp_layer=1), 200) == 2 * one_layer(200) + 2 * one_layer(40) + HEAD
    gem = fk.GemFilter(filter_layer=0, retention_rate=0.25)  # layer 0 on everything, then all layers on a quarter
    assert costs.prefill_flops(c, gem, 200) == one_layer(200) + 4 * one_layer(50) + HEAD


def test_a_step_reads_all_weights_and_the_entries():
    assert costs.decode_flops(model_a().config, 1000) == 2 * 4 * WEIGHTS + HEAD + 4 * 16 * 1000


def test_parameters_are_those_of_the_model():
    assert costs.weight_count(model_a().config) == sum(a.size for a in jax.tree.leaves(model_a()))


@pytest.mark.parametrize("name", ["full", "fastkv", "snapkv", "adakv", "gemfilter"])
def test_a_cache_has_the_bytes_of_its_arrays(name: str):
    c, method = model_a().config, EXAMPLES[name][0]
    cache = fk.prefill(model_a(), PROMPTS[5][None], method=method, max_new_tokens=3).cache
    found = sum(a.nbytes for s in cache.segments for a in (s.k, s.v)) + cache.k_new.nbytes + cache.v_new.nbytes
    assert costs.cache_bytes(c, method, len(PROMPTS[5]), 3, 4) == found


def test_full_context_keeps_k_and_v_of_every_token_and_kv_head_in_every_layer():
    assert costs.full_cache_bytes(model_a().config, 200, 2) == 4 * costs.entry_bytes(model_a().config, 200, 2)
    assert costs.entry_bytes(model_a().config, 200, 2) == 2 * 200 * 2 * 16 * 2
