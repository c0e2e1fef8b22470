"""Compiles the prefill of a prompt spread over chips that need not be there: python compile_prefill_for_tpu.py v5e:2x2

One JSON line, for one chip and then for four: {calls, temporaries}, the last in bytes of one chip.
Needs libtpu (jax[tpu]) and the environment that conftest.py sets.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fastkv_jax as fk
from fastkv_jax.checkpoint.assemble import abstract_model
from fastkv_jax.model.config import LlamaConfig, RopeConfig

TOKENS = 8192
CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=512, intermediate_size=1792, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128,
    rms_norm_eps=1e-5, rope=RopeConfig(5e5, None), max_position_embeddings=2 * TOKENS, tie_word_embeddings=False,
    qkv_bias=False, output_bias=False, qk_norm=False, sliding_window=None, stop_tokens=(), pad_token=None,
)  # fmt: skip
# Quick to compile, and with no array moved to a chip's on-chip memory, which would hide it from the temporaries.
EFFORT = "O1"


def main(target: str) -> None:
    jax.config.update("jax_optimization_level", EFFORT)
    devices = topologies.get_topology_desc(topology_name=target, platform="tpu").devices
    method = fk.FastKV(tsp_layer=0, tsp_rate=0.25, retention_rate=0.2)
    prefill = jax.jit(functools.partial(fk.prefill, method=method, max_new_tokens=16, platform="tpu"))
    for chips in (1, 4):
        mesh = Mesh(np.array(devices[:chips]), ("sequence",))
        whole = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
        model = jax.tree.map(lambda a, whole=whole: whole(a.shape, a.dtype), abstract_model(CONFIG, jnp.bfloat16, mesh))
        lowered = prefill.lower(model, whole((1, TOKENS), jnp.int32), whole((1,), jnp.int32))
        compiled = lowered.compile()
        calls = re.findall(r'%([a-z_]+)[.\d]* = .*custom_call_target="tpu_custom_call"', compiled.as_text())
        found = {"calls": calls, "temporaries": compiled.memory_analysis().temp_size_in_bytes}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
