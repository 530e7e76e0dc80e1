"""Asked to end, a service first finishes what it has in hand."""

import signal
import time


class Ending:
    """SIGTERM and SIGINT, remembered until the item in hand is done; a context of the main thread."""

    asked: int | None = None

    def __enter__(self) -> "Ending":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: object) -> None:
        self.asked = number

    def wait(self, seconds: float) -> None:
        """Sleep, in slices: Python goes on sleeping after a signal."""
        until = time.monotonic() + seconds
        while self.asked is None and (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, 0.2))
