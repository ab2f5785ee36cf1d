"""What the server says about itself: GET /health, /ready and /metrics.

Three questions, three answers. /health is 200 as long as the process answers at all, and tells a page or a person
everything; /ready is 200 only when an edit would be taken now, which is what a load balancer asks; /metrics is for
Prometheus, in its text format 0.0.4, written here because it is twenty lines.
"""

import collections
import os
import sys
import time
from collections.abc import Iterable, Mapping

from fastapi.responses import PlainTextResponse, Response

from serving.edit import EditQueue
from serving.holder import EngineHolder
from serving.live import LiveRoom
from serving.models import PHASES, Health, Ready

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "image_editor"


def resident_bytes() -> int:
    """Memory of this process; where /proc is not to be had, the most it ever was."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource  # there is none on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class StatusDesk:
    """The handlers of /health, /ready and /metrics."""

    def __init__(self, holder: EngineHolder, queue: EditQueue, room: LiveRoom, answered: collections.Counter):
        self._holder, self._queue, self._room, self._answered = holder, queue, room, answered
        self._started_monotonic = time.monotonic()

    async def health(self) -> Health:
        """Always 200. What runs and what it did is there when the model is."""
        status, memory = self._holder.status(), {"process": resident_bytes()}
        if (engine := self._holder.engine) is not None:
            stats = engine.stats()
            memory |= {f"gpu_{kind}": count for kind, count in stats.memory.items()}
            status["stats"] = stats
        return Health(**status, queue=self._queue.summary(), live=self._room.summary(), memory_bytes=memory)

    async def ready(self, response: Response) -> Ready:
        """200 when an edit would be taken now, otherwise 503 and why."""
        status = self._holder.status()
        if status["state"] != "ready":
            response.status_code = 503
        if status["state"] in ("loading", "stopping"):
            response.headers["Retry-After"] = "5"
        return Ready(state=status["phase"], text=status["text"], fraction=status["fraction"])

    async def metrics(self) -> Response:
        """The same in numbers, in Prometheus's text format."""
        phase = self._holder.status()["phase"]
        queue, room = self._queue.summary(), self._room.summary()
        answers = [({"path": path, "status": str(s)}, n) for (path, s), n in sorted(self._answered.items())]
        lines = [
            *family("ready", "gauge", "1 when an edit would be taken now.", phase == "ready"),
            *family("phase", "gauge", "1 for the phase the model is in.", by("phase", {p: p == phase for p in PHASES})),
            *family("uptime_seconds", "gauge", "Since the server started.", time.monotonic() - self._started_monotonic),
            *family("http_answers_total", "counter", "Answers by path and status.", answers),
            *family("queue_length", "gauge", "POST /edit requests.", by("state", {k: queue[k] for k in ("waiting", "running")})),
            *family("queue_places", "gauge", "How many of them are let in.", queue["places"]),
            *family("queue_held_bytes", "gauge", "What they hold in memory.", queue["held_bytes"]),
            *family("live_sockets", "gauge", "Open live sockets.", room["sockets"]),
            *family("live_sessions", "gauge", "Live views that have a session.", room["sessions"]),
            *family("live_waiting", "gauge", "Live views that wait in line for one.", room["waiting"]),
            *family("resident_memory_bytes", "gauge", "Memory of this process.", resident_bytes()),
        ]  # fmt: skip
        if self._holder.engine is not None:
            lines += _engine_lines(self._holder.engine.stats())
        return PlainTextResponse("\n".join(lines) + "\n", media_type=METRICS_TYPE)


def _engine_lines(stats) -> list[str]:
    latency = {"0.5": stats.latency_p50_ms, "0.95": stats.latency_p95_ms}
    ages = {"0.5": stats.age_p50_ms, "0.95": stats.age_p95_ms}
    caches = stats.cache_summary
    lines = [
        *family("frames_total", "counter", "Pictures delivered.", stats.frames),
        *family("errors_total", "counter", "Frames that failed in the engine.", stats.errors),
        *family("dropped_total", "counter", "Frames replaced by newer ones.", stats.dropped),
        *family(
            "skipped_total",
            "counter",
            "Delivered pictures that repeat the last for a like frame.",
            stats.skipped,
        ),
        *family("sessions", "gauge", "Open sessions of the engine.", stats.sessions),
        *family("frames_per_second", "gauge", "Of all sessions together.", stats.fps),
        *family("skip_rate", "gauge", "Share of the delivered pictures that repeat the last.", stats.skip_rate),
        *family("computed_share", "gauge", "Mean share of the tokens that were computed, not reused.", stats.computed),
        *family("cache_hit_rate", "gauge", "Share of the look-ups in all caches.", stats.cache_hits),
        *family("latency_milliseconds", "gauge", "Submit to done, of the last frames.", by("quantile", latency)),
        *family("frame_age_milliseconds", "gauge", "Of what people see, at any moment.", by("quantile", ages)),
        *family("stage_milliseconds", "gauge", "Mean of the last frames.", by("stage", stats.stages_ms)),
    ]
    if stats.memory:
        lines += family("gpu_memory_bytes", "gauge", "As torch counts it.", by("kind", stats.memory))
    for key in ("hits", "misses"):
        lines += family(
            f"cache_{key}_total", "counter", f"Cache {key}.", by("cache", {n: c[key] for n, c in caches.items()})
        )
    for key in ("entries", "bytes"):
        lines += family(f"cache_{key}", "gauge", f"Cache {key}.", by("cache", {n: c[key] for n, c in caches.items()}))
    return lines


def by(label: str, values: Mapping[str, float]) -> list[tuple[dict[str, str], float]]:
    return [({label: name}, value) for name, value in values.items()]


def family(name: str, kind: str, help_text: str, samples: float | Iterable[tuple[dict[str, str], float]]) -> list[str]:
    """The lines of one metric: `samples` is its value, or (labels, value) pairs."""
    if isinstance(samples, (int, float)):
        samples = [({}, samples)]
    lines = [f"# HELP {PREFIX}_{name} {help_text}", f"# TYPE {PREFIX}_{name} {kind}"]
    for labels, value in samples:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{PREFIX}_{name}{'{' + inside + '}' if inside else ''} {float(value):.15g}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
