"""What the server says about itself: GET /health, /ready and /metrics.

Three questions, three answers. /health is 200 as long as the process answers at all, and tells a page or a person
everything; /ready is 200 only when an edit would be taken now, which is what a load balancer asks; /metrics is for
Prometheus.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.requests import Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.statistics import EngineStats
from serving.edit import EditQueue
from serving.holder import EngineHolder
from serving.live import LiveRoom
from serving.models import PHASES, Health, Ready

PREFIX = "image_editor"


def resident_bytes() -> int:
    """Memory of this process; where there is no /proc, the most it ever was."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource  # there is none on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class StatusDesk:
    """The handlers of /health, /ready and /metrics. They raise nothing: a server that answers at all answers these."""

    def __init__(self, holder: EngineHolder, queue: EditQueue, room: LiveRoom, registry: CollectorRegistry):
        """`registry` has the metrics that others count; what is read when asked for is added to it here."""
        self._holder, self._queue, self._room, self._registry = holder, queue, room, registry
        registry.register(ServerCollector(holder, queue, room))
        ProcessCollector(registry=registry)

    async def health(self) -> Health:
        """Always 200. What runs and what it did is there when the model is."""
        status, memory = self._holder.status(), {"process": resident_bytes()}
        if (engine := self._holder.engine) is not None:
            stats = engine.stats()
            memory |= {f"gpu_{kind}": count for kind, count in stats.memory.items()}
            status["stats"] = stats
        load: dict[str, Any] = {"queue": self._queue.summary(), "live": self._room.summary(), "decoder": self._holder.decoder.summary()}
        return Health(**status, **load, memory_bytes=memory)

    async def ready(self, response: Response) -> Ready:
        """200 when an edit would be taken now, otherwise 503 and why."""
        status = self._holder.status()
        if status["state"] != "ready":
            response.status_code = 503
        if status["state"] in ("loading", "stopping"):
            response.headers["Retry-After"] = "5"
        return Ready(state=status["phase"], text=status["text"], fraction=status["fraction"])

    async def metrics(self, request: Request) -> Response:
        """What /health tells, in numbers: in Prometheus's text format, or in OpenMetrics if the Accept header asks for that."""
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (ValueError, TypeError):  # of a version that is no number
            encode, content_type = choose_encoder("")
        return Response(encode(self._registry), headers={"Content-Type": content_type})


class ServerCollector(Collector):
    """The server's and the engine's own counts as metrics, read when they are asked for."""

    def __init__(self, holder: EngineHolder, queue: EditQueue, room: LiveRoom):
        self._holder, self._queue, self._room = holder, queue, room

    def describe(self) -> list[Metric]:
        return []  # so that registering does not collect

    def collect(self) -> Iterator[Metric]:
        phase = self._holder.status()["phase"]
        queue, room, decoder = self._queue.summary(), self._room.summary(), self._holder.decoder.summary()
        yield gauge("ready", "1 when an edit would be taken now.", phase == "ready")
        yield gauge("phase", "1 for the phase the model is in.", {each: each == phase for each in PHASES}, "phase")
        states = {state: queue[state] for state in ("waiting", "running")}
        yield gauge("queue_requests", "POST /edit requests.", states, "state")
        yield gauge("queue_places", "How many of them are let in.", queue["places"])
        yield gauge("queue_held_bytes", "What they hold in memory.", queue["held_bytes"])
        yield gauge("live_sockets", "Open live sockets.", room["sockets"])
        yield gauge("live_sessions", "Live views that have a session.", room["sessions"])
        yield gauge("live_waiting", "Live views that wait in line for one.", room["waiting"])
        states = {state: decoder[state] for state in ("waiting", "running")}
        yield gauge("decoder_pictures", "Pictures that a process of their own opens.", states, "state")
        yield gauge("decoder_held_pixels", "Pixels of opened pictures that are in memory.", decoder["held_pixels"])
        yield counter("decoder_refused", "Pictures that found no place or got no turn.", decoder["refused"])
        yield counter("decoder_killed", "Processes that ended before their picture was open.", decoder["killed"])
        if (engine := self._holder.engine) is not None:
            yield from engine_metrics(engine.stats())


def engine_metrics(stats: EngineStats) -> Iterator[Metric]:
    yield counter("frames", "Pictures delivered.", stats.frames)
    yield counter("errors", "Frames that failed in the engine.", stats.errors)
    yield counter("dropped", "Frames replaced by newer ones.", stats.dropped)
    yield counter("skipped", "Delivered pictures that repeat the last for a like frame.", stats.skipped)
    yield gauge("sessions", "Open sessions of the engine.", stats.sessions)
    yield gauge("frames_per_second", "Of all sessions.", stats.fps)
    yield gauge("skipped_ratio", "Share of the delivered pictures that repeat the last.", stats.skip_rate)
    yield gauge("computed_ratio", "Mean share of the tokens that were computed, not reused.", stats.computed)
    yield gauge("cache_hit_ratio", "Share of the look-ups in all caches.", stats.cache_hits)
    latency = {"50": stats.latency_p50_ms / 1000, "95": stats.latency_p95_ms / 1000}
    yield gauge("latency_seconds", "Submit to done, of the last frames.", latency, "percentile")
    ages = {"50": stats.age_p50_ms / 1000, "95": stats.age_p95_ms / 1000}
    yield gauge("frame_age_seconds", "Of what people see, at any moment.", ages, "percentile")
    stages = {stage: ms / 1000 for stage, ms in stats.stages_ms.items()}
    yield gauge("stage_seconds", "Mean of the last frames.", stages, "stage")
    if stats.memory:
        yield gauge("gpu_memory_bytes", "As torch counts it.", stats.memory, "kind")
    for kind in ("hits", "misses"):
        counts = {name: cache[kind] for name, cache in stats.cache_summary.items()}
        yield counter(f"cache_{kind}", f"Cache {kind}.", counts, "cache")
    for kind in ("entries", "bytes"):
        counts = {name: cache[kind] for name, cache in stats.cache_summary.items()}
        yield gauge(f"cache_{kind}", f"Cache {kind}.", counts, "cache")


def gauge(name: str, about: str, values: float | Mapping[str, float], label: str = "") -> Metric:
    return _filled(GaugeMetricFamily, name, about, values, label)


def counter(name: str, about: str, values: float | Mapping[str, float], label: str = "") -> Metric:
    """Its samples are named `name`_total."""
    return _filled(CounterMetricFamily, name, about, values, label)


def _filled(family, name: str, about: str, values: float | Mapping[str, float], label: str) -> Metric:
    """The metric with its value, or with one for each value of its label."""
    if not isinstance(values, Mapping):
        return family(f"{PREFIX}_{name}", about, value=values)
    metric = family(f"{PREFIX}_{name}", about, labels=[label])
    for text, value in values.items():
        metric.add_metric([text], value)
    return metric
