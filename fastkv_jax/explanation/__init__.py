"""Pictures of what was propagated and kept."""
