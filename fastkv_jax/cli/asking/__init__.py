"""Questions on the command line: read, answered, reported."""
