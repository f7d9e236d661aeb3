"""The pure core: events in, instructions out. No I/O, no threads, no clock of its own."""
