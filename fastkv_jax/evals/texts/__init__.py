"""Texts that suites are made of."""
