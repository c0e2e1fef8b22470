"""A stream is `generate`, piece by piece."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import fastkv_jax
from fastkv_jax import FastKV, FullKV, InputError, Sample, generate, pad_batch, stream
from fastkv_jax.model.config import LlamaConfig, RopeConfig
from fastkv_jax.model.llama import Llama

FASTKV = FastKV(tsp_layer=0, tsp_length=16, capacity=12, window_size=4, kernel_size=3)


def tiny(**changes):
    numbers = dict(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
        rms_norm_eps=1e-5, rope=RopeConfig(1e4, None), max_position_embeddings=512, tie_word_embeddings=False,
        qkv_bias=False, output_bias=False, qk_norm=False, sliding_window=None, stop_tokens=(), pad_token=None,
    )  # fmt: skip
    return Llama(LlamaConfig(**(numbers | changes)), nnx.Rngs(0))


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token per byte, and two special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<one>", "<two>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return fastkv_jax.load_tokenizer(Path(folder))


PROMPT = np.random.default_rng(0).integers(0, 256, 40)
ONE = pad_batch([PROMPT], bucket=48)
TWO = pad_batch([PROMPT, PROMPT[:25]], bucket=48)


@pytest.mark.parametrize("method", [FullKV(), FASTKV], ids=["full", "fastkv"])
@pytest.mark.parametrize("new", [1, 20])
def test_chunks_join_to_the_tokens_of_generate(model, method, new):
    options = {"method": method, "max_new_tokens": new, "window_end": [2, 0]}
    chunks = list(stream(model, *TWO, **options))
    assert all(chunk.dtype == np.int32 and chunk.shape[0] == 2 for chunk in chunks)
    assert chunks[0].shape[1] == 1 and all(chunk.shape[1] <= 8 for chunk in chunks)
    joined = np.concatenate(chunks, axis=1)
    np.testing.assert_array_equal(joined, generate(model, *TWO, **options).tokens)


def test_random_chunks_join_too(model):
    options = {"method": FASTKV, "max_new_tokens": 12, "sampler": Sample(2.0), "key": jax.random.key(7)}
    joined = np.concatenate(list(stream(model, *TWO, **options)), axis=1)
    np.testing.assert_array_equal(joined, generate(model, *TWO, **options).tokens)


def test_pieces_join_to_the_decoded_text(model, tokenizer):
    options = {"method": FASTKV, "max_new_tokens": 20}
    pieces = list(stream(model, *ONE, tokenizer=tokenizer, **options))
    tokens = generate(model, *ONE, **options).tokens[0]
    assert all(isinstance(piece, str) and piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def test_a_stream_ends_before_its_stop_token(model, tokenizer):
    options = {"method": FullKV(), "max_new_tokens": 20}
    tokens = generate(model, *ONE, **options).tokens[0].tolist()
    stop = tokens[11]
    first = tokens.index(stop)
    pieces = stream(model, *ONE, tokenizer=tokenizer, stop_tokens=[stop], **options)
    assert "".join(pieces) == tokenizer.decode(tokens[:first], skip_special_tokens=True)
    chunks = np.concatenate(list(stream(model, *ONE, stop_tokens=[stop], **options)), axis=1)[0].tolist()
    assert chunks[: first + 1] == tokens[: first + 1] and len(chunks) == first + 1


def test_the_stop_tokens_of_the_checkpoint_are_the_default(model, tokenizer):
    options = {"method": FullKV(), "max_new_tokens": 6}
    first = int(generate(model, *ONE, **options).tokens[0, 0])
    stopping = tiny(stop_tokens=(first,))
    assert list(stream(stopping, *ONE, tokenizer=tokenizer, **options)) == []
    assert sum(chunk.shape[1] for chunk in stream(stopping, *ONE, **options)) == 1
    assert sum(chunk.shape[1] for chunk in stream(stopping, *ONE, stop_tokens=(), **options)) == 6


def test_nothing_is_streamed_for_no_tokens(model):
    assert list(stream(model, *ONE, method=FullKV(), max_new_tokens=0)) == []


def test_errors_come_at_the_call_not_at_the_first_piece(model, tokenizer):
    with pytest.raises(InputError, match="one prompt at a time, got a batch of 2"):
        stream(model, *TWO, method=FullKV(), max_new_tokens=2, tokenizer=tokenizer)
    with pytest.raises(InputError, match="outside the vocabulary"):
        stream(model, [[999]], method=FullKV(), max_new_tokens=2)


def test_a_random_stream_needs_a_key(model):
    with pytest.raises(InputError, match="Sample needs key"):
        list(stream(model, *ONE, method=FullKV(), max_new_tokens=2, sampler=Sample()))
