/* The live view: pictures of a source -> JPEG frames to the server -> edited JPEG frames onto a canvas.

Gradio runs these files as one script, in the order of SCRIPTS in __init__.py, once the markup of live.html is on the
page, with `element` (its root), `props` and `trigger` in scope. Where to find what:

  elements.js   the parts of the markup, what is said to the person          sources.js  camera, screen, video, picture
  settings.js   the controls as the engine's EditParams, favourites          frames.js   a frame taken, cut, encoded, sent
  links.js      live socket, HTTP instead of it, connecting again            beat.js     which frame is due
  pictures.js   results onto the canvas                                      weight.js   smaller frames on a slow link
  stage.js      layouts, wipe, mirror, full screen, pop-out, freeze          truth.js    what is measured, each second
  gallery.js    snapshots, recording, dropped files                          png.js      settings inside a PNG, both ways
  start.js      start, stop, keys, first wiring

Everything that belongs to one press of Start hangs on one object, `run`; when it ends, whatever arrives late for it
finds `run.alive` false and does nothing. The element's data-* attributes tell tests and style sheets what goes on. */

const root = element.querySelector(".live");
const $ = (selector) => root.querySelector(selector);
const video = $(".camera"), photo = $(".photo"), canvas = $(".edited"), stage = $(".stage"), message = $(".message");
const startButton = $(".start"), stopButton = $(".stop"), prompt = $(".prompt");
const sources = $(".source"), cameras = $(".cameras"), file = $(".file"), flip = $(".flip"), layout = $(".layout");

let run = null;

function setState(state) {
  root.dataset.state = state;
  startButton.disabled = run !== null;
  stopButton.disabled = run === null;
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

/* What has just happened and can be seen anyway: for screen readers alone. */
function speak(text) {
  $(".spoken").textContent = text;
}

const pressed = (button, on) => button.setAttribute("aria-pressed", on);
const quantile = (values, q) => {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : NaN;
};
const put = (name, text) => { $(`.t-${name}`).textContent = text; };

function fileStamp() {
  const two = (n) => String(n).padStart(2, "0"), now = new Date();
  return `${now.getFullYear()}${two(now.getMonth() + 1)}${two(now.getDate())}-` +
    `${two(now.getHours())}${two(now.getMinutes())}${two(now.getSeconds())}`;
}

function download(url, name) {
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  root.append(link); // Firefox wants it on the page
  link.click();
  link.remove();
}
