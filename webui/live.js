/* The live view: camera -> JPEG frames over one WebSocket -> edited JPEG frames onto a canvas.

Gradio runs this file once the markup of live.html is on the page, with `element` (its root) and `props` at hand.
The protocol is written down at the top of server.py. What keeps the picture fresh: a frame is taken when the camera
delivers one, only while fewer than three are unacknowledged, and a result older than the one on screen is not drawn.
A slow model is not sent every frame: five for each that it edits keep it fresh, and spare a small machine the rest.
Everything that belongs to one press of Start hangs on one object, `run`; when it ends, whatever arrives late for it
finds `run.alive` false and does nothing. The element's data-* attributes tell tests and style sheets what goes on. */

const root = element.querySelector(".live");
const $ = (selector) => root.querySelector(selector);
const video = $(".camera"), canvas = $(".edited"), message = $(".message");
const startButton = $(".start"), stopButton = $(".stop"), cameras = $(".cameras"), prompt = $(".prompt");
const still = $(".still"), looks = $(".looks");

const MAX_UNACKED = 3;
const JPEG_QUALITY = 0.85;
const FRAMES_PER_EDIT = 5;
const LONGEST_PAUSE_MS = 200;
const WINDOW_MS = 3000; // what "now" means for rates and latencies
const SILENCE_MS = 10000; // an acknowledgement takes a round trip; after this long the connection is dead
const STAGES = [["prepare", "prepare"], ["encode_prompt", "prompt"], ["encode_references", "picture"],
  ["denoise", "denoise"], ["decode", "decode"]];

let run = null;

// ------------------------------------------------------------------------------------------------ what is shown

function setState(state) {
  root.dataset.state = state;
  const on = run !== null;
  startButton.disabled = on;
  stopButton.disabled = !on;
}

function say(text, bad = false) {
  message.textContent = text || "";
  message.hidden = !text;
  message.classList.toggle("bad", bad);
}

function unsay(own) {
  own.said = "";
  say("");
}

function shapeStage(width, height, contain) {
  for (const picture of root.querySelectorAll(".picture")) picture.style.aspectRatio = `${width} / ${height}`;
  video.classList.toggle("contain", contain);
}

const quantile = (values, q) => {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : NaN;
};
const put = (name, text) => { $(`.t-${name}`).textContent = text; };

function tellTruth() {
  if (!run) return;
  const now = performance.now();
  const modelMs = run.modelMs.total ?? 0;
  const windowMs = Math.min(Math.max(WINDOW_MS, 4 * modelMs), now - run.startedAt); // a slow model's rate is not 0
  run.shown = run.shown.filter((frame) => now - frame.at < windowMs);
  run.taken = run.taken.filter((at) => now - at < windowMs);
  const rate = (list) => list.length / (windowMs / 1000);
  put("fps", `${rate(run.shown).toFixed(1)} frames/s of ${rate(run.taken).toFixed(0)} from the camera`);
  const latencies = run.shown.map((frame) => frame.latency).filter((ms) => ms !== undefined);
  if (latencies.length) {
    put("latency", `${quantile(latencies, 0.5).toFixed(0)} ms (95 %: ${quantile(latencies, 0.95).toFixed(0)} ms)`);
  }
  const meta = run.meta;
  if (meta) {
    const parts = STAGES.filter(([key]) => key in run.modelMs).map(([key, name]) => `${name} ${run.modelMs[key].toFixed(0)}`);
    put("model", `${modelMs.toFixed(0)} ms: ${parts.join(" · ")}`);
    put("dropped", `${meta.dropped + run.skipped} of ${run.cameraFrames} frames, for newer ones` +
      (run.repeated ? `; ${run.repeated} pictures shown again, as little moved` : ""));
    put("running", `${run.modelName}, ${meta.width}×${meta.height}, ${meta.steps} step${meta.steps > 1 ? "s" : ""}`);
  }
  const waited = (now - run.lastResultAt) / 1000;
  if (root.dataset.state === "running" && waited > Math.max(3, 2 * modelMs / 1000)) {
    say(isHidden() ? "Paused while the view is hidden." : `The model is working: ${waited.toFixed(0)} s for this picture.`);
    run.said = "frame";
  }
  if (run.unacked.size && now - run.heardAt > SILENCE_MS) lose(run, "The server has not answered for 10 s.");
}

