"""Shared fixtures and marks. The suite runs on the embedded model: real classes, small weights, no network, no GPU."""

import copy
import faulthandler
import functools
import os
import re

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the program does: threads that spin starve all else on 2 cores
# Of two workers on two cores each computes on one; products of 64x64 tensors gain nothing from a second.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
pytest.register_assert_rewrite("support")  # its asserts say their numbers too

# Marks -------------------------------------------------------------------------------------------------------------------

BROWSER_FIXTURES = {"browser", "open_page"}
PROGRAM_FIXTURES = {"program", "ready", "port"}
STARTS_A_PROGRAM = {"test_http_program", "test_kernels", "test_schemathesis_finds_nothing_that_the_document_does_not_promise"}
LONGEST = ["test_webui", "test_live_stream", "test_kernels", "test_techniques", "test_cached_pipeline", "test_stock_methods"]


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by these marks
def pytest_collection_modifyitems(config, items):
    for item in items:
        module, fixtures = item.module.__name__, set(item.fixturenames)
        if BROWSER_FIXTURES & fixtures:
            item.add_marker("browser")
        if PROGRAM_FIXTURES & fixtures or STARTS_A_PROGRAM & {module, item.originalname}:
            item.add_marker("program")
        if re.search(r"(^|_)cuda$", module):
            item.add_marker("cuda")
    # A long file that begins last would have one worker for itself, and the other nothing to do.
    order = {module: place for place, module in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.module.__name__, len(order)))
    if "endurance" not in config.option.markexpr:  # only `-m endurance` runs what takes minutes by nature
        long = {item for item in items if item.get_closest_marker("endurance")}
        config.hook.pytest_deselected(items=list(long))
        items[:] = [item for item in items if item not in long]


def pytest_runtest_setup(item):
    if item.get_closest_marker("endurance"):  # may take longer than the limit of pyproject.toml
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session", autouse=True)
def one_tls_context():
    """Each client of httpx reads all certificates of the machine when it is made, 20 ms; here once for all."""
    from httpx._transports import default

    made, default.create_ssl_context = default.create_ssl_context, functools.cache(default.create_ssl_context)
    yield
    default.create_ssl_context = made


# Pictures and models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def photo():
    """`photo(width, height, seed)` -> uint8 (H, W, 3)."""
    from support.pictures import make_photo

    return make_photo


@pytest.fixture(scope="session")
def pocket():
    """The embedded model in fp32 on the CPU, loaded once. A test that changes it must put it back."""
    from cached_pipeline import load_pipeline

    pipeline = load_pipeline("pocket", device="cpu", dtype=torch.float32)
    # Untrained weights end in zeros: every comparison of outputs would hold. No effect on a trained model.
    if not pipeline.transformer.proj_out.weight.any():
        torch.nn.init.normal_(
            pipeline.transformer.proj_out.weight, std=0.05, generator=torch.Generator().manual_seed(0)
        )
    return pipeline


@pytest.fixture(scope="session")
def pocket_copy(pocket):
    """`pocket_copy(dtype)` -> a pipeline of the test's own on copies of the session's networks: 30 ms where loading takes a
    second. For tests that change the model and whose claim is not about loading.
    """

    def pocket_copy(dtype: torch.dtype = torch.float32):
        parts = {name: copy.deepcopy(part) for name, part in pocket.components.items() if name not in ("tokenizer", "processor")}
        own = type(pocket)(tokenizer=pocket.tokenizer, processor=pocket.processor, **parts)
        own._origin = copy.deepcopy(pocket._origin)
        own.set_progress_bar_config(disable=True)
        return own.to(dtype)

    return pocket_copy


# The program, one for the session of a worker, and the browser, one for each module -------------------------------------------


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """`webui_realtime.py` on the pocket model as soon as it answers; the model may still be loading."""
    from support.page import Program

    from webui.mcp import mcp_missing

    flags = [] if mcp_missing() else ["--mcp"]  # where its package is here
    with Program(tmp_path_factory.mktemp("program") / "log.txt", *flags) as program:
        yield program


@pytest.fixture
def ready(program):
    """The program with its model loaded and no one served: what the test before has left is gone."""
    program.until(lambda health: health["state"] == "ready", "the model is loaded")
    program.until(lambda health: health["stats"]["sessions"] == 0, "the sessions of the test before are closed")
    return program


@pytest.fixture(scope="session")
def camera():
    """What the browser's camera shows: uint8 (256, 256, 3)."""
    from support.pictures import held_out

    return held_out("coffee.png")


@pytest.fixture(scope="module")  # not longer: its event loop runs in this thread, where other tests run theirs
def playwright():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browser(playwright, camera, tmp_path_factory):
    """Chromium; a module whose camera shows something else has a browser of its own under this name."""
    from support.page import launch_browser, write_camera

    browser = launch_browser(playwright, write_camera(tmp_path_factory.mktemp("camera") / "camera.mjpeg", camera))
    yield browser
    browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, init script, **context options) -> a page; no page may write an error to the console."""
    from support.page import Pages

    with Pages(browser) as pages:
        yield pages.open
    assert not pages.errors, pages.errors
