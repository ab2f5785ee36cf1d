/* The way to the server and back. A link is {kind, hasRoom(), frame(number, jpeg), params(params), quality(q), close()}.
The live socket's protocol is written down at the top of routes/live.py. Where no socket can be opened, single frames go
as POST /edit: slower, and without what the engine remembers from frame to frame; the page says so. Whatever breaks, the
page tries again by itself, ever more slowly, until Stop is pressed, or until the server says that it will not have it. */

const SILENCE_MS = 10000; // an acknowledgement takes a round trip; after this long the connection is dead
const SOCKET_TRIES = 3; // that have failed while the server answers, before single frames are posted
const SOCKET_AGAIN_MS = 30000; // while posting: is there a socket now?
const POSTS_AT_A_TIME = 2;
const AGAIN_MS = [500, 8000]; // between two tries: the first, and the longest; drawn at random, lest all pages come at once
const ENDING = "The program is ending. This view connects again by itself when the program runs again.";

const here = (path) => new URL(path, document.baseURI);

const pauseMs = (tries) => Math.min(AGAIN_MS[0] * 2 ** (tries - 1), AGAIN_MS[1]) * (0.5 + Math.random() / 2);

/* What to tell the person where it is of no use to try again; "" where it may help. */
function refusedFor(status, error) {
  if (status === 401) return "Your login has ended. Reload the page and log in again.";
  return status === 403 ? `The server refuses this page. ${error || "It does not say why: ask whoever runs it, or its proxy."}` : "";
}

function useLink(own, link) {
  own.link = link;
  own.ready = false;
  own.asked.clear();
  own.beat = newBeat();
  own.weight = newWeight();
  setLevel(own, 0);
  root.dataset.link = link ? link.kind : "none";
}

// ------------------------------------------------------------------------------------------------- the live socket

function connect(own) {
  const url = here("live");
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  url.search = url.hash = "";
  const socket = new WebSocket(url);
  own.socket = socket;
  socket.binaryType = "arraybuffer";
  const unacked = new Set();
  const open = () => socket.readyState === WebSocket.OPEN;
  const link = {
    kind: "socket",
    wordAt: null, // when settings were sent over the empty link
    waiting: () => unacked.size,
    hasRoom: () => open() && unacked.size < frameWindow(own),
    async frame(number, jpeg) {
      unacked.add(number);
      const bytes = new Uint8Array(4 + jpeg.size);
      bytes.set(new Uint8Array(await jpeg.arrayBuffer()), 4);
      new DataView(bytes.buffer).setUint32(0, number, true);
      if (!open()) return;
      if (unacked.size === 1) own.heardAt = performance.now(); // the silence is counted from a question on
      socket.send(bytes);
    },
    params(params) {
      link.wordAt = unacked.size ? null : performance.now();
      if (open()) socket.send(JSON.stringify({ type: "params", ...params }));
    },
    quality: (quality) => open() && socket.send(JSON.stringify({ type: "link", quality: Math.round(quality * 100) })),
    acknowledged(number) {
      unacked.delete(number);
      const frame = own.asked.get(number);
      if (frame) onAcknowledged(own, frame);
    },
    close() {
      if (open()) socket.send(JSON.stringify({ type: "stop" }));
      socket.close();
    },
  };
  socket.onopen = () => {
    if (own.socket !== socket) return;
    own.heardAt = performance.now();
    own.link?.close(); // single frames were posted until now
    useLink(own, link);
  };
  socket.onmessage = (event) => {
    if (!own.alive || own.socket !== socket) return;
    own.heardAt = performance.now();
    if (typeof event.data === "string") onText(own, link, JSON.parse(event.data));
    else {
      own.attempts = 0;
      onPicture(own, ...readPicture(event.data));
    }
  };
  socket.onclose = (event) => {
    if (own.socket !== socket) return;
    own.socket = null;
    if (own.link && own.link !== link) return; // only a try, while single frames are posted
    lose(own, event.reason || "The connection was lost.");
  };
}

function readPicture(buffer) {
  const view = new DataView(buffer);
  const length = view.getUint32(4, true);
  const meta = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  return [view.getUint32(0, true), meta, new Blob([new Uint8Array(buffer, 8 + length)], { type: "image/jpeg" })];
}

async function lose(own, why = "") {
  if (!own.alive) return;
  own.socket?.close();
  own.socket = null;
  own.link?.close();
  useLink(own, null);
  own.attempts += 1; // a picture begins the count again: a socket that opens only to close is no success
  setState("reconnecting");
  say(own.ending ? ENDING : `${why} Connecting again…`, true);
  const health = await fetch(here("health")).catch(() => null);
  const known = await health?.json().catch(() => null);
  if (!own.alive || own.link || own.socket) return;
  const refused = refusedFor(health?.status, known?.error);
  if (refused) return stop(refused, true);
  if (known?.state === "stopping") tellEnding(own);
  if (known?.state === "ready" && own.attempts >= SOCKET_TRIES) return usePosts(own, known);
  setTimeout(() => { if (own.alive && !own.socket && !own.link) connect(own); }, pauseMs(own.attempts));
}