// ------------------------------------------------------------------------------------------------------ settings

const isHidden = () => document.hidden || root.offsetParent === null;

function outputSize() {
  // As output_size() in server.py: the area asked for, the camera's shape, both sides multiples of 16.
  const settings = window.editSettings || {};
  const side = settings.size || run.defaultSize;
  if (settings.shape !== "keep") return { width: side, height: side };
  const aspect = (video.videoWidth || 1) / (video.videoHeight || 1);
  const near = (x) => [...new Set([Math.floor(x / 16) * 16, Math.ceil(x / 16) * 16])]
    .map((v) => Math.min(Math.max(v, 64), 2048));
  let best = null;
  for (const width of near(side * Math.sqrt(aspect))) {
    for (const height of near(side / Math.sqrt(aspect))) {
      const error = Math.abs(Math.log(width / height / aspect)), area = Math.abs(width * height - side * side);
      if (!best || error < best.error - 1e-6 || (error < best.error + 1e-6 && area < best.area)) {
        best = { width, height, error, area };
      }
    }
  }
  return { width: best.width, height: best.height };
}

function sendParams() {
  if (!run || !run.ready || run.socket?.readyState !== WebSocket.OPEN) return;
  const settings = window.editSettings || {};
  run.size = outputSize();
  const contain = settings.shape === "pad";
  shapeStage(run.size.width, run.size.height, contain);
  const text = prompt.value.trim();
  if (!text) {
    say("The prompt is empty. Say what to change, or choose a preset." +
      (run.sentPrompt ? ` Until then: “${run.sentPrompt.slice(0, 100)}${run.sentPrompt.length > 100 ? "…" : ""}”.` : ""));
    run.said = "empty";
    if (!run.sentPrompt) return;
  } else if (run.said === "empty") unsay(run);
  run.sentPrompt = text || run.sentPrompt;
  run.socket.send(JSON.stringify({
    type: "params", prompt: run.sentPrompt, negative_prompt: settings.negative_prompt || "",
    steps: settings.steps, seed: settings.seed, cfg_scale: settings.cfg_scale,
    width: run.size.width, height: run.size.height, fit: contain ? "pad" : "crop",
    skip_similar: still.value, embeds: looks.value,
  }));
}

// ------------------------------------------------------------------------------------------------ camera to server

const CAMERA_ERRORS = {
  NotAllowedError: "The browser was not allowed to use the camera. Allow it beside the address (the camera or lock " +
    "sign), then press Start again.",
  NotFoundError: "No camera was found. Connect one and press Start again, or edit a photo in the Upload tab.",
  NotReadableError: "The camera is in use by another program, or it failed. Close the other program and press Start.",
  OverconstrainedError: "The chosen camera is gone. Choose another and press Start again.",
};

const INSECURE = "Browsers give a page the camera only over HTTPS or on localhost, and this page is at " +
  `${location.origin}.\nAny of these helps:\n` +
  "• start the program with --ssl-keyfile KEY.pem --ssl-certfile CERT.pem and open https://…\n" +
  `• from your machine: ssh -L ${location.port || 7865}:localhost:${location.port || 7865} SERVER, then open ` +
  `http://localhost:${location.port || 7865}\n` +
  "• start the program with --share";

