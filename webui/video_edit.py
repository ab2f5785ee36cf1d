"""A video file edited frame by frame: decoded, each picture handed to a function, encoded, its sound copied as it is.

PyAV carries it, which is FFmpeg's libraries as a Python package. What a file is allowed to be is said to FFmpeg before
it looks at it: the containers of `CONTAINERS`, and no protocol at all, because some of the formats it knows are lists of
other files and addresses, and an uploaded one must not make this program open them.

Times are the file's own: each edited picture keeps the time stamp of the frame it was made from, so a variable frame
rate stays variable and sound and picture stay in sync. Turned video, as telephones write it, is turned upright before
it is edited. The sound's packets are never decoded.

A damaged or hostile file ends in a sentence. FFmpeg is told how many pixels a frame may have before it looks at one; what
the file says of its length, rate and size is checked, and what comes is counted; between two packets it can be stopped.
"""

import contextlib
import fractions
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer

from pipeline.geometry import padded
from pipeline.images import EditError
from webui.full_disk import DISK_FULL, disk_full

log = logging.getLogger(__name__)

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf"
IN_MP4 = ("aac", "mp3", "ac3", "eac3", "opus", "flac", "alac")  # sound that MP4 carries; any other goes into Matroska
# The file's own claim is checked first; what really comes is counted as it comes.
MAX_BYTES = 256 * 2**20
MAX_SECONDS = 300.0
MAX_FRAMES = 9000  # 5 minutes at 30 frames a second
MAX_PIXELS = 4096 * 2304  # of a frame
MAX_READ_SECONDS = 20.0  # from one frame to the next, without the time that editing takes
RATES = (0.1, 240.0)  # frames a second that a file may claim; outside of it the times of the frames alone count
QUALITY = "20"  # x264's constant rate factor: hard to tell from the pictures that went in


class Stop(Exception):
    """Raised by the function that edits: the video ends here, with the frames that are done."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of itself."""

    width: int  # upright, pixels
    height: int
    seconds: float | None  # None: it does not say
    frames: int | None  # by its rate and length where it does not count them
    fps: float
    codec: str
    sound: str | None  # codec


@dataclass(frozen=True, eq=False)
class Progress:
    """One frame is done."""

    number: int  # from 1
    picture: np.ndarray  # uint8 (H, W, 3), edited
    share: float | None  # of the video, None where it does not say how long it is


@dataclass(frozen=True)
class Outcome:
    """The last thing that `edit_video` yields: the file, and what a person should know of it."""

    path: Path
    frames: int
    notes: tuple[str, ...]


class _Damaged(EditError):
    """The file cannot be read any further."""


@contextlib.contextmanager
def _reading():
    """Within it the file is read, and nothing else is done: whatever it makes FFmpeg or PyAV raise is `_Damaged`."""
    try:
        yield
    except EditError:
        raise
    except Exception as error:
        log.info("a video made its reader fail: %s: %s", type(error).__name__, error)
        told = error.strerror if isinstance(error, av.FFmpegError) else None
        raise _Damaged(told or ("it needs too much memory" if isinstance(error, MemoryError) else "it is damaged")) from None


