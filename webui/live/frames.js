/* A frame is taken when the source delivers one and it is due (beat.js), only while few are unacknowledged and the one
before is encoded: what keeps the picture fresh is that nothing ever waits in a line. */

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
      : clock.setTimeout(onStill, own.held ? own.held.until - performance.now() : STILL_MS) };
  };
  const onNew = (now, metadata) => {
    own.tick.clock.clearTimeout(own.tick.id);
    if (!own.alive) return;
    const at = performance.now(), passed = at - (own.taken.at(-1) ?? at - own.intervalMs);
    own.intervalMs += (Math.min(passed, STILL_MS) - own.intervalMs) / 8;
    own.sourceFrames += 1;
    own.taken.push(at);
    own.resent = 0;
    own.held = null;
    // captureTime is the camera's own; without it, the moment at which the frame was ready to be shown.
    const capturedAt = metadata.captureTime ?? metadata.presentationTime ?? at;
    const sentSince = [...own.asked.values()].map((frame) => frame.takenAt).filter((each) => each > own.beat.takenAt);
    const until = waitsUntil(own.beat, sentSince, own.intervalMs, at);
    if (mayTake(own) && !until) takeFrame(own, capturedAt);
    else if (own.ready && own.params && !own.frozen && !isHidden()) {
      own.skipped += 1;
      own.held = until ? { capturedAt, until } : null;
    }
    next();
  };
  const onStill = () => {
    if (request) video.cancelVideoFrameCallback(request);
    if (!own.alive) return;
    const { held } = own;
    own.held = null;
    if (mayTake(own) && held) { // no newer one came
      own.skipped -= 1;
      takeFrame(own, held.capturedAt);
    } else if (mayTake(own) && own.resent < 3 + own.params.steps + own.params.transition_frames) {
      own.resent += 1; // sent again until settings that take some frames to show have had them
      takeFrame(own, performance.now());
    }
    next();
  };
  next();
}

const mayTake = (own) => own.ready && own.size && own.params && own.source && !own.encoding && !own.frozen && !isHidden() &&
  sourceSize(own.source)[0] > 0 && own.link?.hasRoom();

async function takeFrame(own, capturedAt) {
  own.encoding = true;
  const takenAt = performance.now();
  const link = own.link, params = own.params, level = LEVELS[own.level];
  try {
    const jpeg = await encodeFrame(own, level);
    if (!own.alive || own.link !== link || own.frozen) return;
    own.number = (own.number + 1) >>> 0;
    own.asked.set(own.number, { capturedAt, takenAt, params, sentAt: performance.now(), level: own.level });
    link.frame(own.number, jpeg);
    root.dataset.sent = Number(root.dataset.sent) + 1;
  } finally {
    own.encoding = false;
  }
}

/* The source's picture at the output's shape: whole, or cropped or padded if asked, flipped if asked, smaller on a slow link. */
async function encodeFrame(own, level) {
  const [width, height] = [own.size.width, own.size.height].map((side) => Math.max(1, Math.round(side * level.scale)));
  const target = own.scratch;
  if (target.width !== width || target.height !== height) Object.assign(target, { width, height });
  const context = target.getContext("2d", { alpha: false });
  const [w, h] = sourceSize(own.source);
  const scale = padded() ? Math.min(width / w, height / h) : Math.max(width / w, height / h);
  const [drawnWidth, drawnHeight] = keepsShape() ? [width, height] : [w * scale, h * scale]; // no fraction of a pixel is cut
  const [across, down] = flipSigns();
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.imageSmoothingQuality = "high";
  if (padded()) context.fillRect(0, 0, width, height);
  context.setTransform(across, 0, 0, down, across < 0 ? width : 0, down < 0 ? height : 0);
  context.drawImage(
    drawable(own.source), (width - drawnWidth) / 2, (height - drawnHeight) / 2, drawnWidth, drawnHeight,
  );
  return target.convertToBlob
    ? target.convertToBlob({ type: "image/jpeg", quality: level.quality })
    : new Promise((resolve) => target.toBlob(resolve, "image/jpeg", level.quality));
}
