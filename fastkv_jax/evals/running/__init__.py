"""Samples through an engine into records, resumed after any end."""
