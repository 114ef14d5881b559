"""YAML files that are one flat table, `name: value` on each line: recipes, and the configurations that runs leave.

Nothing else of YAML is read. In particular no aliases, by which a few lines can stand for gigabytes, and no nesting.
"""

import os
from pathlib import Path
from typing import NamedTuple

import yaml

MOST_BYTES = 64 << 10
"""A configuration with all of its flags has 2 kB."""


class Scalar(NamedTuple):
    """A value of the table."""

    text: str
    """As it stands in the file, without quotes."""
    value: str | int | float | bool | None
    """What YAML 1.1 takes it for: `on` is true, `010` is 8, `1:30` is 90, `1e-3` is text. Dates stay text."""


def read_flat_yaml(path: Path) -> dict[str, Scalar]:
    """The table in a file. Raises OSError; UnicodeDecodeError; yaml.YAMLError; ValueError with a reason, where it is YAML but
    no such table.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 10} kB")
    table: dict[str, Scalar] = {}
    found = False
    key: str | None = None
    depth = 0
    # Events and not nodes: what is not allowed ends the reading where it begins, before anything is built of it.
    for event in yaml.parse(content.decode("utf-8-sig"), Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"line {_line(event)} has an alias or an anchor")
        if isinstance(event, yaml.DocumentStartEvent) and found:
            raise ValueError(f"a second document begins at line {_line(event)}")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"line {_line(event)} has a tag")
        if isinstance(event, yaml.MappingStartEvent) and depth == 0:
            depth, found = 1, True
        elif isinstance(event, yaml.CollectionStartEvent) or (isinstance(event, yaml.ScalarEvent) and depth == 0):
            raise ValueError(f"line {_line(event)} is not of that form")
        elif isinstance(event, yaml.MappingEndEvent):
            depth = 0
        elif isinstance(event, yaml.ScalarEvent):
            if key is not None:
                table[key], key = _scalar(event), None
            elif event.value in table:
                raise ValueError(f"line {_line(event)} gives {event.value} again")
            else:
                key = event.value
    if not found:
        raise ValueError("it is empty")
    return table


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _scalar(event: yaml.ScalarEvent) -> Scalar:
    text = event.value
    try:
        if b"\0" in os.fsencode(text):
            raise ValueError
    except ValueError:
        raise ValueError(f"line {_line(event)} has characters that no flag can have") from None
    loader = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, event.implicit)
    if tag.rpartition(":")[2] not in ("bool", "int", "float", "null"):
        return Scalar(text, text)
    try:
        return Scalar(text, loader.construct_object(yaml.ScalarNode(tag, text)))
    except ValueError:  # 0x_, or a number of more digits than Python converts
        return Scalar(text, text)
