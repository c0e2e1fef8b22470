"""The suites: their samples and how answers are scored."""