async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) throw Object.assign(new Error(INSECURE), { shown: true });
  const large = ((window.editSettings || {}).size || 256) > 400;
  const constraints = {
    audio: false,
    video: {
      width: { ideal: large ? 1280 : 640 }, height: { ideal: large ? 720 : 480 }, frameRate: { ideal: 30 },
      ...(cameras.value ? { deviceId: { exact: cameras.value } } : { facingMode: "user" }),
    },
  };
  const stream = await navigator.mediaDevices.getUserMedia(constraints);
  const track = stream.getVideoTracks()[0];
  track.addEventListener("ended", () => {
    if (run?.stream === stream) stop("The camera stopped: it was unplugged, or another program took it.", true);
  });
  return stream;
}

async function showStream(stream) {
  video.srcObject = stream;
  await video.play();
  const { width, height } = outputSize(); // the model may still be loading: the shape is known all the same
  shapeStage(width, height, (window.editSettings || {}).shape === "pad");
  video.parentElement.classList.add("filled");
}

async function listCameras() {
  if (!navigator.mediaDevices?.enumerateDevices) return;
  const found = (await navigator.mediaDevices.enumerateDevices()).filter((d) => d.kind === "videoinput" && d.deviceId);
  if (!found.length) return; // before permission browsers name none
  const current = run?.stream?.getVideoTracks()[0]?.getSettings().deviceId || cameras.value;
  cameras.replaceChildren(...found.map((device, i) => new Option(device.label || `Camera ${i + 1}`, device.deviceId)));
  if (found.some((device) => device.deviceId === current)) cameras.value = current;
}

function endStream(stream) {
  for (const track of stream?.getTracks() || []) track.stop();
}

function everyFrame(own) {
  const next = () => {
    if (!own.alive) return;
    if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(onFrame);
    else setTimeout(() => onFrame(performance.now(), {}), 33); // older Firefox
  };
  const onFrame = (now, metadata) => {
    if (!own.alive) return;
    own.cameraFrames += 1;
    own.taken.push(performance.now());
    // captureTime is the camera's own; without it, the moment at which the frame was ready to be shown.
    if (mayTake(own)) sendFrame(own, metadata.captureTime ?? metadata.presentationTime ?? now);
    else if (own.ready && own.sentPrompt && !isHidden()) own.skipped += 1;
    next();
  };
  next();
}

const mayTake = (own) => own.ready && own.size && own.sentPrompt && !own.encoding && !isHidden() &&
  own.unacked.size < MAX_UNACKED && own.socket?.readyState === WebSocket.OPEN &&
  performance.now() - own.sentAt >= Math.min((own.meta?.stages_ms.total ?? 0) / FRAMES_PER_EDIT, LONGEST_PAUSE_MS);

async function sendFrame(own, capturedAt) {
  own.encoding = true;
  own.sentAt = performance.now();
  const socket = own.socket;
  try {
    const { width, height } = own.size;
    const target = own.scratch;
    if (target.width !== width || target.height !== height) Object.assign(target, { width, height });
    const context = target.getContext("2d", { alpha: false });
    const [w, h] = [video.videoWidth, video.videoHeight];
    const contain = video.classList.contains("contain");
    const scale = contain ? Math.min(width / w, height / h) : Math.max(width / w, height / h);
    context.imageSmoothingQuality = "high";
    if (contain) context.fillRect(0, 0, width, height);
    context.drawImage(video, (width - w * scale) / 2, (height - h * scale) / 2, w * scale, h * scale);
    const jpeg = target.convertToBlob
      ? await target.convertToBlob({ type: "image/jpeg", quality: JPEG_QUALITY })
      : await new Promise((resolve) => target.toBlob(resolve, "image/jpeg", JPEG_QUALITY));
    const bytes = new Uint8Array(4 + jpeg.size);
    bytes.set(new Uint8Array(await jpeg.arrayBuffer()), 4);
    if (!own.alive || own.socket !== socket || socket.readyState !== WebSocket.OPEN) return;
    own.number = (own.number + 1) >>> 0;
    new DataView(bytes.buffer).setUint32(0, own.number, true);
    if (!own.unacked.size) own.heardAt = performance.now(); // the silence is counted from a question on
    own.unacked.add(own.number);
    own.capturedAt.set(own.number, capturedAt);
    socket.send(bytes);
    root.dataset.sent = Number(root.dataset.sent) + 1;
  } finally {
    own.encoding = false;
  }
}

