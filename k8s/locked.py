"""Print the part of requirements.lock that the image needs: pins and hashes as they stand, without the tools of tests.

    python k8s/locked.py demo openvino          the project's dependencies and these extras

With the standard library alone: it runs before anything is installed. Who wants a package is said below it in the lock
file (`# via`).
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Write to stdout."""
    print(locked_part(ROOT, sys.argv[1:]), end="")


def locked_part(root: Path, extras: Iterable[str]) -> str:
    """Blocks of the lock file for the project with these extras, and for all that they need."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = [*project["dependencies"]]
    for extra in extras:
        direct += project["optional-dependencies"][extra]
    text = (root / "requirements.lock").read_text(encoding="utf-8")
    # A package may have several, each for other versions of Python.
    blocks = [(name_of(block), block) for block in re.split(r"\n(?=[a-z])", text)[1:]]
    names = {name for name, _ in blocks}
    wanted = {name_of(requirement) for requirement in direct}
    if absent := wanted - names:
        raise SystemExit(f"requirements.lock has no {', '.join(sorted(absent))}: run `make lock`")
    grew = True
    while grew:
        more = {name for name, block in blocks if wanted & wanted_by(block)} - wanted
        wanted |= more
        grew = bool(more)
    return "".join(block.rstrip("\n") + "\n" for name, block in blocks if name in wanted)


def name_of(requirement: str) -> str:
    """Of the package, as the index spells it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def wanted_by(block: str) -> set[str]:
    """Names below `# via`; the project itself is not among them."""
    _, _, said = block.partition("# via")
    return {name_of(line) for line in re.findall(r"^ *#? *([A-Za-z0-9._-]+)", said, re.MULTILINE)}


if __name__ == "__main__":
    main()
