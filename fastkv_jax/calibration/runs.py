"""What surveys and trials share: a pass over a sample, its last hidden state, and whether its answer is right."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastkv_jax.buckets import pad_batch
from fastkv_jax.calibration.samples import Sample, longest_run
from fastkv_jax.decoding.loop import decode_chunks
from fastkv_jax.methods.base import Method
from fastkv_jax.methods.plan import Stage
from fastkv_jax.model.llama import Llama
from fastkv_jax.model.platforms import Platform
from fastkv_jax.prefilling.doors import Prepared, prepare
from fastkv_jax.prefilling.layers import Prefill
from fastkv_jax.prefilling.passes import Pass, stages_of
from kernels_pallas.arithmetic import rms_norm


class Run(NamedTuple):
    """What all passes share."""

    model: Llama
    platform: Platform
    max_new_tokens: int
    tokenizer: Any
    answer_slots: int  # the longest answer, rounded up

    def prepared(self, sample: Sample, method: Method) -> Prepared:
        """A prefill of the sample, checked."""
        return prepare(
            self.model, *pad_batch([sample.token_ids]), method=method, max_new_tokens=self.max_new_tokens,
            window_end=sample.window_end, platform=self.platform,
        )  # fmt: skip

    def begun(self, sample: Sample, method: Method) -> tuple[Pass, list[Stage]]:
        """A pass over the sample, and the stages that the method has."""
        asked = self.prepared(sample, method)
        on = Pass(self.model, asked.prompt, None, asked.static)
        return on, stages_of(self.model, asked.prompt, asked.static)


@jax.jit
def last_hidden(model: Llama, x: Float[Array, "1 S E"]) -> Float[Array, " E"]:
    """What the language-model head reads: the last row after the final norm."""
    return rms_norm(x[0, -1], model.norm[...], model.config.rms_norm_eps).astype(jnp.float32)


def is_right(run: Run, result: Prefill, sample: Sample) -> bool:
    """Whether the answer is among the tokens decoded greedily. The cache is donated."""
    made: list[int] = []
    for chunk, _ in decode_chunks(run.model, result, max_new_tokens=run.max_new_tokens if sample.answer else 0):
        made += chunk[0].tolist()
        if _says(made, sample.answer, run.tokenizer):
            return True
    return False


def _says(made: Sequence[int], answer: Sequence[int], tokenizer: Any) -> bool:
    if tokenizer is None:
        return longest_run(made, answer)[1] == len(answer)
    return tokenizer.decode(answer).strip() in tokenizer.decode(made)
