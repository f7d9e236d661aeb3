"""The server's side of `nixl`: a process that owns the agent and moves the bytes."""
