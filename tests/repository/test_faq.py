"""docs/faq.md has a cure for every sentence with which a program ends or warns, and none for what nobody says any more.

Its ```text blocks hold one message a line, in which … stands for anything.
"""

import re

import pytest

from tests.support.repository import ROOT
from tests.support.sentences import VARYING, in_source, sentences

FAQ = (ROOT / "docs/faq.md").read_text()
MESSAGES = [line for block in re.findall(r"^```text\n(.*?)^```$", FAQ, re.M | re.S) for line in block.splitlines()]
SENTENCES = list(sentences())

_FEWEST_LETTERS = 10
"""Of a sentence that can be looked up: below it, as in "cannot run …", the words are those of what is put in."""


def covers(message: str, sentence: str) -> bool:
    """Whether a line of the FAQ is a sentence's template, with … in it for any part of that."""
    pattern = ".*".join(map(re.escape, message.split(VARYING)))
    return re.fullmatch(pattern, sentence) is not None


def letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def test_the_sources_are_read():
    assert len(SENTENCES) > 100
    assert not [sentence.place for sentence in SENTENCES if not sentence.text], "give the sentence where it is raised"


def test_every_error_has_an_entry():
    missing = [
        f"{sentence.place}: {sentence.text}"
        for sentence in SENTENCES
        if letters(sentence.text) >= _FEWEST_LETTERS and not any(covers(message, sentence.text) for message in MESSAGES)
    ]
    assert not missing, "docs/faq.md says nothing about\n" + "\n".join(missing)


def test_every_entry_has_its_error():
    stale = [message for message in MESSAGES if not any(covers(message, sentence.text) for sentence in SENTENCES)]
    assert not stale, "nothing says this any more\n" + "\n".join(stale)


def test_entries_are_specific():
    assert len(MESSAGES) == len(set(MESSAGES))
    assert all(letters(message) >= 8 for message in MESSAGES), "… alone would cover everything"


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("raise UserError(f'--lr {lr}: too ' + 'large')", ["--lr …: too large"]),
        ("raise UserError(f'no {what}' if a else 'none')", ["no …", "none"]),
        ("def f():\n    return f'{p}: gone'\nraise TrainingError(f())", ["…: gone"]),
        ("def f():\n    checks = {f'--a {a}: no': a}\n    for m in checks:\n        raise UserError(m)", ["--a …: no"]),
        ("say(f'warning: {name} is lost')", ["… is lost"]),
        ("raise UserError(unknown(1))", [""]),
    ],
)
def test_reads_sentences(source, texts):
    assert [sentence.text for sentence in in_source(source, "x")] == texts
