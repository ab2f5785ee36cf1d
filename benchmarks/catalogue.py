"""The techniques that `benchmarks.techniques` measures: a row each, what it changes, on which videos, against what."""

from dataclasses import dataclass, field

from benchmarks.videos import SCENES

BOTH = ("still", "moving")
CHANGED = tuple(name for name in SCENES if name.endswith("% changed"))


@dataclass(frozen=True)
class Technique:
    """A row: what is changed, on which videos, and what it is compared with."""

    name: str
    params: dict = field(default_factory=dict)  # of EditParams
    config: dict = field(default_factory=dict)  # of EngineConfig
    videos: tuple[str, ...] = BOTH
    against: str = "plain"
    new_prompt: bool = False  # in the middle of the video
    pace: float = 0.0  # the target rate, of what plain reached on the same video: the same strain on every machine


GUIDED, SWITCHED = "guidance 4: two passes", "new prompt: at once"
TECHNIQUES = (
    Technique("plain", videos=BOTH + CHANGED),
    Technique("VLM every 5 frames", {"embeds": "every", "embeds_every": 5}),
    Technique("VLM when the picture changed", {"embeds": "changed"}),
    Technique("VLM once a prompt", {"embeds": "kept"}),
    Technique("VLM in the background", {"embeds": "every", "embeds_every": 1, "embeds_background": True}),
    Technique("similarity filter: frame", {"skip_similar": "frame"}),
    Technique("similarity filter: patch", {"skip_similar": "patch"}),
    Technique("stream batch", {"stream_batch": True}),
    Technique("no pipelining", config={"pipelining": False}),
    Technique("start from the last result, 0.3", {"start_from_previous": 0.3}),
    Technique("start from the last result, 0.3, motion-aware", {"start_from_previous": 0.3, "motion_aware": True}),
    Technique("blend where still, 0.7", {"blend_still": 0.7}),
    Technique("blend where still, 0.7, motion-aware", {"blend_still": 0.7, "motion_aware": True}),
    Technique(
        "start 0.15 and blend 0.7, motion-aware",
        {"start_from_previous": 0.15, "blend_still": 0.7, "motion_aware": True},
    ),
    Technique("reuse: references over the steps", {"reuse": "steps"}),
    Technique("reuse: over frames", {"reuse": "frames"}, videos=BOTH + CHANGED),
    Technique(
        "for 30 frames/s: reuse over frames, VLM once", {"reuse": "frames", "embeds": "kept"}, videos=BOTH + CHANGED
    ),
    Technique("pace: 1.5 times plain's rate", pace=1.5),
    Technique(GUIDED, {"cfg_scale": 4.0}),
    Technique("guidance 4: one pass of two", {"cfg_scale": 4.0, "cfg_mode": "batched"}, against=GUIDED),
    Technique("guidance 4: self-negative", {"cfg_scale": 4.0, "cfg_mode": "self_negative"}, against=GUIDED),
    Technique("guidance 4: onetime-negative", {"cfg_scale": 4.0, "cfg_mode": "onetime_negative"}, against=GUIDED),
    Technique(SWITCHED, videos=("still",), against=SWITCHED, new_prompt=True),
    Technique(
        "new prompt: over 8 frames, linear", {"transition_frames": 8},
        videos=("still",), against=SWITCHED, new_prompt=True,
    ),
    Technique(
        "new prompt: over 8 frames, spherical", {"transition_frames": 8, "transition": "spherical"},
        videos=("still",), against=SWITCHED, new_prompt=True,
    ),
)  # fmt: skip


def chosen(only: list[str], videos: list[str], more_videos: list[str]) -> list[tuple[Technique, tuple[str, ...]]]:
    """The techniques whose name contains one of `only`, and those that they are compared with, each with its videos.

    `videos` stand in the place of a technique's own, `more_videos` are added unless it has but one.
    """
    wanted: dict[str, tuple[str, ...]] = {}
    for technique in TECHNIQUES:
        if only and not any(part.lower() in technique.name.lower() for part in only):
            continue
        own = videos or technique.videos
        names = tuple(dict.fromkeys((*own, *(more_videos if len(own) > 1 else ()))))
        also = wanted.get(technique.against, ())
        wanted[technique.name] = names
        wanted[technique.against] = tuple(dict.fromkeys(also + names))
        by_name = {t.name: t for t in TECHNIQUES}
        if by_name[technique.against].against != technique.against:  # what it is compared with has one itself
            wanted["plain"] = tuple(dict.fromkeys(wanted.get("plain", ()) + names))
    # Those of one engine's config follow each other: a new engine is a new thread.
    order = [t for t in TECHNIQUES if not t.config] + [t for t in TECHNIQUES if t.config]
    return [(technique, wanted[technique.name]) for technique in order if technique.name in wanted]
