"""What XLA has made of a program, read in its own text."""
