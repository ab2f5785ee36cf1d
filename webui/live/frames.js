/* A frame is taken when the source delivers one, only while few are unacknowledged and the one before is encoded: what
keeps the picture fresh is that nothing ever waits in a line. A slow model is not sent every frame: five for each that it
edits keep it fresh, and spare a small machine the rest. */

const FRAMES_PER_EDIT = 5;
const LONGEST_PAUSE_MS = 200;
const STILL_MS = 200; // a source that shows nothing new for so long stands still

const isHidden = () => (document.hidden || root.offsetParent === null) && !popout;
const clockWindow = () => (document.hidden && popout ? popout : window); // a hidden page's own clocks hardly run

function everyFrame(own) {
  let request = 0;
  const next = () => {
    if (!own.alive) return;
    const plays = own.source && own.source.kind !== "picture";
    const signals = plays && video.requestVideoFrameCallback && !(document.hidden && popout);
    if (signals) request = video.requestVideoFrameCallback(onNew);
    const clock = clockWindow();
    own.tick = { clock, id: plays && !signals
      ? clock.setTimeout(onNew, 33, performance.now(), {}) // older Firefox, or a page behind its pop-out
      : clock.setTimeout(onStill, STILL_MS) };
  };
  const onNew = (now, metadata) => {
    own.tick.clock.clearTimeout(own.tick.id);
    if (!own.alive) return;
    own.sourceFrames += 1;
    own.taken.push(performance.now());
    own.resent = 0;
    // captureTime is the camera's own; without it, the moment at which the frame was ready to be shown.
    if (mayTake(own)) takeFrame(own, metadata.captureTime ?? metadata.presentationTime ?? performance.now());
    else if (own.ready && own.params && !own.frozen && !isHidden()) own.skipped += 1;
    next();
  };
  const onStill = () => {
    if (request) video.cancelVideoFrameCallback(request);
    if (!own.alive) return;
    // Sent again until settings that take some frames to show have had them.
    if (mayTake(own) && own.resent < 3 + own.params.steps + own.params.transition_frames) {
      own.resent += 1;
      takeFrame(own, performance.now());
    }
    next();
  };
  next();
}

const mayTake = (own) => own.ready && own.size && own.params && own.source && !own.encoding && !own.frozen && !isHidden() &&
  sourceSize(own.source)[0] > 0 && own.link?.hasRoom() &&
  performance.now() - own.sentAt >= Math.min((own.modelMs.total ?? 0) / FRAMES_PER_EDIT, LONGEST_PAUSE_MS);

async function takeFrame(own, capturedAt) {
  own.encoding = true;
  own.sentAt = performance.now();
  const link = own.link, params = own.params, level = LEVELS[own.level];
  try {
    const jpeg = await encodeFrame(own, level);
    if (!own.alive || own.link !== link || own.frozen) return;
    own.number = (own.number + 1) >>> 0;
    own.asked.set(own.number, { capturedAt, params, sentAt: performance.now(), level: own.level });
    link.frame(own.number, jpeg);
    root.dataset.sent = Number(root.dataset.sent) + 1;
  } finally {
    own.encoding = false;
  }
}

/* The source's picture at the output's shape: cropped or padded, flipped if asked, smaller on a slow link. */
async function encodeFrame(own, level) {
  const width = Math.round(own.size.width * level.scale), height = Math.round(own.size.height * level.scale);
  const target = own.scratch;
  if (target.width !== width || target.height !== height) Object.assign(target, { width, height });
  const context = target.getContext("2d", { alpha: false });
  const [w, h] = sourceSize(own.source);
  const scale = padded() ? Math.min(width / w, height / h) : Math.max(width / w, height / h);
  const [across, down] = flipSigns();
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.imageSmoothingQuality = "high";
  if (padded()) context.fillRect(0, 0, width, height);
  context.setTransform(across, 0, 0, down, across < 0 ? width : 0, down < 0 ? height : 0);
  context.drawImage(drawable(own.source), (width - w * scale) / 2, (height - h * scale) / 2, w * scale, h * scale);
  return target.convertToBlob
    ? target.convertToBlob({ type: "image/jpeg", quality: level.quality })
    : new Promise((resolve) => target.toBlob(resolve, "image/jpeg", level.quality));
}
