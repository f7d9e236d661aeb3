"""Benchmarks and the demo. Not part of the installed distribution."""
