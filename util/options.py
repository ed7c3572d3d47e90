"""Options from one yaml and the command line into dataclasses, and parts from their names; errors are one line each."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from util.config import Part
from util.errors import UserError, told
from util.help import Builders, Help

# what may differ when a run is continued: it changes where and how fast a run goes, not what it computes
FREE = (
    "run.folder",
    "run.device",
    "run.log_every",
    "run.save_every",
    "run.evaluate_every",
    "run.panel",
    "run.probe",
    "data.workers",
)


OPEN = ("data.size", "data.crop", "run.dtype")  # settled as a run begins, where they are left open


class Parser(ArgumentParser):
    """jsonargparse's parser, whose errors are one line, with the nearest valid key, and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(explain(message, self.options()))

    def options(self) -> list[str]:
        names = {option.lstrip("-") for action in self._actions for option in action.option_strings}
        return sorted(name for name in names if name not in ("h", "help", "config", "print_config"))


def explain(message: str, keys: list[str]) -> str:
    """The parser's complaint in one line, naming the nearest key to one that does not exist."""
    message = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --?([\w.]+)|Option '([\w.]+)' is not accepted", message)
    inside = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if unknown or inside:
        key = ".".join(inside.groups()) if inside else unknown[1] or unknown[2]
        near = nearest(key, keys)
        return f"there is no option {key}" + (f"; the nearest is {near}" if near else "")
    config = re.search(r"Parser key \"config\": (File does not exist|Path is not a file): '(.*)'", message)
    if config:
        folder = Path(config[2]) if Path(config[2]).is_dir() else Path(config[2]).parent
        yamls = sorted(path.name for path in folder.glob("*.yaml"))
        near = difflib.get_close_matches(Path(config[2]).name, yamls, n=3, cutoff=0.0)
        there = f"the nearest there are {', '.join(near)}" if near else "the recipes are in configs/"
        return f"--config {config[2]} {'is a folder' if folder == Path(config[2]) else 'does not exist'}; {there}"
    yaml_of = re.search(r"Parser key \"([\w.]+)\": Unable to load config '(.*?)'", message)
    if yaml_of and f"{yaml_of[1]}.name" in keys:
        return f"--{yaml_of[1]} takes a yaml, and there is no {yaml_of[2]}; what to build goes to --{yaml_of[1]}.name"
    typed = re.search(r'Parser key "([\w.]+)":.*(?:Got value|Given value): (.*)', message)
    if typed:
        wanted = re.findall(r"Expected an? (?:<class '([\w.]+)'>|([^.]*))", message)
        kinds = " or ".join(dict.fromkeys(a or b for a, b in wanted)).replace("NoneType", "null") or "of another kind"
        return f"{typed[1]} is {typed[2]}, but has to be {kinds}"
    return message


def nearest(key: str, keys: list[str]) -> str | None:
    """The option most like a misspelt one, by its whole name or else by its last word."""
    leaves = [k for k in keys if not any(other.startswith(k + ".") for other in keys)]
    by_end = {k.rpartition(".")[2]: k for k in leaves}
    whole = difflib.get_close_matches(key, leaves, n=1, cutoff=0.6)
    ends = difflib.get_close_matches(key.rpartition(".")[2], by_end, n=1, cutoff=0.0)
    return whole[0] if whole else by_end[ends[0]] if ends else None


def parser_of(schema: type, builders: Builders | None = None) -> Parser:
    """The parser of a schema's options; its --help asks `builders` for what takes the arguments of a named part."""
    program, title = Path(sys.argv[0]).name, schema.__doc__.splitlines()[0]
    parser = Parser(allow_abbrev=False, description=title, prog=program, add_help=False)
    if builders is not None:
        parts = [field.name for field in fields(schema) if field.type in ("Part", "Part | None")]
        text = f"show this; after --config or --{parts[-1]}.name NAME also the arguments of what is named there"
        parser.add_argument("-h", "--help", action=Help, parts=parts, builders=builders, help=text)
    parser.add_argument("--config", action="config", help="a yaml with any of the options below")
    parser.add_class_arguments(schema)
    return parser


def read(schema: type, argv: list[str] | None = None, builders: Builders | None = None) -> tuple[Any, dict]:
    """The options in a yaml and on the command line: as dataclasses, and as the plain dict that describes the run.

    builders: for --help, see util/help.py. UserError, in one line, for an unknown or ill-typed key or a file that
    cannot be read.
    """
    parser = parser_of(schema, builders)
    found = parser.parse_args(argv)
    plain = yaml.safe_load(parser.dump(found, skip_none=False))
    return schema(**{k: v for k, v in vars(parser.instantiate(found)).items() if k != "config"}), plain


def named(what: str, name: str, table: dict[str, Callable]) -> Callable:
    """The builder of that name. UserError for an unknown one, naming the nearest."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.0)
        raise UserError(f'no {what} is called "{name}"; the nearest is "{near[0]}" of {", ".join(table)}')
    return table[name]


def build(what: str, part: Part, table: dict[str, Callable], *given, **options) -> Any:
    """Call the builder of a part's name with `given` and the part's arguments, checked against its signature.

    UserError for an unknown name or argument, naming the nearest.
    """
    builder = named(what, part.name, table)
    parser = Parser()
    taken = {"self", *list(builder.__annotations__ or {})[: len(given)], *options}
    add = parser.add_class_arguments if isinstance(builder, type) else parser.add_function_arguments
    add(builder, skip=taken)
    try:
        found = parser.parse_object(Namespace(**part.args))
    except UserError as error:
        raise UserError(f"{what}.args of {part.name}: {error}") from None
    with told(f"{what} {part.name}"):
        return builder(*given, **options, **vars(found))


def claim_folder(folder: Path, plain: dict, schema: type) -> None:
    """Write the run's config into its folder, or check that the run that the folder holds is this one.

    An option that the folder's config lacks, since it is newer, has its default there; one of OPEN that is left open
    is as it is there.

    UserError naming the keys that differ, or if the folder cannot be used.
    """
    path = folder / "config.yaml"
    try:
        there = flat(yaml.safe_load(path.read_text())) if path.exists() else None
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, yaml.YAMLError, AttributeError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"run.folder {folder} cannot be used, choose another or remove it: {line}") from error
    for key in OPEN if there is not None else ():
        section, name = key.split(".")
        if section in plain and plain[section].get(name) is None:
            plain[section][name] = there.get(key)
    text = yaml.safe_dump(plain, sort_keys=False)
    here = flat(yaml.safe_load(text))
    if there is not None:
        there = defaults(schema, here) | there
        differing = [k for k in {**here, **there} if here.get(k) != there.get(k) and k not in FREE]
        if differing:
            pairs = ", ".join(f"{k} ({there.get(k)} there, {here.get(k)} here)" for k in differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise UserError(
                f"{folder} holds another run: {pairs}{more} differ; choose another run.folder or remove it. Only the "
                f"command that began it resumes it; --weights {folder} starts a new run from its weights, elsewhere"
            )
    path.write_text(text)


def defaults(schema: type, keys: Collection[str]) -> dict[str, Any]:
    """Of those options among `keys` that have a default, by key."""
    parser = parser_of(schema)
    plain = flat(yaml.safe_load(parser.dump(parser.get_defaults(), skip_none=False, skip_validation=True)))
    return {key: value for key, value in plain.items() if key in keys}


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