function onText(own, link, data) {
  if (data.type === "ack") link.acknowledged(data.number);
  else if (data.type === "status") onStatus(own, data);
  else if (data.type === "stats") own.memory = data.memory;
  else if (data.type === "error") onError(own, data.number, data.message);
  else if (data.type === "params") {
    if (link.wordAt !== null) onEmptyLink(own, performance.now() - link.wordAt);
    link.wordAt = null;
    if (own.said === "params") unsay(own);
  }
}

function onError(own, number, text) {
  if (own.ending) return; // every frame fails then, and why has been said
  own.asked.delete(number);
  own.answered = Math.max(own.answered, number ?? 0);
  own.lastResultAt = performance.now();
  own.said = number === undefined ? "params" : "frame"; // what must come right for it to be taken back
  say(text, true);
}

/* The server has said that it ends. The sentence stays until one that runs tells its state. */
function tellEnding(own) {
  own.ending = true;
  own.ready = false;
  setState("reconnecting");
  say(ENDING, true);
}

function onStatus(own, status) {
  if (status.state === "stopping") return tellEnding(own);
  own.ending = false;
  if (status.state === "ready") {
    own.defaultSize = status.default_size;
    own.description = status.description;
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

// --------------------------------------------------------------------------------------------- single frames, posted

function usePosts(own, health) {
  const ended = new AbortController();
  let posted = 0, pausedUntil = 0;
  const link = {
    kind: "posts",
    waiting: () => posted,
    hasRoom: () => posted < POSTS_AT_A_TIME && performance.now() > pausedUntil,
    async frame(number, jpeg) {
      posted += 1;
      try {
        const pause = await post(own, number, jpeg, ended.signal);
        if (pause) pausedUntil = performance.now() + pause;
      } catch {
        if (own.link === link) lose(own, "The server does not answer.");
      } finally {
        posted -= 1;
      }
    },
    params() { pausedUntil = 0; }, // each frame carries them; what was refused may be right now
    quality() {}, // concerns what comes back; its weight is the server's affair here
    close() {
      clearInterval(tries);
      removeEventListener("online", again);
      ended.abort();
    },
  };
  const again = () => { if (own.alive && own.link === link && !own.socket) connect(own); };
  const tries = setInterval(again, SOCKET_AGAIN_MS);
  addEventListener("online", again);
  own.attempts = 0;
  useLink(own, link);
  onStatus(own, health);
}

/* One frame there and back. Returns for how many milliseconds nothing should be posted; raises when there is no answer. */
async function post(own, number, jpeg, signal) {
  const asked = own.asked.get(number);
  const image = await new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.readAsDataURL(jpeg);
  });
  const answer = await fetch(here("edit"), {
    method: "POST", signal,
    headers: { "Content-Type": "application/json", Accept: "image/jpeg" },
    body: JSON.stringify({ image, ...asked.params }),
  });
  const data = answer.ok ? await answer.blob() : await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  if (signal.aborted) return 0;
  const refused = refusedFor(answer.status, data.error);
  if (refused) return stop(refused, true);
  if (answer.status === 503 && data.kind === "stopping") {
    tellEnding(own);
    lose(own);
    return 0;
  }
  if (answer.status === 503) {
    setState("busy");
    say(`${data.error} Waiting…`);
    own.answered = number;
    return 1000 * (Number(answer.headers.get("retry-after")) || 1);
  }
  if (root.dataset.state === "busy") {
    setState("running");
    say("");
  }
  if (!answer.ok) {
    onError(own, number, data.error);
    return pauseMs(++own.attempts);
  }
  own.attempts = 0;
  const stages = [...(answer.headers.get("server-timing") || "").matchAll(/(\w+);dur=([\d.]+)/g)];
  const { prompt, steps } = asked.params;
  const serverMs = Number(answer.headers.get("x-age-ms"));
  onEmptyLink(own, 0);
  onAcknowledged(own, { ...asked, sentAt: asked.sentAt + serverMs }); // what is left of the time is the link's
  await onPicture(own, number, {
    prompt, steps, seed: Number(answer.headers.get("x-seed")), dropped: 0, skipped: false, computed: 1, notes: [],
    stages_ms: Object.fromEntries(stages.map(([, name, ms]) => [name, Number(ms)])),
  }, data);
  return 0;
}
