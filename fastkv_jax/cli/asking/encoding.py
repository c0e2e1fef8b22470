"""Requests as tokens: through the chat template or not, behind a saved document or not."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from fastkv_jax.chat_template import Rendering
from fastkv_jax.cli.asking.answering import Encoded, PromptOptions, encode
from fastkv_jax.cli.asking.prompts import Request
from fastkv_jax.cli.asking.saved import Saved
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.methods.presets import Preset
from fastkv_jax.model.config import LlamaConfig


def use_chat(options: argparse.Namespace, has_template: bool, requests: list[Request]) -> bool:
    """Whether prompts go through the chat template. Raises `InputError` where a flag or a field needs one."""
    if options.chat and not has_template:
        raise InputError("this tokenizer has no chat template; use --raw")
    chat = has_template and not options.raw
    if not chat and any(request.system or request.prefill for request in requests):
        raise InputError("system and prefill need a chat template, and this tokenizer has none")
    if not chat and (options.chat_template_args or options.date):
        raise InputError("--chat-template-args and --date go to a chat template, and none is used here")
    return chat


def encode_all(
    options: argparse.Namespace,
    requests: Sequence[Request],
    tokenizer: Any,
    config: LlamaConfig,
    preset: Preset,
    rendering: Rendering | None,
    saved: Saved | None,
) -> Iterator[tuple[Request, Encoded | InputError]]:
    """Every request with its tokens; in a batch, one that does not fit is answered by its error."""
    limit, name = config.max_position_embeddings, "max_position_embeddings"
    if options.max_seq_len is not None:
        if options.max_seq_len > limit:
            raise FastKVConfigError(
                f"max_seq_len {options.max_seq_len} exceeds the model's max_position_embeddings, {limit}"
            )
        limit, name = options.max_seq_len, "--max-seq-len"
    how = PromptOptions(
        rendering is not None,
        options.max_new_tokens,
        limit,
        name,
        options.truncate,
        options.split_special_tokens,
        preset.window_end == "question",
        rendering or Rendering(),
    )
    for request in requests:
        try:
            if saved is None:
                job = encode(tokenizer, request, config, how)
            else:
                new, split = options.max_new_tokens, options.split_special_tokens
                job = saved.encode(tokenizer, request, config, new, split)
        except InputError as error:
            if options.input is None:
                raise
            yield request, error
            continue
        yield request, job
