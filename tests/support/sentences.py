"""The sentences with which the programs end or warn, read from the sources without running them.

Each is a template: … stands for what is put in when it is said.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from tests.support.repository import ROOT, files

VARYING = "…"
ENDS = ("UserError", "BusyError", "TrainingError", "LostRankError", "DataSourceError", "ArgumentTypeError")
_WARNING = "warning: "


class Sentence(NamedTuple):
    """A template, and where it is said."""

    text: str
    place: str


def sentences() -> Iterator[Sentence]:
    """All of the project's own sources. A sentence that cannot be read off has the text ""."""
    for path in files("*.py", ":!tests"):
        yield from in_source(path.read_text(), str(path.relative_to(ROOT)))


def in_source(source: str, place: str) -> Iterator[Sentence]:
    """Errors that are raised or returned, and what begins with "warning: ", in a module's source."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    around = {node: function for function in functions.values() for node in ast.walk(function)}
    pieces = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name_of(node.func) in ENDS and node.args:
            for text in _texts(node.args[0], around.get(node), functions) or [""]:
                yield Sentence(text, f"{place}:{node.lineno}")
        elif isinstance(node, ast.JoinedStr | ast.Constant) and node not in pieces:
            text = _template(node) or ""
            if text.startswith(_WARNING) and text != _WARNING:
                yield Sentence(text.removeprefix(_WARNING), f"{place}:{node.lineno}")


def _name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _template(node: ast.expr) -> str | None:
    """A string expression as a template; None for any other expression."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else VARYING for part in parts)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            one, other = _template(left), _template(right)
            return None if one is None and other is None else (one or VARYING) + (other or VARYING)
    return None


def _texts(node: ast.expr, around: ast.FunctionDef | None, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """What an argument can be: itself, what a function of this module returns, or the strings that its name stands for."""
    text = _template(node)
    if text is not None:
        return [text]
    if isinstance(node, ast.Call) and _name_of(node.func) in functions:
        returns = ast.walk(functions[_name_of(node.func)])
        return [text for end in returns if isinstance(end, ast.Return) and end.value and (text := _template(end.value))]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, around, functions) + _texts(node.orelse, around, functions)
    if isinstance(node, ast.Name) and around:  # a table of sentences, or a variable
        found = []
        for other in ast.walk(around):
            values: list[ast.expr | None] = []
            if isinstance(other, ast.Dict):
                values = list(other.keys)
            elif isinstance(other, ast.Assign) and node.id in map(_name_of, other.targets):
                values = [other.value]
            found += [text for value in values if value is not None and (text := _template(value)) is not None]
        return found
    return []
