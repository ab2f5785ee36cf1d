/* What remains of a session, in this page's memory alone: snapshots with their settings inside, recordings to download;
and files that are dropped on the view. */

const MOST_KEPT = 24;
let recorder = null;

async function snapshot() {
  const { params, meta } = run?.onScreen ?? lastOnScreen ?? {};
  if (!meta) return;
  const { prompt, steps, seed, width, height } = meta;
  const texts = { ...props.defaults, ...params, prompt, steps, seed, width, height, model: (run?.description ?? lastModel).model };
  const picture = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  keep(await pngWithTexts(picture, texts), `${nameOf(prompt)}-${seed}.png`, prompt);
  speak("Snapshot kept");
}

let lastOnScreen = null, lastModel = null; // after Stop the picture stays, and a snapshot of it may still be taken

const nameOf = (text) => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 48).replace(/^-+|-+$/g, "") || "edited";

function keep(png, name, text) {
  const item = document.createElement("li"), picture = document.createElement("img");
  Object.assign(picture, { src: URL.createObjectURL(png), alt: `Snapshot: ${text}`, title: text });
  const button = (label, says, act) => {
    const made = Object.assign(document.createElement("button"), { type: "button", className: "tool", textContent: label, title: says });
    made.setAttribute("aria-label", says);
    made.addEventListener("click", act);
    return made;
  };
  const row = document.createElement("div");
  row.append(
    button("Use as input", `Use as input: ${text}`, () => useFile("picture", new File([png], name, { type: "image/png" }))),
    button("Download", `Download: ${text}`, () => download(picture.src, name)),
    button("Remove", `Remove: ${text}`, () => drop(item)),
  );
  item.append(picture, row);
  const list = $(".gallery");
  list.prepend(item);
  while (list.children.length > MOST_KEPT) drop(list.lastElementChild);
  $(".kept").hidden = false;
}

function drop(item) {
  URL.revokeObjectURL(item.querySelector("img").src);
  item.remove();
  $(".kept").hidden = !$(".gallery").children.length;
}

// ----------------------------------------------------------------------------------------------------------- recording

const RECORDED_AS = ["video/mp4;codecs=avc1", "video/webm;codecs=vp9", "video/webm;codecs=vp8", "video/webm"];

function toggleRecord() {
  if (recorder) return recorder.stop();
  if (!run?.onScreen) return;
  const type = window.MediaRecorder && canvas.captureStream && RECORDED_AS.find((each) => MediaRecorder.isTypeSupported(each));
  if (!type) return say("This browser cannot record video.", true);
  const parts = [], stream = canvas.captureStream(), startedAt = performance.now();
  const made = recorder = new MediaRecorder(stream, { mimeType: type, videoBitsPerSecond: 8e6 });
  const tell = () => {
    const seconds = Math.floor((performance.now() - startedAt) / 1000);
    $(".record").textContent = `Stop ${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  };
  const timer = setInterval(tell, 1000);
  made.ondataavailable = (event) => { if (event.data.size) parts.push(event.data); };
  made.onerror = (event) => say(`The recording broke off: ${event.error?.message ?? "the browser does not say why"}`, true);
  made.onstop = () => {
    recorder = null;
    clearInterval(timer);
    for (const track of stream.getTracks()) track.stop();
    pressed($(".record"), false);
    $(".record").textContent = "Record";
    $(".recording-badge").hidden = true;
    if (!parts.length) return;
    const url = URL.createObjectURL(new Blob(parts, { type: type.split(";")[0] }));
    download(url, `live-${fileStamp()}.${type.startsWith("video/mp4") ? "mp4" : "webm"}`);
    setTimeout(() => URL.revokeObjectURL(url), 60000); // when the browser has surely taken it
    speak("Recording saved");
  };
  made.start(1000);
  pressed($(".record"), true);
  $(".recording-badge").hidden = false;
  tell();
}

// -------------------------------------------------------------------------------------------------------- dropped files

async function takeFile(dropped) {
  if (dropped.type.startsWith("video/")) return useFile("video", dropped);
  const params = paramsOfTexts(await textsOfPng(dropped));
  if (!params) return useFile("picture", dropped);
  takeOver(params);
  keep(dropped, dropped.name, params.prompt);
  say("The prompt and the settings of that snapshot are set. To edit the picture itself, press “Use as input” below.");
  if (run) run.said = "frame"; // gone with the next picture
}

$(".snap").addEventListener("click", snapshot);
$(".record").addEventListener("click", toggleRecord);
root.addEventListener("dragover", (event) => {
  if (![...event.dataTransfer.items].some((item) => item.kind === "file")) return;
  event.preventDefault();
  root.classList.add("dropping");
});
root.addEventListener("dragleave", (event) => { if (!root.contains(event.relatedTarget)) root.classList.remove("dropping"); });
root.addEventListener("drop", (event) => {
  root.classList.remove("dropping");
  const dropped = event.dataTransfer.files[0];
  if (!dropped) return;
  event.preventDefault();
  takeFile(dropped);
});
