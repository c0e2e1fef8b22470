"""Flags that commands share, and what they ask for."""
