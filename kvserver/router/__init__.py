"""Placing requests on engines: the P/D proxy (extra `router`)."""
