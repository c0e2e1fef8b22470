"""From a sample to tokens, as one of the protocols has it."""

from typing import Any

from fastkv_jax import text
from fastkv_jax.chat_template import Rendering, render
from fastkv_jax.errors import InputError
from fastkv_jax.evals.protocols import Protocol, truncate
from fastkv_jax.evals.sample import Encoded, Sample


def encode(
    tokenizer: Any,
    sample: Sample,
    limit: int,
    protocol: Protocol | None = None,
    rendering: Rendering = Rendering(),  # noqa: B008 - a frozen value
) -> Encoded:
    """The sample's prompt in at most `limit` tokens.

    Without a protocol, what is too long loses the middle of what the template surrounds, token for token. Raises
    `InputError` if the template alone is longer.
    """
    if limit < 2:
        raise InputError(f"{limit} tokens are left for the prompt; it takes 2 or more")
    prompt = sample.context + sample.question
    if protocol is None:
        whole = _whole(tokenizer, sample, prompt, rendering)
        cut = whole.truncated(limit, "middle")
        return Encoded(sample, cut.token_ids, cut.window_end, len(whole.token_ids))
    if protocol.template == "before":
        return _template_first(tokenizer, sample, prompt, limit, rendering)
    around = len(_whole(tokenizer, sample, "?", rendering).token_ids) - 1
    ids = text.encode_raw(tokenizer, prompt).token_ids
    fits = len(ids) <= limit - around
    whole = _whole(tokenizer, sample, prompt if fits else _joined(tokenizer, ids, limit - around), rendering)
    cut = whole.truncated(limit, "middle")  # a text that was joined can take a token more
    return Encoded(sample, cut.token_ids, cut.window_end, len(ids) + around)


def _whole(tokenizer: Any, sample: Sample, prompt: str, rendering: Rendering) -> text.EncodedPrompt:
    if sample.chat:
        return text.encode_chat(tokenizer, prompt, prefill=sample.prefill or None, rendering=rendering)
    return text.encode_raw(tokenizer, prompt + sample.prefill)


def _template_first(tokenizer: Any, sample: Sample, prompt: str, limit: int, rendering: Rendering) -> Encoded:
    """FastKV's way: the template's own text is cut with the rest; the window ends with the prompt."""
    if sample.chat:
        prompt = render(tokenizer, [{"role": "user", "content": prompt}], rendering)
    ids = list(tokenizer(prompt + sample.prefill, verbose=False)["input_ids"])  # BOS again, whatever the template wrote
    kept = ids if len(ids) <= limit else list(tokenizer(_joined(tokenizer, ids, limit), verbose=False)["input_ids"])
    return Encoded(sample, truncate(kept, limit), 0, len(ids))


def _joined(tokenizer: Any, ids: list[int], limit: int) -> str:
    """The text of the first and the last half, without special tokens."""
    kept, half = truncate(ids, limit), limit // 2
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (kept[:half], kept[half:]))
