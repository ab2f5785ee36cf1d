"""What stands in for a model and a clock in the tests of the engine, and what those tests share."""

import threading

import torch

from benchmarks.live_view import PassThrough
from qwen_realtime import EditParams

PATIENCE_S = 60  # no claim: only how long a broken engine may hang before the test fails


class Clock:
    """Monotonic seconds that move when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakePipeline(PassThrough):
    """The five steps without a model. Decodes to the seed's low byte; `hold` stops a frame in its denoise."""

    description = {"model": "fake"}  # noqa: RUF012

    def __init__(self):
        super().__init__(64)
        self.calls: list[tuple] = []
        self.threads: set[str] = set()
        self.steps_done = 0
        self.started = threading.Semaphore(0)  # one release for each frame that reached its denoise
        self.gate = threading.Event()
        self.gate.set()
        self.fail: dict[str, BaseException] = {}  # prompt -> raised in denoise
        self.poison: set[str] = set()  # prompts whose latents are NaN
        self.cleared = 0

    def hold(self):
        self.gate.clear()

    def enable_fast_path(self):
        return [("vae", True, "one frame")]

    def cache_summary(self):
        return {"prompt": {"entries": 0, "bytes": 0, "hits": 0, "misses": 0}}

    def release_memory(self):
        self.cleared += 1

    def initial_noise(self, width, height, seed):
        self.calls.append(("noise", width, height, seed))
        return torch.full((1, width * height // 256, 4), float(seed % 256))

    def encode_prompt(self, prompt, image=None):
        self.threads.add(threading.current_thread().name)
        self.calls.append(("prompt", prompt, [picture.shape for picture in image]))
        return prompt, None

    def encode_references(self, images, *, area, width, height):
        self.calls.append(("references", [picture.shape for picture in images], area, width, height))
        return images

    def denoise(self, latents, references, prompt_embeds, mask, schedule, **options):
        self.calls.append(("denoise", prompt_embeds, options["negative_prompt_embeds"], options["cfg_scale"]))
        self.started.release()
        assert self.gate.wait(2 * PATIENCE_S), "the test never opened the gate"
        if prompt_embeds in self.fail:
            raise self.fail[prompt_embeds]
        for step in range(schedule):
            options["on_step"](step, schedule)
            self.steps_done += 1
        return latents * float("nan") if prompt_embeds in self.poison else latents

    def decode(self, latents, width, height):
        return latents[0, 0, 0].nan_to_num().to(torch.uint8).expand(1, height, width, 3)

    def prompts(self) -> list[str]:
        """Of the frames that reached their denoise, in order."""
        return [call[1] for call in self.calls if call[0] == "denoise"]

    def await_start(self):
        assert self.started.acquire(timeout=PATIENCE_S), "no frame reached its denoise"


class BatchingFake(FakePipeline):
    """Pictures that count their steps; notes who went together."""

    class Picture:
        def __init__(self, latents, prompt, steps):
            self.latents, self.prompt, self.steps, self.step = latents, prompt, steps, 0

        @property
        def finished(self):
            return self.step == self.steps

    def __init__(self):
        super().__init__()
        self.together: list[list[str]] = []

    def start(self, latents, references, prompt_embeds, mask, schedule, **options):
        return self.Picture(latents, prompt_embeds, schedule)

    def advance(self, pictures):
        self.together.append([picture.prompt for picture in pictures])
        for prompt in self.together[-1]:
            if prompt in self.fail:
                raise self.fail[prompt]
        for picture in pictures:
            picture.step += 1
            if picture.prompt in self.poison:
                picture.latents = picture.latents * float("nan")


def edit(prompt="negative", **changes) -> EditParams:
    return EditParams(prompt=prompt, **changes)


def serve(session, *frames):
    """The results of (picture, params), one after the other."""
    return [session.result(session.submit([picture], params), PATIENCE_S) for picture, params in frames]


def stream(session, frames):
    """The outcomes of (picture, params), in order: each frame is submitted when the one before takes its first step."""
    outcomes, sending = [], threading.Lock()  # the next frame may be sent as soon as this one is submitted

    def send():
        with sending:
            picture, params = frames[len(outcomes)]
            outcomes.append(session.submit_for_outcome([picture], params, on_step).outcome)

    sent = iter(range(1, len(frames)))

    def on_step(step, steps):
        if step == 0 and next(sent, None) is not None:
            send()

    send()
    results, position = [], 0
    while position < len(outcomes):
        results.append(outcomes[position].result(PATIENCE_S))
        position += 1
    assert len(results) == len(frames)
    return results


def backlog(engine, fake, frames):
    """The results of (session, picture, params) whose frames all wait before the first is taken, one a session."""
    outcomes = []
    with engine._sessions.lock:
        for session, picture, params in frames:
            outcomes.append(session.submit_for_outcome([picture], params).outcome)
    return [outcome.result(PATIENCE_S) for outcome in outcomes]
