"""How this client reaches an arena. `base` is the seam, `shm` maps the arena of the same host."""
