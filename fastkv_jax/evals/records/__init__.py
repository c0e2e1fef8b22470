"""What a run writes: a folder that one process owns, parts, records."""
