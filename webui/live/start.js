/* Start, stop, keys. The last file: everything above is there. */

async function start() {
  if (run) return;
  const now = performance.now();
  const own = run = {
    alive: true, source: null, socket: null, link: null, ready: false, ending: false, attempts: 0, description: null, defaultSize: 256,
    number: 0, newest: 0, answered: 0, asked: new Map(), // the last sent, shown, answered; what was asked with each
    encoding: false, resent: 0, held: null, intervalMs: 33, beat: newBeat(), tick: null, // ms between the source's frames
    size: null, params: null, level: 0, weight: newWeight(),
    scratch: window.OffscreenCanvas ? new OffscreenCanvas(16, 16) : document.createElement("canvas"),
    meta: null, modelMs: {}, memory: null, said: "", frozen: false, onScreen: null,
    shown: [], taken: [], sourceFrames: 0, skipped: 0, repeated: 0, startedAt: now, lastResultAt: now, heardAt: now,
  };
  setState("starting");
  put("rate", ""), put("delay", "");
  say({ camera: "Asking for the camera…", screen: "Asking which screen or window…" }[sources.value] ?? "Opening the file…");
  try {
    const source = await openSource();
    if (!own.alive) return closeSource(source);
    own.source = source;
    await showSource(source);
    await listCameras();
    if (!own.alive) return;
  } catch (error) {
    if (own.alive) sourceFailed(error);
    return;
  }
  say("Connecting…");
  own.timer = setInterval(tellTruth, 1000);
  connect(own);
  everyFrame(own);
}

function stop(text = "", bad = false) {
  const own = run;
  if (!own) return;
  setFrozen(false);
  recorder?.stop();
  own.alive = false;
  run = null;
  lastOnScreen = own.onScreen ?? lastOnScreen;
  lastModel = own.description ?? lastModel;
  clearInterval(own.timer);
  own.tick?.clock.clearTimeout(own.tick.id);
  own.link?.close();
  own.socket?.close();
  own.link = own.socket = null;
  closeSource(own.source);
  hideSource();
  root.dataset.link = "none";
  setState(bad ? "failed" : "idle");
  say(text, bad);
}

// ---------------------------------------------------------------------------------------------------------------- keys

const KEYS = {
  " ": () => setFrozen(!run?.frozen), s: snapshot, r: toggleRecord, f: toggleFull,
  m: () => setMirror(!root.classList.contains("mirrored")),
};

document.addEventListener("keydown", (event) => {
  const target = event.target;
  if (root.offsetParent === null || event.defaultPrevented || event.repeat || event.isComposing) return;
  if (target.closest?.("input:not([type=range]):not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]")) return;
  if (event.key === "Enter" && event.ctrlKey) {
    event.preventDefault();
    if (run) applyPrompt();
    else start();
  } else if (event.ctrlKey || event.metaKey || event.altKey) {
    return; // the browser's own
  } else if (event.key === "Escape") {
    if (!document.fullscreenElement) stop(); // there it leaves the full screen
  } else if (event.key === " " && target.closest?.("button, summary, a, input, [role=button], [role=tab]")) {
    return; // presses what has the focus
  } else {
    const act = KEYS[event.key.toLowerCase()];
    if (!act || (event.key === " " && !run)) return;
    event.preventDefault();
    act();
  }
});

// -------------------------------------------------------------------------------------------------------- first wiring

startButton.addEventListener("click", start);
stopButton.addEventListener("click", () => stop());
video.addEventListener("resize", sendParams); // the camera, or a turned phone, changed its shape
window.addEventListener("edit-settings", sendParams);
window.addEventListener("pagehide", () => { stop(); popout?.close(); });
for (const button of [$(".snap"), $(".record")]) button.disabled = true;
showPickers();
setState("idle");
if (!navigator.mediaDevices?.getUserMedia) say(NO_CAMERA, true);
