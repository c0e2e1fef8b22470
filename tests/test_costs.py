"""Operations and bytes from shapes, against sums written out by hand."""

import fastkv_jax as fk
from examples import model_a
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
