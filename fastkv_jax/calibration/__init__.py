"""Choosing FastKV's settings for a model by measuring."""
