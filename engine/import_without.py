"""Importing a library without another one that it would only load in case it is needed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def import_without(*names: str) -> Iterator[None]:
    """Inside, `import NAME` raises ModuleNotFoundError, unless NAME was imported before; afterwards all is as it was.

    None in `sys.modules` halts an import (Python language reference, section 5.3.1).
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # typeshed knows modules only
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