@contextlib.contextmanager
def _writing():
    """Within it the edited file is written. Raises EditError."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError, OverflowError, ArithmeticError, MemoryError) as error:
        if getattr(error, "errno", None) in DISK_FULL:
            raise EditError(disk_full(error)) from None
        log.warning("an edited video cannot be written: %s: %s", type(error).__name__, error)
        raise EditError(f"The edited video cannot be written ({error}). Convert the video to MP4 and resend.") from None


@contextlib.contextmanager
def _open(source: str | Path | BinaryIO) -> Iterator[InputContainer]:
    """The container of an open file, which stays open, or of the file at a path. Raises EditError on what is no video."""
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "", "max_pixels": _most_pixels()}
    with contextlib.ExitStack() as stack:
        # It is only read through this handle: FFmpeg itself gets no name to open anything by.
        file = stack.enter_context(open(source, "rb")) if isinstance(source, (str, Path)) else source
        size = file.seek(0, os.SEEK_END)
        if not 0 < size <= MAX_BYTES:
            raise EditError(f"The video has {size:,} bytes. Allowed: 1 to {MAX_BYTES:,}.")
        file.seek(0)
        try:
            with _reading():
                container = stack.enter_context(av.open(file, mode="r", options=options, metadata_errors="replace"))
        except _Damaged as error:
            text = f"The file is not a video that can be read ({error}). Send MP4, MOV, WebM, MKV or AVI."
            raise EditError(text) from None
        yield container


def _most_pixels() -> str:
    """FFmpeg's option. It counts a frame's rows with the bytes that fill them up, so its bound is a little wider."""
    return str(2 * MAX_PIXELS)


def _turn(frame: av.VideoFrame) -> int:
    """Quarter turns, counterclockwise, that bring the frame upright."""
    return round(frame.rotation / 90) % 4


def upright(frame: av.VideoFrame, aspect: float = 1.0) -> np.ndarray:
    """The frame as a person sees it: uint8 (H, W, 3), turned, its pixels square. `aspect` is a stored pixel's width to
    its height.
    """
    width = max(1, round(frame.width * aspect))
    if width * frame.height > MAX_PIXELS:
        raise EditError(f"A frame is {width}x{frame.height}. Allowed: {MAX_PIXELS:,} pixels a frame.")
    pixels = frame.reformat(width=width, format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, _turn(frame)))


def pixel_aspect(stream: av.VideoStream) -> float:
    """Width of a stored pixel to its height; 1 where the file does not say, or says nonsense."""
    aspect = stream.codec_context.sample_aspect_ratio
    return float(aspect) if aspect and 0.25 <= aspect <= 4 else 1.0


def _check(stream: av.VideoStream, seconds: float | None, frames: int | None) -> None:
    if stream.codec_context is None:
        raise EditError("The video's codec is unknown. Send H.264, H.265, VP9, AV1 or another common one.")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not 0 < width * height <= MAX_PIXELS or min(width, height) < 16:
        raise EditError(f"The video is {width}x{height}. Allowed: from 16x16 to {MAX_PIXELS:,} pixels a frame.")
    if seconds is not None and seconds > MAX_SECONDS:
        raise EditError(f"The video is {seconds:.0f} s long. Allowed: {MAX_SECONDS:.0f} s. Cut a part out of it.")
    if frames is not None and frames > MAX_FRAMES:
        raise EditError(f"The video has {frames:,} frames. Allowed: {MAX_FRAMES:,}. Cut a part out of it.")


def _video_stream(container: InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise EditError("The file has no video in it, only sound or text.")
    return container.streams.video[0]


def _length(container: InputContainer, stream: av.VideoStream) -> tuple[float | None, int | None]:
    """(seconds, frames) as the file claims, None where it does not."""
    seconds = None
    if stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration:
        seconds = container.duration / av.time_base
    if seconds is not None and not seconds > 0:
        seconds = None
    frames = stream.frames
    if not frames and seconds and (rate := _rate(stream)):
        frames = round(seconds * rate)
    return seconds, frames if frames and frames > 0 else None


def _rate(stream: av.VideoStream) -> fractions.Fraction | None:
    """Frames a second as the file claims; None where it does not, or claims nonsense."""
    rate = stream.average_rate or stream.guessed_rate
    return rate if rate and RATES[0] <= rate <= RATES[1] else None


def probe(video: str | Path | BinaryIO) -> VideoInfo:
    """What the file is; its first frame is decoded, for only a frame says how it is turned. Raises EditError."""
    with _open(video) as container:
        try:
            with _reading():
                stream = _video_stream(container)
                seconds, frames = _length(container, stream)
                _check(stream, seconds, frames)
                sound = container.streams.audio[0].codec.canonical_name if container.streams.audio else None
            for _, picture in _read(container, stream, None, lambda: False):
                height, width = picture.shape[:2]
                fps = float(_rate(stream) or 0)
                return VideoInfo(width, height, seconds, frames, fps, stream.codec.canonical_name, sound)
        except _Damaged as error:
            raise EditError(f"The video has no frame that can be read ({error}). Convert it to MP4 and resend.") from None
    raise EditError("The video has no frame that can be read.")


def _read(
    container: InputContainer, source: av.VideoStream, sound: av.AudioStream | None, stopped: Callable[[], bool]
) -> Iterator[tuple[Any, Any]]:
    """Yields (packet, None) of the sound and (frame, picture) of the video. Raises Stop, and EditError: `_Damaged` where
    the file ends too early.
    """
    with _reading():
        aspect = pixel_aspect(source)
        source.codec_context.options = {"max_pixels": _most_pixels()}
        packets = container.demux([source] if sound is None else [source, sound])
    read_s = 0.0  # since the last frame
    while True:
        if stopped():
            raise Stop
        began = time.monotonic()
        with _reading():
            packet = next(packets, None)
            frames = packet.decode() if packet is not None and packet.stream is not sound else []
        if packet is None:
            return
        if packet.stream is sound:
            yield packet, None
        for frame in frames:
            with _reading():
                assert isinstance(frame, av.VideoFrame)
                picture = upright(frame, aspect)
            yield frame, picture
            read_s, began = 0.0, time.monotonic()
        read_s += time.monotonic() - began
        if read_s > MAX_READ_SECONDS:
            raise _Damaged(f"no frame comes in {MAX_READ_SECONDS:g} s")


def edit_video(
    video: str | Path | BinaryIO,
    folder: Path,
    edit: Callable[[np.ndarray], np.ndarray],
    name: str = "edited",
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Progress | Outcome]:
    """Edits the video, a path or an open file, into a file in `folder`; yields a Progress for each frame, and an Outcome at the end.

    `edit(picture) -> picture`, uint8 (H, W, 3), gives pictures of one size. H.264 wants even sides: where one is odd the
    last row or column is repeated in the file, and the notes say so. When it raises Stop, or `stopped()`, or the file
    turns out to be damaged after some frames, or longer than it claimed, the video ends there and the notes say so; an
    EditError of its own after some frames likewise. Raises EditError where there is nothing to keep, or nowhere to write
    it: then no file is left.
    """
    with _open(video) as container:
        try:
            with _reading():
                source = _video_stream(container)
                seconds, frames = _length(container, source)
                _check(source, seconds, frames)
                sound = container.streams.audio[0] if container.streams.audio else None
                suffix = ".mp4" if sound is None or sound.codec.canonical_name in IN_MP4 else ".mkv"
        except _Damaged as error:
            raise EditError(f"The video cannot be read ({error}). Convert it to MP4 and resend.") from None
        target = _Target(Path(folder) / f"{name}{suffix}", source, sound)
        try:
            notes = yield from _edit_frames(container, source, sound, target, edit, seconds, stopped)
            if target.frames == 0:
                raise EditError(notes[0] if notes else "The video has no frame that can be read.")
            target.close()
        except BaseException:
            target.discard()
            raise
    if target.repeats:
        notes.append(f"The last {target.repeats} is there twice in the file: H.264 wants even sides.")
    if sound is not None and suffix == ".mkv":
        notes.append(f"The sound is {sound.codec.canonical_name}, which MP4 does not carry: the file is Matroska (.mkv).")
    if target.sound_lost:
        notes.append("Some of the sound is damaged and left out.")
    yield Outcome(target.path, target.frames, tuple(notes))


def counted(frames: int) -> str:
    return f"{frames} frame{'' if frames == 1 else 's'}"


def _edit_frames(container, source, sound, target: "_Target", edit, seconds: float | None, stopped):
    """Yields the Progress of each frame; returns the notes, the first of them why it ended early."""
    try:
        for frame, picture in _read(container, source, sound, stopped):
            if picture is None:
                target.copy(frame)
                continue
            at_s = _seconds(frame.time)
            since_s = at_s - target.start_s
            if target.frames >= MAX_FRAMES or (target.frames and since_s > MAX_SECONDS):
                return [f"The video is longer than it says and ends here: allowed are {MAX_SECONDS:.0f} s, {MAX_FRAMES:,} frames."]
            picture = edit(picture)
            target.add(picture, frame)
            done_s = at_s - target.start_s + _seconds((frame.duration or 0) * (source.time_base or 0))
            share = min(1.0, max(0.0, done_s / seconds)) if seconds else None
            yield Progress(target.frames, picture, share)
    except Stop:
        return [f"Stopped after {counted(target.frames)}."]
    except _Damaged as error:
        return [f"The file is damaged after {counted(target.frames)} ({error})."]
    except EditError as error:
        if target.frames == 0 or target.failed:
            raise
        return [f"It ends after {counted(target.frames)}: {error}"]
    return []


def _seconds(value) -> float:
    """A time of the file's; 0 where there is none, or none that is a number."""
    seconds = float(value or 0.0)
    return seconds if math.isfinite(seconds) else 0.0


