"""Reading prompts: the doors, the programs of a pass, and who drives them."""