// ------------------------------------------------------------------------------------------------ server to canvas

function connect(own) {
  const url = new URL("live", document.baseURI);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  url.search = url.hash = "";
  const socket = new WebSocket(url);
  own.socket = socket;
  own.ready = false;
  own.unacked.clear();
  own.capturedAt.clear();
  socket.binaryType = "arraybuffer";
  socket.onopen = () => { own.opened = true; own.heardAt = performance.now(); };
  socket.onmessage = (event) => {
    if (!own.alive || own.socket !== socket) return;
    own.heardAt = performance.now();
    if (typeof event.data === "string") onText(own, JSON.parse(event.data));
    else onPicture(own, event.data);
  };
  socket.onclose = () => { if (own.socket === socket) lose(own, "The connection was lost."); };
}

async function lose(own, why) {
  if (!own.alive || !own.socket) return;
  const opened = own.opened;
  own.socket.close();
  own.socket = null;
  own.ready = own.opened = false;
  own.attempts = opened ? 1 : own.attempts + 1;
  setState("reconnecting");
  say(`${why} Connecting again…`, true);
  const health = await fetch(new URL("health", document.baseURI)).catch(() => null);
  if (!own.alive) return;
  if (health?.status === 401) return stop("Your login has ended. Reload the page and log in again.", true);
  if (health && !opened && own.attempts > 2) {
    say("The server answers, but its live socket cannot be opened: a proxy between may not pass WebSockets. " +
      "Still trying…", true);
  }
  setTimeout(() => { if (own.alive && !own.socket) connect(own); }, Math.min(500 * 2 ** (own.attempts - 1), 5000));
}

function onText(own, data) {
  if (data.type === "ack") own.unacked.delete(data.number);
  else if (data.type === "status") onStatus(own, data);
  else if (data.type === "error") {
    own.capturedAt.delete(data.number);
    own.lastResultAt = performance.now();
    own.said = data.number === undefined ? "params" : "frame"; // what must come right for it to be taken back
    say(data.message, true);
  } else if (data.type === "params" && own.said === "params") unsay(own);
}

function onStatus(own, status) {
  if (status.state === "ready") {
    own.attempts = 0;
    own.defaultSize = status.default_size;
    const { model, lora, device } = status.description;
    own.modelName = `${model}${lora ? ` + ${lora}` : ""} on ${device}`;
    if (own.ready) return;
    own.ready = true;
    own.lastResultAt = performance.now();
    setState("running");
    say("");
    sendParams();
  } else if (status.state === "loading") {
    setState("loading");
    say(`The model is loading: ${Math.round(status.fraction * 100)} %. ${status.text}`);
  } else if (status.state === "busy") {
    own.ready = false; // nothing to send until there is a place
    setState("busy");
    say(`${status.text} Waiting for a free place…`);
  } else if (status.state === "failed") {
    stop(`The model could not be loaded. ${status.text}`, true);
  }
}

async function onPicture(own, buffer) {
  const view = new DataView(buffer);
  const number = view.getUint32(0, true), length = view.getUint32(4, true);
  const meta = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const bitmap = await createImageBitmap(new Blob([new Uint8Array(buffer, 8 + length)], { type: "image/jpeg" }));
  if (!own.alive || number <= own.newest) return bitmap.close();
  own.newest = number;
  own.meta = meta;
  if (meta.skipped) own.repeated += 1;
  else own.modelMs = meta.stages_ms; // a repeated picture took the model no time: its milliseconds are no news
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  }
  canvas.getContext("2d", { alpha: false }).drawImage(bitmap, 0, 0);
  bitmap.close();
  canvas.parentElement.classList.add("filled");
  canvas.setAttribute("aria-label", `Edited picture: ${meta.prompt}`);
  const capturedAt = own.capturedAt.get(number);
  for (const old of own.capturedAt.keys()) if (old <= number) own.capturedAt.delete(old);
  own.lastResultAt = performance.now();
  if (own.said === "frame") unsay(own);
  requestAnimationFrame(() => { // the frame is on the screen when the browser has painted
    if (!own.alive) return;
    const at = performance.now();
    own.shown.push({ at, latency: capturedAt === undefined ? undefined : at - capturedAt });
  });
  root.dataset.prompt = meta.prompt;
  root.dataset.seed = meta.seed;
  root.dataset.frames = Number(root.dataset.frames) + 1;
}

