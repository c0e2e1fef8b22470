"""The same model in transformers on PyTorch, timed in a process of its own, where JAX holds no memory.

    python -m fastkv_jax.benchmarks.torch_peer FOLDER

FOLDER is what `against_transformers.hand_over` has left; one JSON object goes to stdout, logits to FOLDER/theirs.npz.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def build(job: dict[str, Any], folder: Path) -> Any:
    """transformers' Llama, made in its own dtype where it will run: never in float32 first, which may not fit.

    sdpa attention; our weights where there are files of them, else its own at random.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors import safe_open
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**job["config"])
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    with torch.device(job["device"]):
        model = LlamaForCausalLM(config).eval()
    ours = sorted(folder.glob("*.safetensors"))
    waiting = dict(model.named_parameters()) if ours else {}
    with torch.no_grad():
        for file in ours:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    waiting.pop(name).copy_(tensors.get_tensor(name))
    if waiting:
        raise ValueError(f"transformers' Llama has other parameters: {', '.join(waiting)}")
    return model


def once(model: Any, prompts: np.ndarray, job: dict[str, Any]) -> tuple[dict[str, float], np.ndarray]:
    """Seconds of a run, greedy; the first steps do not count as decoding, as for ours. And the last tokens' logits."""
    import torch  # pyright: ignore[reportMissingImports]

    wait = torch.cuda.synchronize if job["device"] == "cuda" else lambda: None
    with torch.inference_mode():
        began = time.perf_counter()
        given = torch.from_numpy(prompts).long().to(job["device"])
        out = model(given, use_cache=True, logits_to_keep=1)
        wait()
        prefill = time.perf_counter() - began
        logits = out.logits[:, -1].float().cpu().numpy()
        decode_began = 0.0
        for made in range(1, job["new_tokens"]):
            if made == job["skipped"] + 1:
                wait()
                decode_began = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        out.logits.cpu()
        ended = time.perf_counter()
    decode = (ended - decode_began) / (job["new_tokens"] - job["skipped"] - 1)
    return {"prefill": prefill, "decode": decode, "whole": ended - began}, logits


def main(folder: Path) -> None:
    """A warm-up and the rounds of every length; a length that fails says so in the place of its seconds."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    model, rows, logits = build(job, folder), [], {}
    with np.load(folder / "prompts.npz") as prompts:
        for tokens in job["tokens"]:
            row: dict[str, Any] = {"tokens": tokens, "runs": []}
            rows.append(row)
            try:
                for turn in range(job["repeats"] + 1):
                    seconds, logits[str(tokens)] = once(model, prompts[str(tokens)], job)
                    row["runs"] += [seconds] if turn else []
                    if not job["quiet"]:
                        _tell(turn, seconds)
            except RuntimeError as error:  # out of memory, as a rule
                row["error"] = str(error).splitlines()[0]
    np.savez(folder / "theirs.npz", **logits)
    print(json.dumps(rows))


def _tell(turn: int, seconds: dict[str, float]) -> None:
    which = f"{turn}{' (warm-up)' if turn == 0 else ''}  transformers"
    print(f"{'round':<9}{which}  prefill {seconds['prefill']:.2f} s  decode {1e3 * seconds['decode']:.1f} ms/token  "
          f"whole {seconds['whole']:.2f} s", file=sys.stderr, flush=True)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
