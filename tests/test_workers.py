"""Work that processes share: those that users get, which begin anew; other tests fork them, see ``processes.py``."""

import multiprocessing
import operator
import os

import pytest

from fibldm.errors import FibldmError
from fibldm.workers import in_processes


@pytest.fixture(autouse=True)
def begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fibldm.workers.get_context", multiprocessing.get_context)


def test_results_come_in_the_order_of_the_calls() -> None:
    calls = [(number, 2) for number in range(5)]
    made = in_processes(operator.pow, calls, workers=2, bar=iter, what="computed")  # type: ignore[arg-type]
    assert list(made) == [0, 1, 4, 9, 16]


def test_a_process_that_was_killed_is_an_error() -> None:
    with pytest.raises(FibldmError, match="a process that computed was killed, likely for memory; use fewer --workers"):
        list(in_processes(os._exit, [(1,), (1,)], workers=2, bar=iter, what="computed"))  # type: ignore[arg-type]
