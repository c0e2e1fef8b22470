"""The Llama family as Flax NNX modules that only project: no cache, no method, no loop.

A module here is a plain pytree. Layers are stacked along a leading axis L and picked by a (traced) index inside the
scan over layers, so a run of layers costs no copy of its weights.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from fastkv_jax.model import rope
from fastkv_jax.model.config import LlamaConfig
from fastkv_jax.model.platforms import Platform
from fastkv_jax.model.products import Stacked, gated_product, here, normed_products, plus_product
from kernels_pallas.arithmetic import rms_norm


class Block(nnx.Module):
    """One decoder layer, or L of them stacked: projections before and after attention."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike):
        c, stack = config, config.num_layers
        query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.config = nnx.static(c)

        def matrix(out: int, inner: int) -> nnx.Param:
            values = jax.random.normal(rngs.params(), (stack, out, inner), dtype)
            return nnx.Param(values * jnp.asarray(1 / math.sqrt(inner), dtype))

        def vector(size: int, fill: float) -> nnx.Param:
            return nnx.Param(jnp.full((stack, size), fill, dtype))

        self.attention_norm = vector(c.hidden_size, 1.0)
        self.wq, self.wk, self.wv = matrix(query, c.hidden_size), matrix(kv, c.hidden_size), matrix(kv, c.hidden_size)
        self.wo = matrix(c.hidden_size, query)
        self.bq, self.bk, self.bv = (
            (vector(query, 0.0), vector(kv, 0.0), vector(kv, 0.0)) if c.qkv_bias else (None, None, None)
        )
        self.bo = vector(c.hidden_size, 0.0) if c.output_bias else None
        self.q_norm, self.k_norm = (vector(c.head_dim, 1.0), vector(c.head_dim, 1.0)) if c.qk_norm else (None, None)
        self.mlp_norm = vector(c.hidden_size, 1.0)
        self.w_gate = matrix(c.intermediate_size, c.hidden_size)
        self.w_up = matrix(c.intermediate_size, c.hidden_size)
        self.w_down = matrix(c.hidden_size, c.intermediate_size)

    def qkv(self, x: Float[Array, "B T E"], cos: Float[Array, "B T D"], sin: Float[Array, "B T D"]):
        """Queries [B, H, T, D], keys and values [B, K, T, D] of one layer; queries and keys rotated."""
        q, k, v = self.unrotated(x)
        return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v

    def unrotated(self, x: Float[Array, "B T E"]):
        """The same before positions matter."""
        c = self.config
        matrices, biases = (self.wq, self.wk, self.wv), (self.bq, self.bk, self.bv)
        made = normed_products(x, self.attention_norm, c.rms_norm_eps, matrices, biases)
        q, k, v = (rearrange(a, "b t (n d) -> b n t d", d=c.head_dim) for a in made)
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, here(self.q_norm), c.rms_norm_eps)
            k = rms_norm(k, here(self.k_norm), c.rms_norm_eps)
        return q, k, v

    def output(self, x: Float[Array, "B T E"], attended: Float[Array, "B H T D"]) -> Float[Array, "B T E"]:
        """The residual stream after attention's projection and the MLP of one layer. Rows do not see each other."""
        x = plus_product(x, rearrange(attended, "b h t d -> b t (h d)"), self.wo, self.bo)
        gated = gated_product(x, self.mlp_norm, self.config.rms_norm_eps, self.w_gate, self.w_up)
        return plus_product(x, gated, self.w_down)


class Llama(nnx.Module):
    """A Llama-family decoder: embedding, stacked blocks, final norm, language-model head.

    `mesh` (static) is the device mesh its weights are laid out on, None on a single device.
    """

    def __init__(
        self, config: LlamaConfig, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32, mesh: Mesh | None = None
    ):
        self.config = nnx.static(config)
        self.mesh = nnx.static(mesh)
        table = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), table, dtype) * jnp.asarray(0.02, dtype))
        self.layers = Block(config, rngs, dtype)
        self.norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        head = None if config.tie_word_embeddings else jax.random.normal(rngs.params(), table, dtype)
        self.lm_head = None if head is None else nnx.Param(head * jnp.asarray(0.02, dtype))

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights and activations."""
        return jax.tree.leaves(self)[0].dtype

    @property
    def platform(self) -> Platform:
        """Where the weights live; where jax would put them if they are traced."""
        weights = self.norm[...]
        name = jax.default_backend() if isinstance(weights, Tracer) else next(iter(weights.devices())).platform
        return "gpu" if name in ("gpu", "cuda", "rocm") else "tpu" if name == "tpu" else "cpu"

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Token embeddings."""
        return self.embedding[...][tokens]

    def layer(self, index: Int[Array, ""], in_place: bool = False) -> Block:
        """Block `index` of the stack; the index may be traced.

        `in_place`: its weights stay in the stack, for a GPU's few rows; elsewhere XLA needs no such help.
        """

        def pick(a: Array) -> Any:
            return Stacked(a, index, "gpu") if in_place else lax.dynamic_index_in_dim(a, index, keepdims=False)

        return jax.tree.map(pick, self.layers)

    def logits(self, x: Float[Array, "B E"]) -> Float[Array, "B V"]:
        """Next-token logits in float32 for the last hidden state of each row."""
        x = rms_norm(x, self.norm[...], self.config.rms_norm_eps)
        table = self.embedding if self.lm_head is None else self.lm_head
        return jnp.einsum("be,ve->bv", x, table[...], preferred_element_type=jnp.float32)
