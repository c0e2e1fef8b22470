"""What a prompt leaves behind: the KV cache, what is chosen for it, and its file."""
