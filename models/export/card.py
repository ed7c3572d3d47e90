"""The model card of an export: Markdown under a YAML header, as hubs read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import yaml

from models.encoders.encoder import Encoder

if TYPE_CHECKING:
    from models.export.formats import Facts

LIBRARIES = {"safetensors": "pytorch", "torchvision": "pytorch"}  # as hubs call them

LICENCES = (  # as hubs spell them; any other is "other", by name
    *("unknown", "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
)


def card(encoder: Encoder, facts: Facts, to: str, use: str, line: str) -> str:
    """What README.md beside an encoder's files says: what it is, how to load it, from what and how it learned.

    to, use: the format, and the Python that loads it. line: the measured difference from what it was converted from
    """
    name, method = encoder.plan["name"], (facts.method or {}).get("name") or pretrained_by(facts)
    known = facts.licence.lower() in LICENCES
    header = {
        "license": facts.licence.lower() if known else "other",
        **({} if known else {"license_name": facts.licence}),
        "library_name": LIBRARIES.get(to, to),
        "pipeline_tag": "image-feature-extraction",
        "tags": [tag for tag in ("masked-image-modeling", method, name) if tag],
    }
    (height, width), mean, std = facts.size, numbers(facts.mean), numbers(facts.std)
    slots = {"channels": encoder.in_chans, "height": height, "width": width, "mean": mean, "std": std, "name": name}
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}{f', {method}' if method else ''}",
        f"An image encoder for {to}." + "".join(f" {note}" for note in facts.notes),
        table(dict(rows(encoder, facts, to, line))),
        f"## How to load it\n\n```python\n{use.format(**slots)}```",
        f"## Data\n\n{data(facts)}",
        f"## Recipe\n\n{recipe(facts)}",
        f"## Scores\n\n{scores(facts)}",
    ]
    return "\n\n".join(sections) + "\n"


def pretrained_by(facts: Facts) -> str:
    """The method that the run or whoever wrote the weights goes by, empty if unknown."""
    method = ((facts.config or {}).get("method") or {}).get("name", "")
    return method or ("" if facts.origin == "ours" else facts.origin)


def rows(encoder: Encoder, facts: Facts, to: str, line: str) -> Iterator[tuple[str, str]]:
    """What there is to know in a word."""
    plan, (height, width) = encoder.plan, facts.size
    arguments = ", ".join(f"{key} {value}" for key, value in plan["args"].items())
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    yield "architecture", f"`{plan['name']}`" + (f" with {arguments}" if arguments else "")
    yield "parameters", f"{parameters / 1e6:.3g} M"
    yield "images", f"{encoder.in_chans} channels, {height} x {width} px (height x width)"
    yield "normalised", f"on the scale of [0, 1] by mean {numbers(facts.mean)}, std {numbers(facts.std)}"
    yield "cut", f"the short side resized to {1 / facts.crop:.4g} of the size, then its centre"
    yield (
        "last map",
        f"{encoder.dims[-1]} channels, a cell for each {encoder.strides[-1]} px; "
        + ("normed" if encoder.normed else "a norm comes after its mean over places, with the classifier"),
    )
    yield "weights from", f"`{facts.source}` ({'a run of this code' if facts.origin == 'ours' else facts.origin})"
    yield "compared", f"{line}, between what the weights give there and what {to} gives here"
    yield "licence of the weights", facts.licence


def data(facts: Facts) -> str:
    """What it learned from."""
    told = (facts.config or {}).get("data")
    if not told:
        return "Unknown: it is not told with the weights."
    roots = told["root"] if isinstance(told["root"], list) else [told["root"]]
    part = told.get("fraction", 1.0)
    return (
        ", ".join(f"`{root}`" for root in roots) + (f", {part:.4g} of the training images" if part != 1 else "") + "."
    )


def recipe(facts: Facts) -> str:
    """All options of its run."""
    if facts.config is None:
        return "Unknown: it is not told with the weights."
    return f"```yaml\n{yaml.safe_dump(facts.config, sort_keys=False)}```"


def scores(facts: Facts) -> str:
    """The final figures of its run."""
    if not facts.report:
        return "None measured with these weights."
    figures = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in facts.report.items()}
    return f"The final figures of its run:\n\n{table(figures)}"


def table(cells: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {escaped(value)} |" for key, value in cells.items())])


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def numbers(values: list[float]) -> str:
    return f"[{', '.join(f'{value:.6g}' for value in values)}]"
