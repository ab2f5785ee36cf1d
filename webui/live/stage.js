/* What the pictures look like on the screen: side by side, edited alone or wiped; mirrored, full, popped out, frozen. */

let popout = null; // the window, with its canvas as `canvas`

function shapeStage(width, height) {
  stage.style.setProperty("--ratio", width / height);
  for (const input of [video, photo]) input.classList.toggle("contain", padded());
}

const flipSigns = () => [flip.value === "sideways" || flip.value === "both" ? -1 : 1,
  flip.value === "upside" || flip.value === "both" ? -1 : 1];

function showFlip() {
  const [across, down] = flipSigns();
  for (const input of [video, photo]) {
    input.style.setProperty("--across", across);
    input.style.setProperty("--down", down);
  }
}

function setMirror(on) {
  root.classList.toggle("mirrored", on);
  pressed($(".mirror"), on);
  if (popout) popout.canvas.style.transform = on ? "scaleX(-1)" : "";
}

function setFrozen(on) {
  if (!run || run.frozen === on || (on && !run.onScreen)) return;
  run.frozen = on;
  run.resent = 0; // what came meanwhile was not shown
  run.lastResultAt = performance.now();
  root.classList.toggle("frozen", on);
  $(".frozen-badge").hidden = !on;
  pressed($(".freeze"), on);
  speak(on ? "Frozen" : "Goes on");
}

function setLayout() {
  stage.dataset.layout = layout.value;
}

function setWipe() {
  stage.style.setProperty("--wipe", $(".wipe").value / 100);
}

async function toggleFull() {
  try {
    if (document.fullscreenElement === stage) await document.exitFullscreen();
    else await stage.requestFullscreen();
  } catch (error) {
    say(`The browser does not show the view in full: ${error.message}`, true);
  }
}

async function togglePopout() {
  if (popout) return popout.close();
  const width = Math.max(canvas.width, 320), height = Math.round(width * canvas.height / canvas.width);
  let opened = null;
  try {
    opened = window.documentPictureInPicture
      ? await window.documentPictureInPicture.requestWindow({ width, height })
      : window.open("", "", `popup,width=${width},height=${height}`);
  } catch (error) {
    return say(`The browser opened no window: ${error.message}`, true);
  }
  if (!opened) return say("The browser opened no window. Allow pop-ups for this page, then try again.", true);
  opened.document.title = "Edited picture";
  opened.document.documentElement.lang = "en";
  Object.assign(opened.document.body.style, { margin: "0", background: "#000", height: "100vh" });
  opened.canvas = Object.assign(opened.document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  opened.canvas.setAttribute("role", "img");
  opened.canvas.setAttribute("aria-label", "Edited picture");
  Object.assign(opened.canvas.style, { display: "block", width: "100%", height: "100%", objectFit: "contain" });
  opened.canvas.getContext("2d", { alpha: false }).drawImage(canvas, 0, 0);
  opened.document.body.append(opened.canvas);
  opened.addEventListener("pagehide", () => {
    popout = null;
    pressed($(".popout"), false);
  });
  popout = opened;
  setMirror(root.classList.contains("mirrored"));
  pressed($(".popout"), true);
}

$(".freeze").addEventListener("click", () => setFrozen(!run?.frozen));
$(".mirror").addEventListener("click", () => setMirror(!root.classList.contains("mirrored")));
$(".full").addEventListener("click", toggleFull);
$(".popout").addEventListener("click", togglePopout);
$(".wipe").addEventListener("input", setWipe);
layout.addEventListener("change", setLayout);
flip.addEventListener("change", () => { showFlip(); if (run) run.resent = 0; });
setLayout(); // a browser may restore what was chosen before a reload
setWipe();
showFlip();
