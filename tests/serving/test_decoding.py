"""The decoder of pictures from outside: the same pixels, at a bounded price, ended when its sender leaves."""

import contextlib
import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.hostile_pictures import bombs, flipped, huge_headers, photo, repeated_scans, saved

from pipeline import picture_files
from pipeline.picture_files import EditError, open_image
from serving import decoding, inspection
from serving.decoding import Busy, Decoder, Left, Limits, Sender

PATIENCE_S = 60  # no claim: only how long a broken decoder may hang before the test fails
SLOW = 31  # scans over 64 megapixels: within the bounds, and some seconds of work


@pytest.fixture(scope="module")
def decoder():
    decoder = Decoder()
    yield decoder
    decoder.close()


@pytest.fixture
def limited():
    """A decoder with these limits, closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(**limits) -> Decoder:
            decoder = Decoder(Limits(**limits))
            stack.callback(decoder.close)
            return decoder

        yield make


@pytest.fixture(scope="module")
def slow_jpeg() -> bytes:
    data = repeated_scans(8000, SLOW - 10)
    assert inspection.MAX_WORK > inspection.inspect(data).work > Limits().cheap_work
    return data


class Opening(threading.Thread):
    """One picture opened in a thread; `outcome` is the picture or what was raised."""

    def __init__(self, decoder: Decoder, data: bytes, client: str, done: list | None = None, name: str = ""):
        super().__init__(daemon=True)
        self.sender, self.outcome = Sender(client), None
        self._decoder, self._data, self._done, self._called = decoder, data, done, name
        self.start()

    def run(self):
        try:
            self.outcome = self._decoder.open(self._data, self.sender)
        except (EditError, Left) as error:
            self.outcome = error
        if self._done is not None:
            self._done.append(self._called)

    def result(self):
        self.join(PATIENCE_S)
        assert not self.is_alive(), "it never ended"
        return self.outcome


def until(condition, what: str):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.005)


@functools.cache
def files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "jpeg": saved(photo(300, 200), "JPEG"), "progressive": saved(photo(300, 200), "JPEG", progressive=True),
        "large progressive": saved(photo(2400, 1800), "JPEG", progressive=True, exif=exif),
        "cmyk": saved(photo(300, 200, "CMYK"), "JPEG"), "png": saved(photo(300, 200), "PNG"),
        "large alpha": saved(photo(2000, 1500, "RGBA").rotate(30), "PNG"), "palette": saved(photo(300, 200, "P"), "PNG"),
        "large 16 bit": saved(Image.fromarray(np.arange(2_000_000, dtype=np.uint32).reshape(1000, 2000).astype(np.uint16)), "PNG"),
        "webp": saved(photo(300, 200), "WEBP"), "gif": saved(photo(300, 200), "GIF", save_all=True, append_images=[photo(300, 200, "L")]),
        "bmp": saved(photo(300, 200), "BMP"), "tiff": saved(photo(300, 200), "TIFF", compression="tiff_lzw"),
        "avif": saved(photo(300, 200), "AVIF"), "jpeg 2000": saved(photo(300, 200), "JPEG2000"), "ico": saved(photo(64, 64), "ICO"),
    }  # fmt: skip


@pytest.mark.parametrize("name", files())
def test_the_pixels_are_those_of_the_library_wherever_the_file_is_opened(decoder, name):
    data = files()[name]
    opened = decoder.open(data, Sender())
    assert np.array_equal(opened, open_image(data)) and opened.flags.writeable and opened.flags.c_contiguous


def test_a_picture_put_together_of_strips_is_the_picture_in_one(monkeypatch):
    sources = files()
    whole = {name: open_image(data) for name, data in sources.items()}
    monkeypatch.setattr(picture_files, "_STRIP_PIXELS", 1000)
    for name, data in sources.items():
        assert np.array_equal(open_image(data), whole[name]), name


@pytest.mark.parametrize("data", [saved(photo(512, 512), "JPEG"), saved(photo(1920, 1080), "JPEG"), saved(photo(512, 512), "PNG")])
def test_a_frame_of_a_live_view_needs_no_other_process(limited, monkeypatch, data):
    monkeypatch.setattr(decoding.subprocess, "Popen", None)
    assert limited().open(data, Sender()).shape[2] == 3


def test_the_process_that_opens_pictures_loads_no_torch_and_is_told_no_secret(decoder, monkeypatch):
    code = "import sys, serving.decode_worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(decoding.__file__).parent.parent, check=False).returncode == 0
    if not Path("/proc/self/environ").exists():
        pytest.skip("the system does not show a process's environment")
    monkeypatch.setenv("IMAGE_EDITOR_API_KEY", "k3y")
    other = Decoder()
    other.open(files()["webp"], Sender())
    environments = [Path(f"/proc/{worker._process.pid}/environ").read_bytes() for worker in other._idle if worker._process]
    other.close()
    assert environments and not any(b"k3y" in environment for environment in environments)


@pytest.mark.parametrize("name", huge_headers())
def test_a_tiny_file_that_claims_to_be_huge_is_refused_at_once(decoder, name):
    decoder.open(files()["webp"], Sender())  # the process is there
    began = time.monotonic()
    with pytest.raises(EditError) as refused:
        decoder.open(huge_headers()[name], Sender())
    assert "pixels" in str(refused.value) or "broken" in str(refused.value) or "not a picture" in str(refused.value), refused.value
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_in_headers_text_profiles_frames_or_tiles_costs_no_more_than_a_picture_may(decoder, name):
    data, began = bombs()[name], time.monotonic()
    outcome = Opening(decoder, data, name).result()
    told = isinstance(outcome, EditError) and not isinstance(outcome, Busy) and 20 < len(str(outcome)) < 400
    assert told or isinstance(outcome, np.ndarray), outcome
    assert time.monotonic() - began < decoder.limits.seconds + 5.0
    assert decoder.text(files()["png"], Sender()) == {}
    with contextlib.suppress(EditError):
        decoder.text(data, Sender())


def test_of_1500_pictures_with_turned_bits_each_opens_or_is_refused_in_a_sentence(decoder):
    opened = refused = 0
    for data in flipped(1500, seed=11):
        try:
            assert decoder.open(data, Sender(), max_pixels=10_000_000).ndim == 3
            opened += 1
        except EditError as error:
            assert not isinstance(error, Busy) and 20 < len(str(error)) < 500, error
            refused += 1
    assert opened > 100 and refused > 100, (opened, refused)
    assert decoder.summary().items() >= {"running": 0, "waiting": 0, "held_pixels": 0, "refused": 0}.items()


def test_a_jpeg_that_repeats_its_scans_is_refused_by_what_it_says_of_itself(limited, monkeypatch):
    monkeypatch.setattr(decoding.subprocess, "Popen", None)
    with pytest.raises(EditError, match="100 scans"):
        limited().open(repeated_scans(600, 1500), Sender())
    with pytest.raises(EditError, match="64,000,000 pixels 32 times"):
        limited().open(repeated_scans(8000, 40), Sender())


def test_a_picture_that_takes_longer_than_one_may_is_ended_and_the_next_one_opens(limited, slow_jpeg):
    by_processor, by_clock = limited(processor_seconds=0, workers=1), limited(seconds=0.3, workers=1)
    for decoder in (by_processor, by_clock):
        with pytest.raises(EditError, match="takes more than"):
            decoder.open(slow_jpeg, Sender())
        assert decoder.open(files()["webp"], Sender()).shape == (200, 300, 3)


def test_a_picture_that_needs_more_memory_than_one_may_have_is_refused_and_the_next_one_opens(limited):
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux keeps to the limit")
    decoder = limited(worker_bytes=400 * 2**20)
    with pytest.raises(EditError, match="memory"):
        decoder.open(saved(Image.new("RGBA", (7990, 7990)), "PNG", compress_level=1), Sender())
    assert decoder.open(files()["webp"], Sender()).shape == (200, 300, 3)


def test_what_is_opened_for_one_who_leaves_ends_at_once_waiting_or_at_work(limited, slow_jpeg):
    decoder = limited(workers=1)
    decoder.open(files()["webp"], Sender())  # the process runs: who leaves while it starts has none to end
    at_work = Opening(decoder, slow_jpeg, "a")
    until(lambda: decoder.summary()["running"], "it is at work")
    waiting = Opening(decoder, slow_jpeg, "b")
    until(lambda: decoder.summary()["waiting"], "it waits")
    began = time.monotonic()
    waiting.sender.leave()
    at_work.sender.leave()
    assert isinstance(waiting.result(), Left) and isinstance(at_work.result(), Left)
    until(lambda: decoder.summary()["killed"] == 1, "its process has ended")
    assert time.monotonic() - began < 3.0, "the picture was opened to its end"
    assert decoder.open(files()["webp"], Sender()).shape == (200, 300, 3)  # in a new process, which on busy cores takes a while
    with pytest.raises(Left):
        decoder.open(files()["webp"], at_work.sender)


def test_expensive_pictures_leave_a_process_for_the_others(limited, slow_jpeg):
    decoder = limited()
    hostile = [Opening(decoder, slow_jpeg, "a") for _ in range(4)]
    until(lambda: decoder.summary()["running"] == 1, "one is at work")
    assert decoder.open(files()["webp"], Sender("a")).shape == (200, 300, 3)
    assert decoder.open(files()["large alpha"], Sender("a")).shape == (1500, 2000, 3)
    assert decoder.summary().items() >= {"running": 1, "waiting": 3, "held_pixels": 0}.items(), "all four are still there"
    for each in hostile:
        each.sender.leave()


def test_it_is_the_turn_of_the_sender_who_had_none_yet(limited, slow_jpeg):
    decoder, done = limited(workers=1), []
    first = Opening(decoder, slow_jpeg, "a")
    until(lambda: decoder.summary()["running"], "it is at work")
    openings = []
    for number, client in enumerate(("a", "a", "b", "c")):
        openings.append(Opening(decoder, files()["tiff"], client, done, f"{client}{number}"))
        until(lambda: decoder.summary()["waiting"] == len(openings), "it waits")
    first.sender.leave()
    for each in openings:
        assert isinstance(each.result(), np.ndarray)
    assert done == ["b2", "c3", "a0", "a1"]


def test_more_than_may_wait_are_told_so_at_once(limited, slow_jpeg):
    decoder = limited(workers=1, waiting=1)
    others = [Opening(decoder, slow_jpeg, "a"), Opening(decoder, slow_jpeg, "a")]
    until(lambda: decoder.summary()["waiting"], "it waits")
    with pytest.raises(Busy, match="2 pictures are waiting"):
        decoder.open(files()["tiff"], Sender("b"))
    assert decoder.summary()["refused"] == 1
    for each in others:
        each.sender.leave()


def test_pixels_that_callers_hold_are_bounded_and_free_again_when_dropped(limited):
    decoder = limited(held_pixels=1_000_000, wait_seconds=0.3)
    large = saved(photo(2400, 1800), "JPEG", progressive=True)
    picture = decoder.open(large, Sender())
    part = picture[:10]  # who holds a part holds it all
    del picture
    assert decoder.summary()["held_pixels"] == 2400 * 1800
    with pytest.raises(Busy, match=r"0.3 s"):
        decoder.open(large, Sender())
    assert decoder.open(files()["webp"], Sender()).shape == (200, 300, 3), "small ones are not behind them"
    del part
    assert decoder.open(large, Sender()).shape == (1800, 2400, 3)


def test_a_process_that_dies_is_replaced(decoder):
    decoder.open(files()["webp"], Sender())
    for worker in decoder._idle:
        worker.end()
    assert decoder.open(files()["webp"], Sender()).shape == (200, 300, 3)


def test_no_process_is_left_when_the_decoder_is_closed():
    decoder = Decoder()
    decoder.open(files()["webp"], Sender())
    process = next(worker._process for worker in decoder._idle if worker._process)
    decoder.close()
    assert process.poll() is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, 0)
        raise AssertionError("it still runs")
