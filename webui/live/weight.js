/* How heavy a frame may be. The link carries one frame after the other, so what a frame's bytes cost is the time to its
acknowledgement from the one before, or from its send where the link was empty, less what a word takes there and back.
Where that is more than a quarter of what the camera takes for a frame, frames become lighter, both ways; where the next
heavier ones would be fast too, heavier again. A link that is far but wide costs a frame nothing, and gets it whole. */

const LEVELS = [
  { quality: 0.85, scale: 1, name: "full quality" },
  { quality: 0.7, scale: 1, name: "JPEG 70 %", heavier: 1.6 }, // the level above has at most this many times the bytes
  { quality: 0.55, scale: 1, name: "JPEG 55 %", heavier: 1.4 },
  { quality: 0.55, scale: 0.75, name: "JPEG 55 %, ¾ size", heavier: 1.7 },
  { quality: 0.5, scale: 0.5, name: "JPEG 50 %, ½ size", heavier: 2.4 },
];
const HEAVY_MS = 8; // of a frame on the link, from which it is lightened: a quarter of what a camera takes for the next
const LIGHT_MS = 7; // that the next heavier frame may be expected to take
const ACKS = 6; // of which each judgement is made
const TRY_AGAIN_MS = [4000, 8000, 16000, 32000, 64000]; // longer each time that heavier frames proved too heavy

const newWeight = () => ({ emptyMs: 0, ackedAt: 0, acks: [], lastMs: 0, since: performance.now(), risenAt: 0, failures: 0 });

/* The empty link: what a word takes there and back while no frame is under way. */
function onEmptyLink(own, ms) {
  own.weight.emptyMs = Math.min(own.weight.emptyMs || ms, ms);
}

function onAcknowledged(own, frame) {
  const weight = own.weight, now = performance.now();
  const ms = Math.max(now - Math.max(frame.sentAt + weight.emptyMs, weight.ackedAt), 0);
  weight.ackedAt = now;
  if (frame.level !== own.level) return;
  weight.acks = [...weight.acks, ms].slice(-ACKS);
  weight.lastMs = quantile(weight.acks, 0.2); // a slow link delays all of them, a busy machine some
  if (weight.acks.length < ACKS) return;
  const { heavier } = LEVELS[own.level];
  if (weight.lastMs > HEAVY_MS && own.level < LEVELS.length - 1) {
    if (now - weight.risenAt < TRY_AGAIN_MS[0]) weight.failures += 1;
    setLevel(own, lightEnough(own.level, weight.lastMs));
  } else if (heavier && weight.lastMs * heavier < LIGHT_MS && now - weight.since > TRY_AGAIN_MS[Math.min(weight.failures, TRY_AGAIN_MS.length - 1)]) {
    weight.risenAt = now;
    setLevel(own, own.level - 1);
  }
}

/* The first lighter level that may do: six frames for each would be long on a very slow link. */
function lightEnough(level, ms) {
  do ms /= LEVELS[++level].heavier; while (ms > HEAVY_MS && level < LEVELS.length - 1);
  return level;
}

function setLevel(own, level) {
  own.level = level;
  Object.assign(own.weight, { acks: [], since: performance.now() });
  root.dataset.level = level;
  own.link?.quality(LEVELS[level].quality);
}

/* Frames that may be under way: a near server needs few; a far one more, or the rate would be one per round trip; a slow
link exactly those that fill it. */
function frameWindow(own) {
  const underWay = Math.ceil(own.weight.emptyMs / 33);
  return Math.min(own.level ? 1 + underWay : 2 + Math.max(underWay, 1), 8);
}
