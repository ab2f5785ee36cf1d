"""The live view, as a person meets it: the real program, a real headless Chromium, a fake camera. Nothing sleeps."""

import pytest
from playwright.sync_api import expect
from support.page import PRESETS, await_frames, live, pixels, start_live
from support.pictures import assert_edited, psnr_db, saturation


def test_live_shows_edited_frames_follows_the_prompt_and_stops(ready, open_page, camera):
    page = open_page(ready.url)
    start_live(page, "Black and white")
    await_frames(page, 2)
    seen = pixels(page, ".camera")
    assert psnr_db(seen, camera) > 25, "the browser's camera shows another picture than the test's"
    output = pixels(page, ".edited")
    assert output.shape == (256, 256, 3)
    assert saturation(output) < 0.15 * saturation(seen), (saturation(output), saturation(seen))
    assert_edited(output, "black and white", camera)

    # A new prompt: the frame that is in the model may still come with the old one, the next has the new one.
    page.evaluate("""() => {
        const root = document.querySelector(".live");
        window.shown = [];
        new MutationObserver(() => window.shown.push([performance.now(), root.dataset.prompt]))
            .observe(root, {attributes: true, attributeFilter: ["data-frames"]});
    }""")
    page.locator(".live").get_by_role("button", name="Negative", exact=True).click()
    new = page.get_by_label("Prompt", exact=True).first.input_value()
    assert new == PRESETS["Negative"]
    await_frames(page, 1, prompt=new)
    shown = page.evaluate("window.shown")
    old = [at for at, prompt in shown if prompt != new]
    first_new = next(at for at, prompt in shown if prompt == new)
    frame_s = ready.health()["stats"]["stages_ms"]["total"] / 1000
    assert len(old) <= 2, shown  # one in the model, and one whose picture was on its way
    # One second, where the machine can edit a frame in less; on a busier one, two frames.
    assert (first_new - shown[0][0]) / 1000 <= max(1.0, 2 * frame_s), (shown, frame_s)
    await_frames(page, 1)
    assert_edited(pixels(page, ".edited"), "negative", camera)

    # The line of truth; its two main numbers stand beside Start, in sight of the pictures.
    expect(page.locator(".t-rate")).to_contain_text("frames/s")
    expect(page.locator(".t-delay")).to_contain_text("ms to the screen")
    assert page.evaluate("document.querySelector('.t-fps').textContent.startsWith(document.querySelector('.t-rate').textContent)")
    expect(page.locator(".t-fps")).to_contain_text("frames/s")
    expect(page.locator(".t-latency")).to_contain_text("ms")
    expect(page.locator(".t-model")).to_contain_text("denoise")
    expect(page.locator(".t-running")).to_contain_text("pocket on cpu, 256×256, 2 steps")

    # Little moves (the test's camera shows one picture): the last result is shown again, and the page says so.
    skipped = ready.health()["stats"]["skipped"]
    page.get_by_text("Advanced", exact=True).click()
    page.get_by_label("When little moves").select_option("patch")
    page.get_by_label("The language model looks at").select_option("kept")
    ready.until(lambda health: health["stats"]["skipped"] > skipped + 3, "frames are skipped")
    expect(page.locator(".t-dropped")).to_contain_text("shown again")
    expect(page.locator(".t-model")).to_contain_text("denoise")
    assert_edited(pixels(page, ".edited"), "negative", camera)

    # Stop: the camera is let go, the session closed, nothing comes or goes any more.
    track = page.evaluate_handle("document.querySelector('.camera').srcObject.getVideoTracks()[0]")
    page.get_by_role("button", name="Stop", exact=True).click()
    assert track.evaluate("track => track.readyState") == "ended"
    assert page.evaluate("document.querySelector('.camera').srcObject") is None
    ready.until(lambda health: health["stats"]["sessions"] == 0, "the session is closed")
    at_stop = (live(page, "frames"), live(page, "sent"))
    served = ready.health()["stats"]["frames"]
    page.evaluate(
        "() => new Promise(resolve => { let n = 60; const f = () => n-- ? requestAnimationFrame(f) : resolve(); f(); })"
    )
    assert (live(page, "frames"), live(page, "sent")) == at_stop and live(page, "state") == "idle"
    assert ready.health()["stats"]["frames"] == served


def test_live_settings_take_effect_while_it_runs(ready, open_page):
    page = open_page(ready.url)
    start_live(page)
    seed = live(page, "seed")
    page.get_by_role("button", name="New seed").click()
    page.wait_for_function("seed => document.querySelector('.live').dataset.seed !== seed", arg=seed)
    page.get_by_label("Size", exact=True).click()
    page.get_by_role("option", name="128 × 128").click()
    page.wait_for_function("document.querySelector('.edited').width === 128")
    page.get_by_label("number input for Steps").fill("1")
    page.get_by_label("number input for Steps").press("Enter")
    expect(page.locator(".t-running")).to_contain_text("128×128, 1 step")
    page.get_by_label("Prompt", exact=True).first.fill("   ")
    expect(page.locator(".message")).to_contain_text("The prompt is empty")
    await_frames(page, 2)  # it goes on with the last prompt
    page.get_by_label("Prompt", exact=True).first.fill("make it a pencil sketch")
    await_frames(page, 1, prompt="make it a pencil sketch")
    expect(page.locator(".message")).to_be_hidden()


def test_live_connects_again_by_itself_and_says_so(ready, open_page):
    script = """
        window.sockets = [];
        const Plain = WebSocket;
        window.WebSocket = class extends Plain { constructor(...args) { super(...args); window.sockets.push(this); } };
        window.said = [];
        addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
            const message = document.querySelector(".message");
            if (message) window.said.push(message.textContent);
        }).observe(document, {subtree: true, childList: true, attributes: true, characterData: true}));
    """
    page = open_page(ready.url, script)
    start_live(page)
    page.evaluate("window.sockets.filter(socket => socket.url.endsWith('/live')).at(-1).close()")
    page.wait_for_function("window.said.some(text => text.includes('Connecting again'))")
    await_frames(page, 2)
    assert live(page, "state") == "running"
    expect(page.locator(".message")).to_be_hidden()


@pytest.mark.parametrize(
    "script, says",
    [
        ("navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', 'NotFoundError'))", "No camera"),
        ("navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', 'NotAllowedError'))", "not allowed"),
        ("Object.defineProperty(Navigator.prototype, 'mediaDevices', {get: () => undefined})", "--ssl-certfile"),
    ],
    ids=["no camera", "denied", "not over https"],
)  # fmt: skip
def test_without_a_camera_the_page_says_what_to_do(program, open_page, script, says):
    page = open_page(program.url, script)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator(".message")).to_contain_text(says)
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_enabled()
