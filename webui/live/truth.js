/* The lines that tell the truth, each second: what was measured over the last seconds, never what should be. */

const WINDOW_MS = 3000; // what "now" means for rates and latencies
const STAGES = [["prepare", "prepare"], ["encode_prompt", "prompt"], ["encode_references", "picture"],
  ["denoise", "denoise"], ["decode", "decode"]];

function tellTruth() {
  if (!run) return;
  const now = performance.now();
  const modelMs = run.modelMs.total ?? 0;
  const windowMs = Math.min(Math.max(WINDOW_MS, 4 * modelMs), now - run.startedAt); // a slow model's rate is not 0
  run.shown = run.shown.filter((frame) => now - frame.at < windowMs);
  run.taken = run.taken.filter((at) => now - at < windowMs);
  const rate = (list) => list.length / (windowMs / 1000);
  const shown = `${rate(run.shown).toFixed(1)} frames/s`;
  put("rate", shown);
  put("fps", `${shown} of ${rate(run.taken).toFixed(0)} from the ${run.source?.kind ?? sources.value}`);
  const latencies = run.shown.map((frame) => frame.latency).filter((ms) => ms !== undefined);
  const median = latencies.length ? `${quantile(latencies, 0.5).toFixed(0)} ms` : "–";
  put("delay", latencies.length ? `${median} to the screen` : "");
  put("latency", latencies.length ? `${median} (95 %: ${quantile(latencies, 0.95).toFixed(0)} ms)` : median);
  if (run.meta) tellOfModel(run.meta, modelMs);
  tellOfLink();
  const waited = (now - run.lastResultAt) / 1000;
  if (root.dataset.state === "running" && run.answered < run.number && waited > Math.max(3, 2 * modelMs / 1000)) {
    say(`The model is working: ${waited.toFixed(0)} s for this picture.`);
    run.said = "frame";
  } else if (root.dataset.state === "running" && isHidden()) {
    say("Paused while the view is hidden.");
    run.said = "frame";
  }
  if (run.link?.kind === "socket" && run.link.waiting() && now - run.heardAt > SILENCE_MS) {
    lose(run, "The server has not answered for 10 s.", true);
  }
}

function tellOfModel(meta, modelMs) {
  const parts = STAGES.filter(([key]) => key in run.modelMs).map(([key, name]) => `${name} ${run.modelMs[key].toFixed(0)}`);
  put("model", `${modelMs.toFixed(0)} ms: ${parts.join(" · ")}`);
  put("dropped", `${meta.dropped + run.skipped} of ${run.sourceFrames} frames, for newer ones` +
    (run.repeated ? `; ${run.repeated} pictures shown again, as little moved` : ""));
  put("computed", `${Math.round(100 * meta.computed)} % of the picture`);
  const { model, lora, device, quantized, attention_quantized: attention, dtype } = run.description;
  const name = `${model}${lora ? ` + ${lora}` : ""} on ${device}`;
  const numbers = [quantized, attention && `${attention} attention`, dtype];
  put("running", [name, `${meta.width}×${meta.height}`, `${meta.steps} step${meta.steps > 1 ? "s" : ""}`, ...numbers]
    .filter(Boolean).join(", "));
  const memory = run.memory;
  put("memory", memory?.allocated
    ? `${(memory.allocated / 1e9).toFixed(1)} GB, at most ${(memory.peak / 1e9).toFixed(1)}` : run.memory ? "no GPU" : "–");
  $(".noted").hidden = !meta.notes.length;
  put("notes", meta.notes.join("; "));
}

function tellOfLink() {
  const { link, weight, level } = run;
  if (!link) return put("link", "none");
  const kind = link.kind === "socket" ? "socket" : "single frames over HTTP, as no socket could be opened";
  const empty = link.kind === "socket" ? [`${weight.emptyMs.toFixed(0)} ms there and back`] : [];
  const bytes = weight.acks.length ? [`+${weight.lastMs.toFixed(0)} ms for a frame`] : [];
  put("link", [kind, ...empty, ...bytes, `${LEVELS[level].name}${level ? ", as the link is slow" : ""}`].join(", "));
}
