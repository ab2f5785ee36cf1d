/* When a frame is due. Of what is sent while a slow model edits, it takes the newest: all others were for nothing, and one
that came early has grown old. So just one is sent for each edit, the one that will be there when the engine is free, or
up to a third of the camera's interval later. Idle for so long, the engine gets a picture that is newer by a whole interval.

All times are the page's own, and those at which a frame is taken from the source. What lies between that and the engine's
mailbox (encoding, the way, decoding) is about the same for each frame, and so need not be known. With a result comes how
long its frame then waited, and how often the engine takes one: a guess that was wrong is put right by the next result, and
costs a frame of the camera at most. A fast model's period is shorter than the camera's interval: every frame is due. */

const IDLE_SHARE = 1 / 3; // of the camera's interval

const newBeat = () => ({ takenAt: 0, waitedMs: 0, periodMs: 0 }); // of the last result's frame; no period: all are due

/* When the engine is free for one more frame. `sentSince` is when the frames after the last result's were taken. */
function freeAt({ takenAt, waitedMs, periodMs }, sentSince, now) {
  let free = takenAt + waitedMs + periodMs, waits = false;
  for (const at of sentSince) {
    if (waits && free <= at) [free, waits] = [free + periodMs, false]; // took the one before
    if (at > free) free = at + periodMs; // was idle
    else waits = true;
  }
  return waits && free <= now ? free + periodMs : free;
}

/* 0 when a frame is to be taken now; else until when a newer one may be waited for. */
function waitsUntil(beat, sentSince, intervalMs, now) {
  const free = freeAt(beat, sentSince, now);
  return beat.periodMs && now < free - (1 - IDLE_SHARE) * intervalMs ? free + IDLE_SHARE * intervalMs : 0;
}
