"""Tokenizers of a model folder, and which tokens end a turn."""
