"""Shapes of known models, for programs that need no weights: compiling ahead of time, timing with random ones."""

from fastkv_jax.model.config import Llama3Scaling, LlamaConfig, RopeConfig

MODELS = {  # vocabulary, hidden, MLP, layers, query heads, KV heads, head size, tied embeddings
    "llama-3.1-8b": (128_256, 4096, 14_336, 32, 32, 8, 128, False),
    "llama-3.2-1b": (128_256, 2048, 8192, 16, 32, 8, 64, True),
    "llama-3.1-70b": (128_256, 8192, 28_672, 80, 64, 8, 128, False),
    "tiny": (256, 64, 128, 4, 4, 2, 16, True),  # to see that a program runs
}


def config(name: str, positions: int) -> LlamaConfig:
    """The model's, with room for so many positions."""
    vocabulary, hidden, mlp, layers, heads, kv_heads, head_dim, tied = MODELS[name]
    rope = RopeConfig(
        5e5, Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    )
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-5, rope=rope, max_position_embeddings=positions,
        tie_word_embeddings=tied, qkv_bias=False, output_bias=False, qk_norm=False, sliding_window=None,
        stop_tokens=(), pad_token=None,
    )  # fmt: skip
