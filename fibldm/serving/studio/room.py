"""Room for requests: so many are taken in at a time, and so many jobs wait."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fibldm.serving.service import Service
from fibldm.serving.store import State
from fibldm.serving.studio.guard import Refusal
from fibldm.serving.studio.limits import Limits


class Room:
    """Shared by all addresses of a studio.

    Args:
        service: has the jobs.
        limits: of requests.
    """

    def __init__(self, service: Service, limits: Limits) -> None:
        self._service, self._limits, self._reading = service, limits, 0
        self.submitting = threading.Lock()
        """Held from `check` until the job is in the store."""

    @contextmanager
    def reader(self) -> Iterator[None]:
        """For a request whose files are taken in; in the thread of the event loop.

        Raises:
            Refusal: there are as many as may be.
        """
        if self._reading >= self._limits.readers:
            raise busy("the studio takes in as many requests as it can")
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    def check(self) -> None:
        """See that one more job may wait.

        Raises:
            Refusal: so many do already.
        """
        if len(self._service.store.jobs(State.HELD, State.WAITING)) >= self._limits.waiting:
            raise busy(f"at most {self._limits.waiting} jobs wait at a time")


def busy(message: str) -> Refusal:
    """A request that may come again."""
    return Refusal(429, message, "come again in a while", {"Retry-After": "10"})
