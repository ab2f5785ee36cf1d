"""A video file edited frame by frame: decoded, each picture handed to a function, encoded, its sound copied as it is.

PyAV carries it, which is FFmpeg's libraries as a Python package. What a file is allowed to be is said to FFmpeg before
it looks at it: the containers of `CONTAINERS`, and no protocol at all, because some of the formats it knows are lists of
other files and addresses, and an uploaded one must not make this program open them.

Times are the file's own: each edited picture keeps the time stamp of the frame it was made from, so a variable frame
rate stays one and sound and picture stay together. Turned video, as telephones write it, is turned upright before
it is edited. The sound's packets are never decoded.
"""

import contextlib
import fractions
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from pipeline.geometry import padded
from pipeline.images import EditError

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf"
IN_MP4 = ("aac", "mp3", "ac3", "eac3", "opus", "flac", "alac")  # sound that MP4 carries; any other goes into Matroska
# The file's own claim is checked first; what really comes is counted as it comes.
MAX_BYTES = 256 * 2**20
MAX_SECONDS = 300.0
MAX_FRAMES = 9000  # 5 minutes at 30 frames a second
MAX_PIXELS = 4096 * 2304  # of a frame
QUALITY = "20"  # x264's constant rate factor: hard to tell from the pictures that went in


class Stop(Exception):
    """Raised by the function that edits: the video ends here, and what is done is kept."""


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


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[av.container.InputContainer]:
    """The container, with errors as EditError."""
    size = Path(path).stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise EditError(f"The video has {size:,} bytes. Allowed: 1 to {MAX_BYTES:,}.")
    # The file is opened here and only read through this handle: FFmpeg itself gets no name to open anything by.
    try:
        with open(path, "rb") as file, av.open(
            file, options={"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
        ) as container:  # fmt: skip
            yield container
    except av.FFmpegError as error:
        raise EditError(f"The file is not a video that can be read ({error.strerror}). Send MP4, MOV, WebM, MKV or AVI.") from None


def _turn(frame: av.VideoFrame) -> int:
    """Quarter turns, counterclockwise, that bring the frame upright."""
    return round(frame.rotation / 90) % 4


def upright(frame: av.VideoFrame, aspect: float = 1.0) -> np.ndarray:
    """The frame as a person sees it: uint8 (H, W, 3), turned, its pixels square. `aspect` is a stored pixel's width to
    its height.
    """
    pixels = frame.reformat(width=max(1, round(frame.width * aspect)), format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, _turn(frame)))


def pixel_aspect(stream: av.VideoStream) -> float:
    """Width of a stored pixel to its height; 1 where the file does not say, or says nonsense."""
    aspect = stream.codec_context.sample_aspect_ratio
    return float(aspect) if aspect and 0.25 <= aspect <= 4 else 1.0


def _check(stream: av.VideoStream, seconds: float | None, frames: int | None) -> None:
    width, height = stream.codec_context.width, stream.codec_context.height
    if not 0 < width * height <= MAX_PIXELS or min(width, height) < 16:
        raise EditError(f"The video is {width}x{height}. Allowed: from 16x16 to {MAX_PIXELS:,} pixels a frame.")
    if seconds is not None and seconds > MAX_SECONDS:
        raise EditError(f"The video is {seconds:.0f} s long. Allowed: {MAX_SECONDS:.0f} s. Cut a part out of it.")
    if frames is not None and frames > MAX_FRAMES:
        raise EditError(f"The video has {frames:,} frames. Allowed: {MAX_FRAMES:,}. Cut a part out of it.")


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise EditError("The file has no video in it, only sound or text.")
    return container.streams.video[0]


