"""The server's side of `tcp`: an endpoint in the server, workers that move the bytes."""
