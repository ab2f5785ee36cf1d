"""Memory that pictures of odd sizes leave free inside the process goes back to the system."""

import gc
import sys
import threading
import time

import numpy as np
import pytest
from support.engine import PATIENCE_S

from engine.host_memory import IDLE_S, LARGE_PIXELS, HostMemory, malloc_trim
from qwen_realtime import EditParams, RealtimeEngine
from serving.status import resident_bytes


def test_it_is_trimmed_after_a_large_picture_and_once_when_no_more_frames_come():
    trims, trimmed = [], threading.Event()

    def trim(left: int) -> int:
        trims.append(left)
        trimmed.set()
        return 1

    HostMemory(trim, idle_s=3600.0).computed(LARGE_PIXELS)
    assert trims == [0]
    trimmed.clear()
    memory = HostMemory(trim, idle_s=0.05)
    for _ in range(5):
        memory.computed(256 * 256)
    assert trimmed.wait(PATIENCE_S) and trims == [0, 0]
    HostMemory(None).computed(LARGE_PIXELS)
    patient = HostMemory(trim, idle_s=3600.0)
    patient.computed(1)
    waiter = patient._waiter
    patient.close()
    assert trims == [0, 0] and waiter is not None and not waiter.is_alive(), "closed at once"


@pytest.mark.endurance
@pytest.mark.skipif(sys.platform != "linux" or malloc_trim() is None, reason="needs glibc")
def test_pictures_of_many_sizes_leave_the_memory_as_it_was(pocket):
    rng, memory = np.random.default_rng(0), []
    sizes = [(1900, 200), (150, 1700), (800, 800), (1, 2000), (700, 300), (1024, 900)]
    with RealtimeEngine(pocket) as engine:
        for number in range(40):
            width, height = sizes[number % len(sizes)]
            picture = rng.integers(0, 256, (64, 64, 3), np.uint8)
            params = EditParams(f"make it sepia {number}", width=max(1, width - number), height=height, steps=1 + number % 3)
            engine.edit([picture], params, timeout=2 * PATIENCE_S)
            if number % 13 == 12:
                gc.collect()
                time.sleep(2 * IDLE_S)
                memory.append(resident_bytes())
    pocket.disable_fast_path()
    assert memory[-1] - memory[0] < 100 * 2**20, [f"{count / 2**20:.0f} MB" for count in memory]
