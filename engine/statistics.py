"""What the engine did since it started: counters, and the last frames' times for rates, percentiles and means."""

import collections
import dataclasses

import numpy as np

from engine.scheduling import RATE_FRAMES, frame_rate, shown_ages
from engine.sessions import HISTORY_FRAMES, Sessions
from engine.streams import STAGES


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What the engine did since it started; rates, percentiles and means are over its last frames."""

    fps: float
    latency_p50_ms: float  # submit to done
    latency_p95_ms: float
    sessions: int
    frames: int  # delivered pictures, repeated ones included
    skipped: int  # of these, repeated ones
    dropped: int
    errors: int
    stages_ms: dict[str, float]  # means
    cache_summary: dict[str, dict[str, int]]  # the pipeline's, as of the last frame
    memory: dict[str, int]  # bytes on the GPU: allocated, reserved, peak; empty on the CPU
    # The age of what people see, at any moment: since its frame was submitted, until the next picture replaces it.
    age_p50_ms: float
    age_p95_ms: float
    skip_rate: float  # of delivered pictures
    computed: float  # mean share of the tokens that were computed, not reused
    cache_hits: float  # share of look-ups in the pipeline's caches
    pace: tuple[str, ...]  # what it picked, for each session that asked for a rate or a latency


class Statistics:
    """The counters behind EngineStats. Used with the sessions' lock held."""

    def __init__(self):
        self.errors = 0
        self.cache_summary: dict[str, dict[str, int]] = {}
        self._frames = self._skipped = 0
        self._done_times: collections.deque[float] = collections.deque(maxlen=RATE_FRAMES)
        self._latencies_ms: collections.deque[float] = collections.deque(maxlen=HISTORY_FRAMES)
        self._stages_ms: collections.deque[dict] = collections.deque(maxlen=HISTORY_FRAMES)  # of computed frames
        self._computed: collections.deque[float] = collections.deque(maxlen=HISTORY_FRAMES)

    def add_repeated(self, latency_ms: float, now_monotonic: float) -> None:
        """A delivered frame that repeats the last picture."""
        self._skipped += 1
        self._add(latency_ms, now_monotonic)

    def add_computed(self, latency_ms: float, stages_ms: dict[str, float], share: float, now_monotonic: float) -> None:
        """A delivered frame of which this `share` of the tokens was computed."""
        self._stages_ms.append(stages_ms)
        self._computed.append(share)
        self._add(latency_ms, now_monotonic)

    def _add(self, latency_ms: float, now_monotonic: float) -> None:
        self._frames += 1
        self._latencies_ms.append(latency_ms)
        self._done_times.append(now_monotonic)

    def summary(self, sessions: Sessions, memory: dict[str, int], now_monotonic: float) -> EngineStats:
        """All of it as of now. `memory` is bytes on the GPU, by kind."""
        latencies, stages = list(self._latencies_ms) or [0.0], list(self._stages_ms)
        ages = np.concatenate([[], *(shown_ages(s.shown, now_monotonic) for s in sessions)]) * 1000
        looked = [sum(c[kind] for c in self.cache_summary.values()) for kind in ("hits", "misses")]
        return EngineStats(
            fps=frame_rate(self._done_times, now_monotonic),
            latency_p50_ms=float(np.percentile(latencies, 50)),
            latency_p95_ms=float(np.percentile(latencies, 95)),
            sessions=len(sessions),
            frames=self._frames,
            skipped=self._skipped,
            dropped=sessions.dropped,
            errors=self.errors,
            stages_ms={name: sum(s[name] for s in stages) / len(stages) for name in STAGES} if stages else {},
            cache_summary=self.cache_summary,
            memory=memory,
            age_p50_ms=float(np.percentile(ages, 50)) if ages.size else 0.0,
            age_p95_ms=float(np.percentile(ages, 95)) if ages.size else 0.0,
            skip_rate=self._skipped / max(1, self._frames),
            computed=float(np.mean(self._computed)) if self._computed else 1.0,
            cache_hits=looked[0] / max(1, sum(looked)),
            pace=tuple(s.pace.text for s in sessions if s.pace.text),
        )
