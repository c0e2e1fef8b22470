"""What a checkpoint says about its model: `LlamaConfig`, read from Hugging Face's config.json."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastkv_jax.errors import CheckpointError

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MinistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

_SCALES = ("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "attention_factor")


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequency scaling of Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: its base, and how the frequencies derived from it are changed.

    `scaling` is None, the rule of Llama 3.1, or one divisor per frequency (as GGUF files store it), D/2 of them.
    """

    theta: float
    scaling: Llama3Scaling | tuple[float, ...] | None


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of one Llama-family model. All come from its checkpoint, so none has a default."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    sliding_window: int | None
    stop_tokens: tuple[int, ...]
    pad_token: int | None

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_heads // self.num_kv_heads


def from_hugging_face(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None, *, source: str = "config.json"
) -> LlamaConfig:
    """Translate config.json (and generation_config.json) into a `LlamaConfig`.

    Accepts the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
    Keys that old Llama files leave out follow transformers' documented defaults; anything else missing is an error.

    Raises `CheckpointError` naming `source`, the field and its value.
    """
    architecture = _architecture(config, source)
    if config.get("quantization_config") is not None:
        given = config["quantization_config"]
        method = given.get("quant_method", "unknown") if isinstance(given, Mapping) else given
        raise CheckpointError(
            f"{source}: quantization_config ({method}) is not supported; use an unquantised checkpoint"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{source}: hidden_act {config['hidden_act']!r} is not supported; supported: 'silu'")
    if config.get("mlp_bias"):
        raise CheckpointError(f"{source}: mlp_bias true is not supported")

    heads = _integer(config, "num_attention_heads", source)
    kv_heads = _integer(config, "num_key_value_heads", source, default=heads)
    hidden = _integer(config, "hidden_size", source)
    if heads % kv_heads:
        raise CheckpointError(
            f"{source}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"{source}: head_dim is absent and hidden_size ({hidden}) no multiple of num_attention_heads ({heads})"
        )
    head_dim = _integer(config, "head_dim", source, default=hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"{source}: head_dim ({head_dim}) must be even for rotary embedding")
    layers = _integer(config, "num_hidden_layers", source)
    bias = _boolean(config, "attention_bias", source, default=False)
    vocabulary = _integer(config, "vocab_size", source)
    generation = generation or {}
    pads = token_ids(generation, "pad_token_id", source) or token_ids(config, "pad_token_id", source)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=_integer(config, "intermediate_size", source),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(config, "rms_norm_eps", source),
        rope=_rope(config, source),
        max_position_embeddings=_integer(config, "max_position_embeddings", source),
        tie_word_embeddings=_boolean(config, "tie_word_embeddings", source, default=False),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        output_bias=bias and architecture != "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(config, architecture, layers, source),
        stop_tokens=token_ids(generation, "eos_token_id", source) or token_ids(config, "eos_token_id", source),
        pad_token=next((token for token in pads if 0 <= token < vocabulary), None),
    )


def _architecture(config: Mapping[str, Any], source: str) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{source}: unsupported architecture {name!r}; supported: {', '.join(ARCHITECTURES)}")
    return name


def _sliding_window(config: Mapping[str, Any], architecture: str, layers: int, source: str) -> int | None:
    """The window if any layer uses one. Qwen writes the number down even when `use_sliding_window` is false."""
    if config.get("sliding_window") is None:
        return None
    types = config.get("layer_types")
    if isinstance(types, list):
        return _integer(config, "sliding_window", source) if "sliding_attention" in types else None
    if architecture.startswith("Qwen"):
        if not _boolean(config, "use_sliding_window", source, default=False):
            return None
        full = config.get("max_window_layers", 28)  # transformers' default
        if not isinstance(full, int) or isinstance(full, bool) or full < 0:
            raise CheckpointError(f"{source}: max_window_layers must be an integer >= 0, found {full!r}")
        if full >= layers:
            return None
    return _integer(config, "sliding_window", source)


def _rope(config: Mapping[str, Any], source: str) -> RopeConfig:
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new is not None and old is not None:
        raise CheckpointError(f"{source}: rope_parameters and rope_scaling are both present; keep one")
    field = "rope_parameters" if new is not None else "rope_scaling"
    rope = new if new is not None else old if old is not None else {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{source}: {field} must be an object, found {rope!r}")
    theta_owner = rope if "rope_theta" in rope else config
    theta = _number(theta_owner, "rope_theta", source, default=10000.0)
    for owner in (rope, config):
        if owner.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(f"{source}: partial_rotary_factor {owner['partial_rotary_factor']} is not supported")
    kind = _rope_type(rope, field, source)
    if kind == "default":
        return RopeConfig(theta, None)
    scaling = Llama3Scaling(
        factor=_number(rope, "factor", source),
        low_freq_factor=_number(rope, "low_freq_factor", source),
        high_freq_factor=_number(rope, "high_freq_factor", source),
        original_max_position_embeddings=_integer(rope, "original_max_position_embeddings", source),
    )
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low >= high:
        raise CheckpointError(f"{source}: low_freq_factor ({low}) must be below high_freq_factor ({high})")
    return RopeConfig(theta, scaling)


def _rope_type(rope: Mapping[str, Any], field: str, source: str) -> str:
    """ "default" or "llama3", under either spelling; a scale of no type, or beside none, is not guessed at."""
    types = {name: rope[name] for name in ("rope_type", "type") if name in rope}
    kind = next(iter(types.values()), "default")
    if any(other != kind for other in types.values()):
        raise CheckpointError(f"{source}: {field} names two types: {types}; keep one")
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{source}: unsupported rope_type {kind!r} in {field}; supported: 'default', 'llama3'")
    if layered := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise CheckpointError(f"{source}: {field} of its own for {layered[0]} layers is not supported")
    scale = [name for name in _SCALES if rope.get(name) not in (None, 1.0)]
    if kind == "default" and scale:
        without = f"rope_type {kind!r}" if types else "no rope_type"
        raise CheckpointError(
            f"{source}: {field} has {scale[0]} {rope[scale[0]]!r} but {without}; supported: 'default', 'llama3'"
        )
    return kind


def token_ids(config: Mapping[str, Any], field: str, source: str) -> tuple[int, ...]:
    """Ids in a field of config.json or generation_config.json: one or a list (Llama 3 has several stop tokens).

    Raises `CheckpointError` naming `source`, the field and its value.
    """
    value = config.get(field)
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{source}: {field} must be a token id or a list of them, found {value!r}")
    return ids


_ABSENT = object()


def _lookup(config: Mapping[str, Any], field: str, source: str, default: Any) -> Any:
    value = config.get(field)
    if value is not None:
        return value
    if default is _ABSENT:
        raise CheckpointError(f"{source}: field {field!r} is missing")
    return default


def _integer(config: Mapping[str, Any], field: str, source: str, default: Any = _ABSENT) -> int:
    value = _lookup(config, field, source, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{source}: {field} must be a positive integer, found {value!r}")
    return value


def _number(config: Mapping[str, Any], field: str, source: str, default: Any = _ABSENT) -> float:
    value = _lookup(config, field, source, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{source}: {field} must be a positive number, found {value!r}")
    return float(value)


def _boolean(config: Mapping[str, Any], field: str, source: str, default: Any = _ABSENT) -> bool:
    value = _lookup(config, field, source, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: {field} must be true or false, found {value!r}")
    return value
