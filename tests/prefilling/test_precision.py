"""On a GPU the products of a float32 model are float32's, not TF32's, wherever they are made; elsewhere as ever."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import fastkv_jax as fk
from examples import EXAMPLES, model_a
from fastkv_jax.calibration import survey
from fastkv_jax.decoding.step import decode
from fastkv_jax.methods.base import Method
from fastkv_jax.prefilling import likelihood, passes
from fastkv_jax.prefilling.doors import prepare
from fastkv_jax.prefilling.layers import enter

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
HOPPER = AbstractMesh((1,), ("gpu",), (AxisType.Auto,), abstract_device=H100)
TOKENS = [[5 * i % 89 for i in range(100)]]
METHODS = [given[0] for name, given in EXAMPLES.items() if name != "asl"]  # which are many programs


def products(program, *args, platform: str, **static) -> list[str]:
    """The precisions of a program's matrix products, in StableHLO; no accelerator needed."""
    target = "cuda" if platform == "gpu" else platform
    text = program.trace(*args, **static).lower(lowering_platforms=(target,)).as_text()
    found = re.findall(r"stablehlo\.dot_general.*", text)
    assert found
    return [(re.findall(r"precision = \[(\w+)", line) or ["DEFAULT"])[0] for line in found]


def asked(method: Method, platform, dtype=None):
    model = model_a()
    if dtype is not None:
        model = jax.tree.map(lambda a: a.astype(dtype), model)
    return prepare(model, TOKENS, method=method, max_new_tokens=2, platform=platform, kernels="reference")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_product_of_a_prefill(method: Method):
    given = asked(method, "gpu")
    found = products(passes.run_jit, given.model, given.prompt, None, static=given.static, platform="gpu")
    assert set(found) == {"HIGHEST"}


def test_every_product_of_a_likelihood_and_a_survey():
    given = asked(fk.FullKV(), "gpu")
    past = given.run().cache.folded()
    both = given.prompt, past
    found = products(likelihood._scores, given.model, *both, static=given.static, platform="gpu")
    at = enter(given.model, given.prompt, None, static=given.static)
    budget, answer = jnp.ones(1, jnp.int32), jnp.zeros(4, jnp.int32)
    look = {"methods": (EXAMPLES["fastkv"][0],), "static": given.static}
    found += products(survey._look, given.model, at, jnp.int32(0), budget, budget, answer, **look, platform="gpu")
    assert set(found) == {"HIGHEST"}


def test_every_product_of_a_decode_step():
    """Its kernels say so themselves; the logits are XLA's."""
    given = asked(fk.FullKV(), "gpu")
    run = jax.jit(functools.partial(decode, given.model, jnp.zeros(1, jnp.int32), kernels="gpu"))
    with use_abstract_mesh(HOPPER):
        assert set(products(run, given.run().cache, platform="gpu")) == {"HIGHEST"}


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("tpu", "bfloat16")])
def test_products_elsewhere_are_as_ever(platform, dtype: str):
    given = asked(EXAMPLES["fastkv"][0], platform, dtype)
    found = products(passes.run_jit, given.model, given.prompt, None, static=given.static, platform=platform)
    assert set(found) == {"DEFAULT"}


def test_a_float32_model_is_read_for_a_gpu_as_for_a_cpu():
    on_gpu, on_cpu = (asked(EXAMPLES["fastkv"][0], platform).run() for platform in ("gpu", "cpu"))
    jax.tree.map(lambda a, b: None if (a == b).all() else pytest.fail("differs"), on_gpu, on_cpu)
