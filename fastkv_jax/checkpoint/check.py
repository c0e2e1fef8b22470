"""Does a file hold exactly the tensors that its config asks for? Answered from names and shapes, before any weight."""

from collections.abc import Callable, Collection, Mapping

from fastkv_jax.checkpoint.assemble import expected_shapes, listed
from fastkv_jax.errors import CheckpointError
from fastkv_jax.model.config import LlamaConfig

# The config fields behind each axis, named as config.json names them.
_FIELDS = {
    "embedding": "vocab_size x hidden_size",
    "lm_head": "vocab_size x hidden_size",
    "norm": "hidden_size",
    "attention_norm": "hidden_size",
    "mlp_norm": "hidden_size",
    "q_norm": "head_dim",
    "k_norm": "head_dim",
    "wq": "num_attention_heads * head_dim x hidden_size",
    "wk": "num_key_value_heads * head_dim x hidden_size",
    "wv": "num_key_value_heads * head_dim x hidden_size",
    "wo": "hidden_size x num_attention_heads * head_dim",
    "bq": "num_attention_heads * head_dim",
    "bk": "num_key_value_heads * head_dim",
    "bv": "num_key_value_heads * head_dim",
    "bo": "hidden_size",
    "w_gate": "intermediate_size x hidden_size",
    "w_up": "intermediate_size x hidden_size",
    "w_down": "hidden_size x intermediate_size",
}
_OUTSIDE_LAYERS = ("embedding", "norm", "lm_head")


def check_tensors(
    config: LlamaConfig,
    found: Mapping[str, tuple[int, ...]],
    label: Callable[[str, int | None], str],
    ignored: Collection[str],
    source: str,
) -> None:
    """Compare the shapes `found` under the file's own names with those the config implies.

    Raises `CheckpointError` that lists missing, unexpected and misshapen tensors, ten of each at most.
    """
    if config.num_layers > len(found):  # before listing the tensors of a billion layers
        raise CheckpointError(f"{source}: {config.num_layers} layers are declared, but only {len(found)} tensors exist")
    wanted = {
        label(name, layer): (name, shape)
        for name, shape in expected_shapes(config).items()
        for layer in ([None] if name in _OUTSIDE_LAYERS else range(config.num_layers))
    }
    problems = []
    if missing := [name for name in wanted if name not in found]:
        problems.append(f"{len(missing)} missing: {listed(missing)}")
    if unexpected := [name for name in found if name not in wanted and name not in ignored]:
        problems.append(f"{len(unexpected)} unexpected: {listed(unexpected)}")
    if misshapen := [
        f"{label} is {list(found[label])}, expected {list(shape)} ({_FIELDS[name]})"
        for label, (name, shape) in wanted.items()
        if label in found and found[label] != shape
    ]:
        problems.append(f"{len(misshapen)} of the wrong shape: {listed(misshapen)}")
    if problems:
        raise CheckpointError(f"{source}: the tensors do not fit the config: {'; '.join(problems)}")
