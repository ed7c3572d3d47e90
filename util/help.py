"""--help: every option of a run, and the arguments of the parts that are named before it."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from textwrap import indent

Builders = Callable[[str, str], Sequence[Callable]]  # a part and its name -> what takes its arguments
# these are given by the mains or follow from data.size, so they are no arguments of a part
GIVEN = {"name", "encoder", "classes", "bank", "tests", "in_chans", "num_classes", "img_size", "device", "dtype"}


class Help(argparse.Action):
    """Tell all options, then the arguments of each part that was named before; only then are its builders imported."""

    def __init__(self, option_strings: list[str], dest: str, parts: Sequence[str], builders: Builders, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)
        self.parts, self.builders = parts, builders

    def __call__(self, parser, found, values, option_string=None) -> None:
        parser.print_help()
        for part in self.parts:
            options = found.get(part)
            options = getattr(options, "init_args", options)  # those of a part that may be None are wrapped
            name = getattr(options, "name", None)
            if name is None:
                print(f"\n{part}.args: those of its name, listed by --{part}.name NAME --help")
            else:
                print(f"\n{listing(part, name, self.builders(part, name))}")
        parser.exit()


def listing(part: str, name: str, builders: Sequence[Callable]) -> str:
    """The arguments of a part of some name, with kinds and defaults, under what each of their builders says of them."""
    lines, told = [], set(GIVEN)
    for builder in builders:
        brings = f"; {name} may bring other defaults than these" if lines else ""
        lines += [f"{part}.args of {name}, for {builder.__name__}{brings}:"]
        lines += [indent(inspect.cleandoc(builder.__doc__ or ""), "  ")] if builder.__doc__ else []
        for argument in inspect.signature(builder).parameters.values():
            if argument.name not in told and argument.kind != argument.VAR_KEYWORD:
                kind = f"{kind_of(argument)}, " if argument.annotation is not argument.empty else ""
                default = "needed" if argument.default is argument.empty else f"default: {argument.default}"
                lines.append(f"  --{part}.args.{argument.name}  ({kind}{default})")
                told.add(argument.name)
    return "\n".join(lines)


def kind_of(argument: inspect.Parameter) -> str:
    kind = argument.annotation
    return kind if isinstance(kind, str) else inspect.formatannotation(kind).replace("typing.", "")
