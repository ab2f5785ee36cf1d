/* Where frames come from: a camera, a screen, a video file, one picture. All but the picture play in the <video>; files
are opened by the browser, and only single frames of them are ever sent. A source is {kind, stream | url | picture}. */

const NO_CAMERA = "Browsers give a page the camera and the screen only over HTTPS or on localhost, and this page is at " +
  `${location.origin}.\nAny of these helps:\n` +
  "• start the program with --ssl-keyfile KEY.pem --ssl-certfile CERT.pem and open https://…\n" +
  `• from your machine: ssh -L ${location.port || 7865}:localhost:${location.port || 7865} SERVER, then open ` +
  `http://localhost:${location.port || 7865}\n` +
  "• start the program with --share";

const SOURCE_ERRORS = {
  camera: {
    NotAllowedError: "The browser was not allowed to use the camera. Allow it beside the address (the camera or lock " +
      "sign), then press Start again.",
    NotFoundError: "No camera was found. Connect one and press Start again, or choose another source.",
    NotReadableError: "The camera is in use by another program, or it failed. Close the other program and press Start.",
    OverconstrainedError: "The chosen camera is gone. Choose another and press Start again.",
  },
  screen: {
    NotAllowedError: "No screen was shared. Press Start again and choose one.",
    NotFoundError: "This browser has no screen or window to share.",
  },
};

let chosen = { video: null, picture: null }; // the files, from one start to the next

const drawable = (source) => (source.kind === "picture" ? photo : video);
const sourceSize = (source) => (source.kind === "picture" ? [photo.width, photo.height] : [video.videoWidth, video.videoHeight]);
const shown = (text) => Object.assign(new Error(text), { shown: true });

async function openSource() {
  const kind = sources.value;
  if (kind === "camera") return openCamera();
  if (kind === "screen") return openScreen();
  if (!chosen[kind]) throw shown(`Choose a ${kind} first: press “Choose a file”, or drop one on the view.`);
  if (kind === "video") return { kind, url: URL.createObjectURL(chosen.video) };
  try {
    return { kind, picture: await createImageBitmap(chosen.picture) };
  } catch {
    throw shown(`“${chosen.picture.name || "The file"}” is not a picture that this browser can open.`);
  }
}

function watched(source) {
  source.stream.getVideoTracks()[0].addEventListener("ended", () => {
    if (run?.source !== source) return;
    if (source.kind === "screen") stop("The sharing of the screen has ended.");
    else stop("The camera stopped: it was unplugged, or another program took it.", true);
  });
  return source;
}

async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) throw shown(NO_CAMERA);
  const large = ((window.editSettings || {}).size || run.defaultSize) > 400;
  const stream = await navigator.mediaDevices.getUserMedia({
    audio: false,
    video: {
      width: { ideal: large ? 1280 : 640 }, height: { ideal: large ? 720 : 480 }, frameRate: { ideal: 30 },
      ...(cameras.value ? { deviceId: { exact: cameras.value } } : { facingMode: "user" }),
    },
  });
  return watched({ kind: "camera", stream });
}

async function openScreen() {
  if (!navigator.mediaDevices?.getDisplayMedia) {
    throw shown(isSecureContext ? "This browser cannot share a screen. Choose another source." : NO_CAMERA);
  }
  return watched({ kind: "screen", stream: await navigator.mediaDevices.getDisplayMedia({ audio: false, video: { frameRate: 30 } }) });
}

function closeSource(source) {
  for (const track of source?.stream?.getTracks() || []) track.stop();
  if (source?.url) URL.revokeObjectURL(source.url);
  source?.picture?.close();
}

async function showSource(source) {
  const still = source.kind === "picture";
  photo.hidden = !still;
  video.hidden = still;
  if (still) {
    Object.assign(photo, { width: source.picture.width, height: source.picture.height });
    photo.getContext("2d").drawImage(source.picture, 0, 0);
  } else {
    if (source.stream) video.srcObject = source.stream;
    else Object.assign(video, { srcObject: null, src: source.url });
    try {
      await video.play();
    } catch (error) {
      if (source.url && error.name === "NotSupportedError") {
        throw shown(`“${chosen.video.name}” is not a video that this browser can play.`);
      }
      throw error;
    }
  }
  const { width, height } = outputSize(); // the model may still be loading: the shape is known all the same
  shapeStage(width, height);
  video.parentElement.classList.add("filled");
}

function hideSource() {
  video.srcObject = null;
  video.removeAttribute("src");
  video.load(); // lets the file go
  video.parentElement.classList.remove("filled");
}

function sourceFailed(error) {
  const known = SOURCE_ERRORS[sources.value]?.[error.name];
  stop(error.shown ? error.message : known || `The source failed: ${error.message}`, true);
}

async function switchSource() {
  showPickers();
  const own = run;
  if (!own?.source) return;
  const before = own.source;
  own.source = null; // its end is no accident
  closeSource(before);
  hideSource();
  try {
    const source = await openSource();
    if (!own.alive) return closeSource(source);
    own.source = source;
    await showSource(source);
    if (own.alive) sendParams(); // another source, another shape
  } catch (error) {
    if (own.alive) sourceFailed(error);
  }
}

function useFile(kind, data) {
  chosen[kind] = data;
  sources.value = kind;
  switchSource();
}

function showPickers() {
  const kind = sources.value, ofFile = kind === "video" || kind === "picture";
  $(".of-camera").hidden = kind !== "camera";
  $(".of-file").hidden = !ofFile;
  $(".input figcaption").textContent = { camera: "Camera", screen: "Screen", video: "Video", picture: "Picture" }[kind];
  if (!ofFile) return;
  file.accept = kind === "video" ? "video/*" : "image/*";
  const name = chosen[kind]?.name;
  $(".choose").textContent = name ? `${name.slice(0, 24)}${name.length > 24 ? "…" : ""}` : "Choose a file";
  $(".choose").title = name ? `Choose another ${kind}` : `Choose a ${kind} of yours. It is not uploaded: single frames are sent.`;
}

async function listCameras() {
  if (!navigator.mediaDevices?.enumerateDevices) return;
  const found = (await navigator.mediaDevices.enumerateDevices()).filter((d) => d.kind === "videoinput" && d.deviceId);
  if (!found.length) return; // before permission browsers name none
  const current = run?.source?.stream?.getVideoTracks()[0]?.getSettings().deviceId || cameras.value;
  cameras.replaceChildren(...found.map((device, i) => new Option(device.label || `Camera ${i + 1}`, device.deviceId)));
  if (found.some((device) => device.deviceId === current)) cameras.value = current;
}

sources.addEventListener("change", () => {
  const kind = sources.value;
  if (run && (kind === "video" || kind === "picture") && !chosen[kind]) {
    showPickers(); // what runs goes on until there is a file
    return file.click();
  }
  switchSource();
});
cameras.addEventListener("change", switchSource);
$(".choose").addEventListener("click", () => file.click());
file.addEventListener("change", () => {
  if (file.files[0]) useFile(sources.value, file.files[0]);
  file.value = ""; // the same file may be chosen again
});
file.addEventListener("cancel", () => { // what runs goes on
  if (run?.source) sources.value = run.source.kind;
  showPickers();
});
navigator.mediaDevices?.addEventListener?.("devicechange", listCameras);
