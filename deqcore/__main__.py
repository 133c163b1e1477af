"""`python -m deqcore`: the command line."""

from __future__ import annotations

from deqcore.cli.app import main

if __name__ == "__main__":
    main()
