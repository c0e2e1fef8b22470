"""The model: its numbers, its layers, and where they live and run; no cache, no method, no loop."""
