"""Wrong logins and keys, slowed: by address, and over all addresses.

An address has a few tries; after them each wrong one closes the door for it twice as long as the one before. While it is
closed nothing is compared: the answer is 429 with Retry-After, whatever was sent. When many addresses guess at once,
one that has guessed wrong at all waits; others are still let in at their first try.
"""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable

FREE_TRIES = 10
LONGEST_S = 300.0
FORGET_S = 3600.0  # since an address's last wrong try
MAX_ADDRESSES = 10_000
MOST_OVERALL, OVERALL_S = 100, 60.0  # wrong tries of all addresses


class Guesses:
    """Counts wrong tries. Used from one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()  # address -> tries, when the last one was
        self._recent: deque[float] = deque(maxlen=MOST_OVERALL)

    def wait_s(self, address: str) -> int:
        """Whole seconds until this address may try again; 0 when it may now."""
        now = self._clock()
        tries, last = self._wrong.get(address, (0, 0.0))
        if not tries or now - last > FORGET_S:
            return 0
        closed_s = min(2.0 ** (tries - FREE_TRIES), LONGEST_S) if tries >= FREE_TRIES else 0.0
        wait_s = last + closed_s - now
        if len(self._recent) == MOST_OVERALL:
            wait_s = max(wait_s, self._recent[0] + OVERALL_S - now)
        return max(0, math.ceil(wait_s))

    def wrong(self, address: str) -> None:
        now = self._clock()
        tries, last = self._wrong.pop(address, (0, now))
        self._wrong[address] = (1 if now - last > FORGET_S else min(tries + 1, 64), now)
        self._recent.append(now)
        while len(self._wrong) > MAX_ADDRESSES:
            self._wrong.popitem(last=False)

    def right(self, address: str) -> None:
        self._wrong.pop(address, None)
