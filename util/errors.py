"""Errors that a user can mend, and how they are told."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, in the user's numbers, and what to do."""


def command(main: Callable[[], None]) -> NoReturn:
    """Run a main; what the user can mend is told in one line, with exit code 2 and no traceback."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
