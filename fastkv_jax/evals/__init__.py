"""What is asked of a model with a long prompt, and how answers are scored."""
