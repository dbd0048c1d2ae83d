"""Begins a submitted job on the cluster: travels with the recipe, and needs nothing there but Python.

Not for: anything that the engine itself can say. Only that it is missing must be said without it.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the verb that the arguments name; without an engine to run it, say so in a word."""
    try:
        from jobs.cli import main as engine
    except ModuleNotFoundError as error:
        print(
            "error: this cluster cannot run the engine\n"
            f"  found:   {error} ({sys.executable}, Python {sys.version.split()[0]})\n"
            "  way out: give the cluster an image that has the engine and what it needs, or, where only the engine "
            "itself is missing, send it along: engine submit --with-code",
            file=sys.stderr,
        )
        return 1
    return engine(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
