"""Whom to serve, whom to free, when to take a frame: the engine's decisions about time, as pure functions.

The clock is passed in, in monotonic seconds: each function can be read by itself and tested without waiting. What the
engine decides by looking at pictures is in `policies`.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

RATE_WINDOW_S = 10.0  # a frame rate is measured over this long, or over RATE_FRAMES frames, whichever is shorter
RATE_FRAMES = 31
HOLDER_IDLE_S = 5.0  # a token cache that was not used for this long may go to another session
TAKE_MARGIN_S = 0.002


def next_session(served: Mapping[int, float], now_monotonic: float) -> int:
    """Whom to serve: of the waiting sessions {id: time of last service, or of opening}, the one that waited longest.

    A new session enters at the end and each service moves a session to the end, so every session is reached within as
    many frames as sessions are waiting. Equal waits go by the lower id, the session opened first.
    """
    return max(served, key=lambda key: (now_monotonic - served[key], -key))


def idle_sessions(active: Mapping[int, float], now_monotonic: float, timeout_s: float) -> list[int]:
    """Ids of the sessions {id: time of last activity} that have been quiet for `timeout_s` or longer."""
    return [key for key, time_s in active.items() if now_monotonic - time_s >= timeout_s]


def take_at(busy_until_monotonic: float, encode_s: float) -> float:
    """When to take the next frame while the GPU denoises until `busy_until_monotonic` and encoding takes `encode_s`.

    As late as the encode allows: a frame taken earlier would only be older when it is shown.
    """
    return busy_until_monotonic - 1.25 * encode_s - TAKE_MARGIN_S


def gives_way(used: Mapping[int, float], most: int, now_monotonic: float) -> tuple[bool, int | None]:
    """Whether one more session may hold a token cache, and which must lose its own for that, if any.

    `used` are those that hold one {session: last use}, `most` how many may. Only a cache that lies idle is taken away:
    sessions that took each other's would compute everything in every frame, all of them.
    """
    if len(used) < most:
        return True, None
    oldest = min(used, key=used.__getitem__, default=None)
    if oldest is None or now_monotonic - used[oldest] < HOLDER_IDLE_S:
        return False, None
    return True, oldest


def frame_rate(times: Iterable[float], now_monotonic: float, window_s: float = RATE_WINDOW_S) -> float:
    """Frames per second from the completion times of the last frames; falls towards 0 when they stop coming."""
    recent = [time_s for time_s in times if now_monotonic - time_s < window_s]
    if len(recent) < 2 or now_monotonic <= recent[0]:
        return 0.0
    return (len(recent) - 1) / (now_monotonic - recent[0])


def shown_ages(shown: Sequence[tuple[float, float]], now_monotonic: float, samples: int = 64) -> np.ndarray:
    """How old what a person sees was, in seconds, at `samples` moments evenly spread over the last RATE_WINDOW_S.

    `shown` are the pictures of one stream in order, (time delivered, time its frame was submitted): a picture ages
    until the next one replaces it, and a repeated one goes on ageing. Empty where nothing was shown.
    """
    if len(shown) < 2:
        return np.zeros(0)
    delivered, submitted = np.array(shown).T
    begin = max(delivered[0], now_monotonic - RATE_WINDOW_S)
    if begin >= delivered[-1]:
        return np.zeros(0)
    moments = np.linspace(begin, delivered[-1], samples, endpoint=False)
    return moments - submitted[np.searchsorted(delivered, moments, side="right") - 1]
