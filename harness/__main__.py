"""``python -m q4kd.harness COMMAND …``, and the entry point of ``q4kd``."""

import sys

from q4kd.harness.cli.main import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
