"""What is known of a way to write checkpoints, and by what it is recognised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from models.encoders.released.common import State

Rename = Callable[[str], str | None]  # our key for an official one; None if it is not the encoder's
Describe = Callable[[State], tuple]  # the name and arguments with which `build_encoder` makes it, and remarks if any


def as_it_is(state: State) -> State:
    return state


def nothing(state: State, args: dict) -> list[str]:
    return []


@dataclass(frozen=True)
class Family:
    """Encoders whose checkpoints are spelled alike.

    name:     by which a user may insist on it
    holds:    whether a state is of this family
    rename:   our key for one of a prepared state
    describe: how to build the encoder of a prepared state; KeyError names what is missing
    prepare:  the state in whose keys `rename` and `describe` are written
    assumes:  in words, what no tensor of a prepared state told `describe`
    """

    name: str
    holds: Callable[[State], bool]
    rename: Rename
    describe: Describe
    prepare: Callable[[State], State] = as_it_is
    assumes: Callable[[State, dict], list[str]] = nothing


@dataclass(frozen=True)
class Dialect:
    """How a library spells what official repositories wrote first.

    speaks:   whether a state is spelled so
    official: the same state in the official spelling
    """

    name: str
    speaks: Callable[[State], bool]
    official: Callable[[State], State]


def has(*words: str) -> Callable[[State], bool]:
    """Whether a state has, for each of the words, a key that contains it."""
    return lambda state: all(any(word in key for key in state) for word in words)


def begins(*starts: str) -> Callable[[State], bool]:
    """Whether any key of a state, with or without "encoder." before it, begins with one of these."""
    return lambda state: any(key.removeprefix("encoder.").startswith(starts) for key in state)