class _Target:
    """The file that is written: H.264 in the source's own times, and the sound's packets as they are."""

    def __init__(self, path: Path, source: av.VideoStream, sound: av.AudioStream | None):
        self.path, self.frames, self.start_s = path, 0, 0.0
        self.repeats = ""  # what is repeated to make the sides even
        self.sound_lost = self.failed = False
        self._source, self._time_base = source, source.time_base or fractions.Fraction(1, 1000)
        self._rate = _rate(source) or fractions.Fraction(25)
        self._last_pts = None
        self._waiting: list[av.Packet] = []  # sound that came before the first picture: its size opens the file
        with _writing():
            options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
            self._container = av.open(str(path), "w", options=options)
        try:
            with _writing():
                self._video = self._add_video()
                self._sound = None if sound is None else self._container.add_stream_from_template(sound)
        except EditError:
            self.discard()
            raise

    def _add_video(self) -> av.VideoStream:
        video = self._container.add_stream("libx264", rate=self._rate, options={"crf": QUALITY, "preset": "veryfast"})
        video.pix_fmt = "yuv420p"
        # Said in the file, or each player guesses by the picture's height.
        context = video.codec_context
        context.colorspace, context.color_primaries, context.color_trc = 1, 1, 1  # BT.709
        context.color_range = 1  # limited
        context.time_base = self._time_base
        return video

    def add(self, picture: np.ndarray, frame: av.VideoFrame) -> None:
        """The edited `picture` at the time of the `frame` it was made from. Raises EditError."""
        step = max(1, round(1 / (self._rate * self._time_base)))
        pts = frame.pts
        if pts is None or (self._last_pts is not None and pts <= self._last_pts):
            pts = 0 if self._last_pts is None else self._last_pts + step  # some old files give no times, or some twice
        height, width = picture.shape[:2]
        picture = padded(picture, 2)
        if self.frames == 0:
            self._video.height, self._video.width = picture.shape[:2]
            self.repeats = " and the last ".join(name for name, side in (("column", width), ("row", height)) if side % 2)
            self.start_s = _seconds(frame.time)
        image = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        with self._failing():
            image.pts, image.time_base = pts, self._time_base
            image.duration = frame.duration if 0 < (frame.duration or 0) < 2**31 else step
            self._container.mux(self._video.encode(image))
        self._last_pts = pts
        self.frames += 1
        while self._waiting:
            self.copy(self._waiting.pop(0))

    def copy(self, packet: av.Packet) -> None:
        """A packet of the sound; one that the file does not take is left out. Raises EditError when the disk is full."""
        if packet.dts is None:  # the demuxer's sign that the stream has ended
            return
        if self.frames == 0:
            self._waiting.append(packet)
            return
        packet.stream = self._sound
        try:
            self._container.mux(packet)
        except (av.FFmpegError, ValueError, OverflowError) as error:
            if getattr(error, "errno", None) in DISK_FULL:
                self.failed = True
                raise EditError(disk_full(error)) from None
            self.sound_lost = True

    @contextlib.contextmanager
    def _failing(self):
        """As `_writing`; afterwards the file is of no use."""
        try:
            with _writing():
                yield
        except EditError:
            self.failed = True
            raise

    def close(self) -> None:
        with self._failing():
            self._container.mux(self._video.encode(None))
            self._container.close()

    def discard(self) -> None:
        """Gives the file up. FFmpeg cannot close one that never began without complaint; it is deleted anyway."""
        with contextlib.suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()
        self.path.unlink(missing_ok=True)