// -------------------------------------------------------------------------------------------------- start and stop

async function start() {
  if (run) return;
  const own = run = {
    alive: true, stream: null, socket: null, opened: false, ready: false, attempts: 0, number: 0, newest: 0,
    unacked: new Set(), capturedAt: new Map(), encoding: false, size: null, sentPrompt: "", sentAt: 0, defaultSize: 256,
    modelName: "", meta: null, said: "", shown: [], taken: [], cameraFrames: 0, skipped: 0, repeated: 0, modelMs: {},
    startedAt: performance.now(), lastResultAt: performance.now(), heardAt: performance.now(),
    scratch: window.OffscreenCanvas ? new OffscreenCanvas(16, 16) : document.createElement("canvas"),
  };
  setState("starting");
  say("Asking for the camera…");
  try {
    const stream = await openCamera();
    if (!own.alive) return endStream(stream);
    own.stream = stream;
    await showStream(stream);
    await listCameras();
    if (!own.alive) return;
  } catch (error) {
    if (own.alive) stop(error.shown ? error.message : CAMERA_ERRORS[error.name] || `The camera failed: ${error.message}`, true);
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
  own.alive = false;
  run = null;
  clearInterval(own.timer);
  if (own.socket?.readyState === WebSocket.OPEN) own.socket.send(JSON.stringify({ type: "stop" }));
  own.socket?.close();
  own.socket = null;
  endStream(own.stream);
  video.srcObject = null;
  video.parentElement.classList.remove("filled");
  setState(bad ? "failed" : "idle");
  say(text, bad);
}

async function switchCamera() {
  const own = run;
  if (!own?.stream) return;
  const before = own.stream;
  try {
    own.stream = null; // its end is no accident
    endStream(before);
    const stream = await openCamera();
    if (!own.alive) return endStream(stream);
    own.stream = stream;
    await showStream(stream);
    sendParams(); // another camera, another shape
  } catch (error) {
    if (own.alive) stop(CAMERA_ERRORS[error.name] || `The camera failed: ${error.message}`, true);
  }
}

// ---------------------------------------------------------------------------------------------------------- wiring

function markPreset() {
  for (const chip of root.querySelectorAll(".chip")) {
    chip.setAttribute("aria-pressed", chip.dataset.prompt === prompt.value.trim());
  }
}

let typing = 0;
prompt.addEventListener("input", () => { markPreset(); clearTimeout(typing); typing = setTimeout(sendParams, 300); });
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter") { clearTimeout(typing); if (run) sendParams(); else start(); }
});
root.querySelector(".chips").addEventListener("click", (event) => {
  const chip = event.target.closest(".chip");
  if (!chip) return;
  prompt.value = chip.dataset.prompt;
  markPreset();
  clearTimeout(typing);
  sendParams();
});
startButton.addEventListener("click", start);
stopButton.addEventListener("click", () => stop());
cameras.addEventListener("change", switchCamera);
for (const choice of [still, looks]) choice.addEventListener("change", sendParams);
navigator.mediaDevices?.addEventListener?.("devicechange", listCameras);
video.addEventListener("resize", sendParams); // the camera, or a turned phone, changed its shape
window.addEventListener("edit-settings", sendParams);
window.addEventListener("pagehide", () => stop());
prompt.value = prompt.dataset.first;
markPreset();
setState("idle");
if (!navigator.mediaDevices?.getUserMedia) say(INSECURE, true);
