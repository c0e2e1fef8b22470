"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from fastkv_jax.checkpoint.gguf.file import open_gguf
from fastkv_jax.checkpoint.tokenizers.special_tokens import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from fastkv_jax.errors import CheckpointError, ModelWarning

_SPACE = "▁"  # how sentencepiece writes a space
# Each pre-tokenizer of llama.cpp (its src/llama-vocab.cpp) is a list of patterns, applied one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _REST,),
    "qwen2": (_WORDS + r"\p{N}" + _REST,),
    "tekken": (_TEKKEN,),
}
# Other names that llama.cpp gives the same patterns.
_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_SAME_PATTERNS = {
    **dict.fromkeys((*_LLAMA_3, "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), "llama-bpe"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "stablelm2", "hunyuan", "megrez", "solar-open"), "qwen2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "roberta-bpe", "exaone4",
                     "granite-docling", "a.x-4.0", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de"), "gpt-2"),
    **{name: name for name in ("default", "tekken")},
}  # fmt: skip
_NORMALISED = ("qwen2", "deepseek-r1-qwen")  # to NFC
# Here a word that is a token is not built from merges; llama.cpp also gives these a BOS unless told otherwise.
_WHOLE_WORDS_FIRST = (*_LLAMA_3, "tekken")
_ROLES = {
    "bos_token": ("bos", "start"),
    "eos_token": ("eos", "end"),
    "pad_token": ("padding", "padding"),
    "unk_token": ("unknown", "unknown"),
}
# Vocabularies that a few tokens at their places give away, for files that do not name their pre-tokenizer.
_KNOWN_BY = (
    ("llama-bpe", {128_000: "<|begin_of_text|>"}),
    ("llama-bpe", {128_000: "<｜begin▁of▁sentence｜>"}),
    ("qwen2", {151_643: "<|endoftext|>"}),
    ("qwen2", {151_643: "<｜end▁of▁sentence｜>"}),
    ("smollm", {0: "<|endoftext|>", 3: "<repo_name>", 11: "<jupyter_start>"}),
    ("tekken", {3: "[INST]", 4: "[/INST]", 5: "[AVAILABLE_TOOLS]"}),
    ("gpt-2", {50_256: "<|endoftext|>"}),
)


def read_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its named special tokens and chat template as transformers calls them (`eos_token`, ...)."""
    meta = open_gguf(path).metadata
    tokens = _strings(meta, "tokens", path)
    pre = None
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        pre = meta.get("tokenizer.ggml.pre") or _missing_pre(tokens, path)
        tokenizer = _byte_level(meta, pre, tokens, path)
    elif kind == "llama":
        tokenizer = _sentencepiece(meta, tokens, path)
    else:
        raise CheckpointError(f"{path}: unsupported tokenizer.ggml.model {kind!r}; supported: 'gpt2', 'llama'")
    _add_special(tokenizer, meta, tokens, path)
    names = _named(meta, tokens, path)
    starts = kind == "llama" or pre in _WHOLE_WORDS_FIRST
    _frame(tokenizer, meta, names, starts)
    if (template := meta.get("tokenizer.chat_template")) is not None:
        names["chat_template"] = template
    return tokenizer, names


def _missing_pre(tokens: list[str], path: Path) -> str:
    """The pre-tokenizer of a file that names none: known from its vocabulary, or llama.cpp's default. Says which."""
    known = (pre for pre, signs in _KNOWN_BY if all(tokens[i : i + 1] == [text] for i, text in signs.items()))
    found = next(known, None)
    if found is None:
        told = "'default' is used, as in llama.cpp; numbers and words may be split wrongly"
    else:
        told = f"its vocabulary is that of {found!r}, which is used"
    warnings.warn(f"{path}: tokenizer.ggml.pre is missing: {told}", ModelWarning, stacklevel=4)
    return found or "default"


def _byte_level(meta: Mapping[str, Any], pre: Any, tokens: list[str], path: Path) -> Tokenizer:
    if pre not in _SAME_PATTERNS:
        raise CheckpointError(
            f"{path}: unsupported tokenizer.ggml.pre {pre!r}; supported: {', '.join(sorted(_SAME_PATTERNS))}."
            " Bring another tokenizer with --tokenizer (tokenizer=)"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(meta, "merges", path)]
    tokenizer = Tokenizer(_bpe(tokens, merges, path, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _NORMALISED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[_SAME_PATTERNS[pre]]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(meta: Mapping[str, Any], tokens: list[str], path: Path) -> Tokenizer:
    scores = meta.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.scores must hold one number for each of {len(tokens)} tokens")
    unknown = meta.get("tokenizer.ggml.unknown_token_id", 0)
    merges = _merges_from_scores(tokens, scores)
    spare = tokens[unknown] if 0 <= unknown < len(tokens) else None
    options = {"unk_token": spare, "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(_bpe(tokens, merges, path, **options))
    spaced = meta.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All ways to join two tokens into a third, best score first: how sentencepiece merges without a list of merges."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        merges += [(score, *pair) for pair in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


def _bpe(tokens: list[str], merges: list[Any], path: Path, **options: Any) -> BPE:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"{path}: {len(tokens) - len(vocabulary)} tokens of tokenizer.ggml.tokens are duplicates")
    try:
        return BPE(vocabulary, merges, **options)
    except Exception as error:  # the Rust side raises bare exceptions
        raise CheckpointError(f"{path}: the tokenizer's merges do not fit its tokens: {error}") from error


def _add_special(tokenizer: Tokenizer, meta: Mapping[str, Any], tokens: list[str], path: Path) -> None:
    kinds = meta.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _named(meta: Mapping[str, Any], tokens: list[str], path: Path) -> dict[str, str]:
    names = {}
    for name, (key, words) in _ROLES.items():
        number = meta.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if 0 <= number < len(tokens):
            names[name] = tokens[number]
        else:
            told = f"{path}: {words} token {number} is outside the {len(tokens):,} tokens; not used"
            warnings.warn(told, ModelWarning, stacklevel=4)
    return names


def _frame(tokenizer: Tokenizer, meta: Mapping[str, Any], names: Mapping[str, str], starts_with_bos: bool) -> None:
    """BOS before and EOS after the text, as the file asks for, or as llama.cpp does where it says nothing."""
    before = meta.get("tokenizer.ggml.add_bos_token", starts_with_bos) and names.get("bos_token")
    after = meta.get("tokenizer.ggml.add_eos_token", False) and names.get("eos_token")
    used = [token for token in (before, after) if token]
    if used:
        single = [token for token in (before, "$A", after) if token]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(used)]
        )


def _strings(meta: Mapping[str, Any], key: str, path: Path) -> list[str]:
    value = meta.get(f"tokenizer.ggml.{key}")
    if not value:
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} must be a list of strings; found no usable tokenizer")
    return value
