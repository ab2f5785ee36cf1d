"""Keys and values of tokens that a session reuses: who may have a cache, whose is evicted, recording ahead."""

import logging
import weakref
from collections.abc import Callable

import numpy as np

from engine.contract import Pipeline
from engine.memory import SessionMemory, Work
from engine.policies import TOKEN, changed_tokens, neighbours
from engine.scheduling import gives_way
from engine.settings import EditParams
from pipeline.images import EditError

logger = logging.getLogger(__name__)


class TokenCaches:
    """The token caches of all sessions: at most `places` of them at a time. `clock` is monotonic seconds."""

    def __init__(self, pipeline: Pipeline, places: int, clock: Callable[[], float]):
        self._pipe, self._places, self._clock = pipeline, places, clock
        self._holders: weakref.WeakSet[SessionMemory] = weakref.WeakSet()
        self._records_ahead = True

    def plan(self, work: Work) -> None:
        """Sets `work.cache` and `work.changed` if this frame may use them; else notes why it may not."""
        memory, params = work.memory, work.params
        if params.reuse == "off":
            memory.cache = None
            return
        why = self._refusal(work)
        if why is None:
            why = self._acquire(memory)
        if why is not None:
            work.notes.append(f"reuse: off, {why}")
            memory.seen_with = ()
            return
        if memory.cache_evicted:
            work.notes.append("reuse: all is computed, another session had this one's place meanwhile")
            memory.cache_evicted = False
        work.cache = memory.cache
        with_what = (params, work.size, len(work.rendered.pictures))
        if params.reuse == "frames" and memory.seen_with == with_what and memory.fade is None:
            pairs = zip(work.rendered.pictures, memory.seen, strict=True)
            changed = np.logical_or.reduce([changed_tokens(*pair, params.reuse_threshold) for pair in pairs])
            if changed.mean() <= params.reuse_most:
                work.changed = changed
        memory.seen_with = with_what if memory.fade is None else ()

    def _refusal(self, work: Work) -> str | None:
        if work.params.guided:
            return "guidance is on"
        if work.params.stream_batch:
            return "in a stream batch the frame before is not there yet"
        if work.params.reference_area != "output":
            return "the references are not at the output's area"
        if any(picture.shape != work.rendered.pictures[0].shape for picture in work.rendered.pictures):
            return "the references differ in shape"
        return None

    def possible(self, params: EditParams) -> bool:
        """Whether frames with these settings may reuse tokens."""
        known = self._pipe.fused_transformer is not None
        return known and not params.guided and params.reference_area == "output" and self._places > 0

    def _acquire(self, memory: SessionMemory) -> str | None:
        """Gives the session a token cache, evicting an idle one if need be; or says why it gets none."""
        now = self._clock()
        if memory.cache is None:
            held = {id(m): m for m in self._holders if m.cache is not None}
            may, evicted = gives_way({key: m.cache_used_monotonic for key, m in held.items()}, self._places, now)
            if not may:
                return f"{len(held)} other sessions hold the {self._places} places for it"
            if evicted is not None:
                held[evicted].cache, held[evicted].cache_evicted, held[evicted].seen_with = None, True, ()
            try:
                memory.cache = self._pipe.token_cache()
            except EditError as error:
                return str(error)
            memory.seen_with = ()
            self._holders.add(memory)
        memory.cache_used_monotonic = now
        return None

    def begin(self, work: Work) -> None:
        """Before the first step of a frame that has a cache: which tokens must be computed, and which are next to them."""
        assert work.cache is not None
        work.cache.begin(work.changed, None if work.changed is None else neighbours(work.changed))

    def note_computed(self, work: Work) -> None:
        """After the last step of a frame that has a cache: what each token has seen now."""
        assert work.cache is not None
        work.computed = float(work.cache.computed.mean())
        work.memory.seen = _updated(work.memory.seen, work.rendered.pictures, work.cache.computed)

    def record_ahead(self, memory: SessionMemory) -> None:
        """Between two frames: lets the session's token cache record CUDA graphs that a later frame may need; never raises."""
        if memory.cache is None or not self._records_ahead:
            return
        try:
            memory.cache.record_ahead()
        except Exception:
            logger.exception("nothing is recorded ahead any more: a new share of changed tokens stalls its first frame")
            self._records_ahead = False

    def free_all(self) -> None:
        """Drops the token caches of all sessions: memory has run out."""
        for memory in list(self._holders):
            memory.cache, memory.seen_with = None, ()


def _updated(seen: list[np.ndarray], now: list[np.ndarray], computed: np.ndarray) -> list[np.ndarray]:
    """The pictures as each token last saw them, after a frame that computed these tokens."""
    if computed.all() or len(seen) != len(now):
        return [picture.copy() for picture in now]
    rows, columns = computed.shape
    for old, new in zip(seen, now, strict=True):
        by_token = [p.reshape(rows, TOKEN, columns, TOKEN, 3).swapaxes(1, 2) for p in (old, new)]
        by_token[0][computed] = by_token[1][computed]
    return seen