def _length(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[float | None, int | None]:
    """(seconds, frames) as the file claims, None where it does not."""
    seconds = None
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration:
        seconds = container.duration / av.time_base
    frames = stream.frames or (round(seconds * stream.average_rate) if seconds and stream.average_rate else None)
    return seconds, frames


def probe(path: str | Path) -> VideoInfo:
    """What the file is; its first frame is decoded, for only a frame says how it is turned. Raises EditError."""
    with _open(path) as container:
        stream = _video_stream(container)
        seconds, frames = _length(container, stream)
        _check(stream, seconds, frames)
        sound = container.streams.audio[0].codec.canonical_name if container.streams.audio else None
        for frame in container.decode(stream):
            height, width = upright(frame, pixel_aspect(stream)).shape[:2]
            fps = float(stream.average_rate or 0)
            return VideoInfo(width, height, seconds, frames, fps, stream.codec.canonical_name, sound)
    raise EditError("The video has no frame that can be read.")


def edit_video(
    path: str | Path, folder: Path, edit: Callable[[np.ndarray], np.ndarray], name: str = "edited"
) -> Iterator[Progress | Outcome]:
    """Edits the video at `path` into a file in `folder`; yields a Progress for each frame, and an Outcome at the end.

    `edit(picture) -> picture`, uint8 (H, W, 3), gives pictures of one size. H.264 wants even sides: where one is odd the
    last row or column is repeated in the file, and the notes say so. When it raises Stop, or the file
    turns out to be damaged after some frames, or longer than it claimed, the video ends there and the notes say so; an
    EditError of its own after some frames likewise. Raises EditError where there is nothing to keep.
    """
    with _open(path) as container:
        source = _video_stream(container)
        seconds, frames = _length(container, source)
        _check(source, seconds, frames)
        sound = container.streams.audio[0] if container.streams.audio else None
        suffix = ".mp4" if sound is None or sound.codec.canonical_name in IN_MP4 else ".mkv"
        target = _Target(Path(folder) / f"{name}{suffix}", source, sound)
        try:
            notes = yield from _edit_frames(container, source, sound, target, edit, seconds)
        except BaseException:
            target.discard()
            raise
    if target.frames == 0:
        target.discard()
        raise EditError(notes[0] if notes else "The video has no frame that can be read.")
    target.close()
    if target.repeats:
        notes.append(f"The last {target.repeats} is there twice in the file: H.264 wants even sides.")
    if suffix == ".mkv":
        notes.append(f"The sound is {sound.codec.canonical_name}, which MP4 does not carry: the file is Matroska (.mkv).")
    yield Outcome(target.path, target.frames, tuple(notes))


def counted(frames: int) -> str:
    return f"{frames} frame{'' if frames == 1 else 's'}"


def _edit_frames(container, source, sound, target: "_Target", edit, seconds: float | None):
    """Yields the Progress of each frame; returns the notes, the first of them why it ended early."""
    aspect = pixel_aspect(source)
    try:
        for packet in container.demux([source] if sound is None else [source, sound]):
            if packet.stream is sound:
                target.copy(packet)
                continue
            for frame in packet.decode():
                since_s = (frame.time or 0.0) - target.start_s
                if target.frames >= MAX_FRAMES or (target.frames and since_s > MAX_SECONDS):
                    return [f"The video is longer than it says and ends here: allowed are {MAX_SECONDS:.0f} s, {MAX_FRAMES:,} frames."]
                picture = edit(upright(frame, aspect))
                target.add(picture, frame)
                done_s = (frame.time or 0.0) - target.start_s + float((frame.duration or 0) * source.time_base)
                yield Progress(target.frames, picture, min(1.0, done_s / seconds) if seconds else None)
    except Stop:
        return [f"Stopped after {counted(target.frames)}."]
    except av.FFmpegError as error:
        return [f"The file is damaged after {counted(target.frames)} ({error.strerror})."]
    except EditError as error:
        if target.frames == 0:
            raise
        return [f"It ends after {counted(target.frames)}: {error}"]
    return []


class _Target:
    """The file that is written: H.264 in the source's own times, and the sound's packets as they are."""

    def __init__(self, path: Path, source: av.VideoStream, sound: av.AudioStream | None):
        self.path, self.frames, self.start_s = path, 0, 0.0
        self.repeats = ""  # what is repeated to make the sides even
        self._source = source
        self._last_pts = None
        self._container = av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {})
        self._rate = source.average_rate or source.guessed_rate or fractions.Fraction(25)
        self._video = self._container.add_stream("libx264", rate=self._rate, options={"crf": QUALITY, "preset": "veryfast"})
        self._video.pix_fmt = "yuv420p"
        # Said in the file, or each player guesses by the picture's height.
        context = self._video.codec_context
        context.colorspace, context.color_primaries, context.color_trc = 1, 1, 1  # BT.709
        context.color_range = 1  # limited
        context.time_base = source.time_base
        self._sound = None if sound is None else self._container.add_stream_from_template(sound)
        self._waiting: list[av.Packet] = []  # sound that came before the first picture: its size opens the file

    def add(self, picture: np.ndarray, frame: av.VideoFrame) -> None:
        """The edited `picture` at the time of the `frame` it was made from."""
        step = max(1, round(1 / (self._rate * self._source.time_base)))
        pts = frame.pts
        if pts is None or (self._last_pts is not None and pts <= self._last_pts):
            pts = 0 if self._last_pts is None else self._last_pts + step  # some old files give no times, or some twice
        height, width = picture.shape[:2]
        picture = padded(picture, 2)
        if self.frames == 0:
            self._video.height, self._video.width = picture.shape[:2]
            self.repeats = " and the last ".join(name for name, side in (("column", width), ("row", height)) if side % 2)
            self.start_s = frame.time or 0.0
        image = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        image.pts, image.time_base = pts, self._source.time_base
        image.duration = frame.duration or step
        self._last_pts = pts
        self.frames += 1
        self._container.mux(self._video.encode(image))
        while self._waiting:
            self.copy(self._waiting.pop(0))

    def copy(self, packet: av.Packet) -> None:
        if packet.dts is None:  # the demuxer's sign that the stream has ended
            return
        if self.frames == 0:
            self._waiting.append(packet)
            return
        packet.stream = self._sound
        self._container.mux(packet)

    def close(self) -> None:
        self._container.mux(self._video.encode(None))
        self._container.close()

    def discard(self) -> None:
        """Gives the file up. FFmpeg cannot close one that never began without complaint; it is deleted anyway."""
        with contextlib.suppress(av.FFmpegError):
            self._container.close()
        self.path.unlink(missing_ok=True)
