"""`python -m kvserver` is the command `kvserver`."""

from kvserver.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
