"""The sharding table: complete, and refused where it cannot hold."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from fastkv_jax.errors import FastKVConfigError
from fastkv_jax.model import sharding
from fastkv_jax.model.config import LlamaConfig, RopeConfig
from fastkv_jax.model.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    rms_norm_eps=1e-5, rope=RopeConfig(1e4, None), max_position_embeddings=64, tie_word_embeddings=False,
    qkv_bias=True, output_bias=True, qk_norm=True, sliding_window=None, stop_tokens=(), pad_token=None,
)  # fmt: skip


def mesh(size, name="model"):
    return jax.make_mesh((size,), (name,), devices=jax.devices()[:size])


def test_table_covers_every_parameter_and_no_other():
    leaves = jax.tree_util.tree_flatten_with_path(nnx.eval_shape(lambda: Llama(CONFIG, nnx.Rngs(0))))[0]
    assert {sharding.parameter_name(path) for path, _ in leaves} == set(sharding.TABLE)
    for path, leaf in leaves:
        found = sharding.sharding_for(mesh(2), path)
        assert len(found.spec) <= leaf.ndim
        found.shard_shape(leaf.shape)  # raises if it does not divide
        assert path[0].name != "layers" or not found.spec or found.spec[0] is None


def test_names_and_paths_agree():
    assert sharding.sharding_for(mesh(2), "wo").spec == PartitionSpec(None, None, "model")


def test_sharded_logits_equal_single():
    model = Llama(CONFIG, nnx.Rngs(0))
    where = sharding.automatic(mesh(2))
    sharded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, sharding.sharding_for(where, path)), model
    )

    def forward(model):
        x = model.embed(jnp.arange(6, dtype=jnp.int32)[None])
        q, _, v = model.layer(jnp.int32(1)).qkv(x, jnp.ones((1, 6, 4)), jnp.zeros((1, 6, 4)))
        return model.logits(model.layer(jnp.int32(0)).output(x, q + jnp.repeat(v, 2, 1))[:, -1])

    assert jnp.allclose(jax.jit(forward)(model), jax.jit(forward)(sharded), atol=1e-6)


def test_refusals():
    sharding.check_mesh(mesh(2), CONFIG)
    sharding.check_mesh(mesh(8, "data"), CONFIG)
    with pytest.raises(FastKVConfigError, match=r"axes \('experts',\); there are 'data', 'model', 'sequence'"):
        sharding.check_mesh(mesh(2, "experts"), CONFIG)
    with pytest.raises(FastKVConfigError, match=r"4 devices, which does not divide num_kv_heads \(2\); "):
        sharding.check_mesh(mesh(4), CONFIG)


def test_arrays_are_split_where_they_can_be():
    both = jax.make_mesh((2, 4), ("data", "sequence"), devices=jax.devices()[:8])
    assert sharding.spec(both, (4, 3, 8), "data", "model", "sequence") == PartitionSpec("data", None, "sequence")
    assert sharding.spec(both, (3, 3, 6), "data", "model", "sequence") == PartitionSpec(None, None, None)
    assert sharding.parts_of(8, both) == 4 and sharding.parts_of(6, both) == sharding.parts_of(8, None) == 1


def test_weights_are_whole_where_no_axis_splits_them():
    assert sharding.sharding_for(mesh(2, "data"), "wo").spec == PartitionSpec(None, None, None)


def test_automatic():
    assert set(sharding.automatic(mesh(2)).axis_types) == {AxisType.Auto}
    plain = sharding.automatic(mesh(2))
    assert sharding.automatic(plain) is plain
