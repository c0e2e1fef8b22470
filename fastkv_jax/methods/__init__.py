"""The methods by the names that `--method` takes."""

from fastkv_jax.methods.base import Method, Rows, Scores, Segment
from fastkv_jax.methods.fastkv import FastKV
from fastkv_jax.methods.full import FullKV

METHODS: dict[str, type] = {"full": FullKV, "fastkv": FastKV}

__all__ = ["METHODS", "FastKV", "FullKV", "Method", "Rows", "Scores", "Segment"]
