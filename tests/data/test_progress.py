"""A bar on a terminal, nothing elsewhere."""

import io

import pytest
from rich.console import Console

from tinybert_fast.data import progress
from tinybert_fast.data.lines import Lines


@pytest.fixture
def screen(monkeypatch):
    text = io.StringIO()
    terminal = Console(file=text, force_terminal=True, _environ={})
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    return text


@pytest.mark.parametrize("on", [True, False])
def test_a_terminal_sees_how_far_it_is(screen, on):
    assert list(progress.shown("abc", "reading", 3, on)) == ["a", "b", "c"]
    assert ("reading" in screen.getvalue()) is on


def test_a_pipe_sees_nothing(capfd):
    assert list(progress.shown("abc", "reading")) == ["a", "b", "c"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("on", [True, False])
def test_a_corpus_is_read_with_a_bar(screen, on):
    assert Lines.of(["the film", "was good"]).survey(progress=on)[0] == 2
    assert ("reading the corpus" in screen.getvalue()) is on
