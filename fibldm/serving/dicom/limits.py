"""What a caller may ask of the node; beyond it, a transfer is cut off or an object refused."""

import threading
import time
from collections import deque
from dataclasses import dataclass, fields

from fibldm.errors import FibldmError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Of one node, for all callers alike.

    Attributes:
        associations: at a time.
        pdu: bytes of a protocol data unit.
        object_bytes: of an object.
        association_bytes: of all that comes in an association.
        objects_per_minute: from one caller.
        idle: seconds after which a silent connection is closed, one that has not asked for an association included.
        wait: seconds for which a structure set waits for its series, and an image for its structure set.

    Raises:
        FibldmError: one is not above 0.
    """

    associations: int = 10
    pdu: int = 2**17
    object_bytes: int = 512 * MIB
    association_bytes: int = 4096 * MIB
    objects_per_minute: int = 3000
    idle: float = 60.0
    wait: float = 1800.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not (value := getattr(self, field.name)) > 0:
                raise FibldmError(f"limits of a node must be above 0; {field.name} is {value:g}", "leave it out")
        if self.pdu < 4096:
            raise FibldmError(f"`max_pdu` must be at least 4096 bytes; got {self.pdu}", "16384 is usual")


class Pace:
    """Counts what came within the last minute."""

    def __init__(self, most: int) -> None:
        self._most, self._times, self._lock = most, deque[float](), threading.Lock()

    def allows(self) -> bool:
        """Whether one more may come now; it then counts."""
        now = time.monotonic()
        with self._lock:
            while self._times and now - self._times[0] > 60:
                self._times.popleft()
            if len(self._times) >= self._most:
                return False
            self._times.append(now)
            return True
