"""Tokens after a prompt: one step, the loop, and the text that it makes."""
