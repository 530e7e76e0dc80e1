"""Progress bars: seen on a terminal, silent elsewhere, and never in the way of what goes through them."""

import io
from functools import partial
from typing import Any

import pytest
from rich.console import Console

from fibldm import progress


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> io.StringIO:
    """What is written on a terminal, or on none."""
    screen = io.StringIO()
    console: Any = partial(Console, file=screen, force_terminal=request.param)
    monkeypatch.setattr(progress, "Console", lambda stderr: console())
    return screen


@pytest.mark.parametrize(("screen", "is_terminal"), [(True, True), (False, False)], indirect=["screen"])
def test_a_terminal_sees_what_is_done_and_how_far_and_a_log_no_bar(screen: io.StringIO, is_terminal: bool) -> None:
    assert list(progress.track([1, 2, 3], "encode")) == [1, 2, 3]
    with progress.reading(io.BytesIO(b"abc"), 3, "weights.bin") as stream:
        assert stream.read() == b"abc"
    with progress.bar() as shown:
        shown.advance(shown.add_task("decode", total=1))
    if is_terminal:
        assert all(part in screen.getvalue() for part in ("encode", "100%", "weights.bin", "3/3", "decode"))
    else:
        assert screen.getvalue() == ""


@pytest.mark.parametrize("screen", [True], indirect=True)
def test_a_bar_can_be_left_out_and_lie_within_another(screen: io.StringIO) -> None:
    list(progress.track([1], "hidden", shown=False))
    assert "hidden" not in screen.getvalue()
    for _ in progress.track([1], "outer"):
        list(progress.track([1], "inner"))
    assert "outer" in screen.getvalue() and "inner" in screen.getvalue()
