"""Errors that a user can mend, and how they are told."""

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

REFUSALS = (ValueError, TypeError, RuntimeError, AssertionError, ArithmeticError)  # of models that cannot be


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, in the user's numbers, and what to do."""


@contextmanager
def told(what: str) -> Iterator[None]:
    """What the models refuse inside becomes a UserError: one line that begins with `what`."""
    try:
        yield
    except REFUSALS as error:
        raise UserError(f"{what}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says, in one line; of an assertion with the numbers in it, and if it says nothing, where it is."""
    said = next(iter(str(error).strip().splitlines()), "")
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames or (said and not isinstance(error, AssertionError)):
        return said or type(error).__name__
    last, (frame, _) = traceback.extract_tb(error.__traceback__)[-1], frames[-1]
    values = {name: frame.f_locals.get(name) for name in re.findall(r"\w+", last.line)}
    numbers = ", ".join(f"{name} {value}" for name, value in values.items() if isinstance(value, (int, float, tuple)))
    place = f"{'/'.join(Path(last.filename).parts[-3:])}, line {last.lineno}"
    said = said or f"{type(error).__name__} in {place}: {last.line}"
    return f"{said} ({numbers})" if numbers else said


def command(main: Callable[[], None]) -> NoReturn:
    """Run a main; what the user can mend is told in one line, with exit code 2 and no traceback."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
