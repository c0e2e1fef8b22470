"""One HTML page: page.html with the data in it."""

import base64
import hashlib
import importlib.resources
import json

import numpy as np
from jaxtyping import Bool

from fastkv_jax.explanation.kept import Kept

# What must not reach a page: controls (shown as their pictures; newline and tab stay), and marks that reorder text.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_REORDER = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *_REORDER], 0xFFFD)


def _pack(bits: Bool[np.ndarray, "... n"]) -> str:
    """Rows of bits, each from a new byte on, the first position in the lowest bit; as base64."""
    return base64.b64encode(np.packbits(bits, axis=-1, bitorder="little").tobytes()).decode()


def render(explanation: Kept) -> bytes:
    """The page, which needs nothing but a browser."""
    rows = np.concatenate([kept[:heads] for kept, heads in zip(explanation.kept, explanation.heads, strict=True)])
    data = {
        "summary": explanation.summary(),
        "words": [word.translate(_VISIBLE) for word in explanation.words],
        "ids": explanation.token_ids.tolist() if explanation.has_text else None,
        "heads": explanation.heads,
        "kept": _pack(rows),
        "propagated": None if explanation.propagated is None else _pack(explanation.propagated),
        "boundary": explanation.boundary,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&":  # no token can end the script element that holds the data
        text = text.replace(character, f"\\u{ord(character):04x}")
    template = (importlib.resources.files("fastkv_jax") / "explanation" / "page.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    before, after = template.replace("%SCRIPT_HASH%", f"sha256-{digest}").split("%DATA%")
    return f"{before}{text}{after}".encode(errors="replace")
