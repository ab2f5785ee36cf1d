/* The controls as EditParams: the page's shared settings (steps, size, seed, ...), the prompt, and what stands under
"Advanced". Defaults and limits come from settings.py through `props`. A change is sent at once, typing after a pause. */

const TYPING_MS = 300;
const FAVOURITES = "live-favourites"; // in localStorage: a list of prompts
const controls = [...root.querySelectorAll("[data-param]")];

function controlValue(control) {
  if (control.type === "checkbox") return control.checked;
  if (control.type !== "number") return control.value;
  const [low, high] = props.limits[control.dataset.param];
  const value = control.valueAsNumber;
  return Number.isFinite(value) ? Math.min(Math.max(value, low), high) : props.defaults[control.dataset.param];
}

function setControl(control, value) {
  if (control.type === "checkbox") control.checked = value === true;
  else control.value = value;
}

/* Numbers that matter only with another control's choice are shown only with it. */
function showDependents() {
  for (const field of root.querySelectorAll("[data-when]")) {
    const [name, values] = field.dataset.when.split(":");
    field.hidden = !values.split(",").includes(controls.find((each) => each.dataset.param === name).value);
  }
}

function outputSize() {
  // As in_shape() in pipeline/geometry.py: the area asked for and the source's shape, within a pixel.
  const settings = window.editSettings || {};
  const side = settings.size || run.defaultSize;
  if (!keepsShape()) return { width: side, height: side };
  const [w, h] = run.source ? sourceSize(run.source) : [1, 1];
  const long = Math.max(w, h) || 1, short = Math.min(w, h) || 1;
  const first = Math.min(2048, Math.max(1, Math.round(side * Math.sqrt(long / short))));
  const second = Math.max(1, Math.round(first * short / long));
  return w >= h ? { width: first, height: second } : { width: second, height: first };
}

const keepsShape = () => ((window.editSettings || {}).shape ?? "keep") === "keep";
const padded = () => (window.editSettings || {}).shape === "pad";

function sendParams() {
  if (!run?.ready) return;
  const settings = window.editSettings || {};
  run.size = outputSize();
  shapeStage(run.size.width, run.size.height);
  const text = prompt.value.trim();
  if (!text) {
    say("The prompt is empty. Say what to change, or choose a preset." + (run.params
      ? ` Until then: “${run.params.prompt.slice(0, 100)}${run.params.prompt.length > 100 ? "…" : ""}”.` : ""));
    run.said = "empty";
    if (!run.params) return;
  } else if (run.said === "empty") unsay(run);
  run.params = {
    prompt: text || run.params.prompt, negative_prompt: settings.negative_prompt || "",
    steps: settings.steps, seed: settings.seed, cfg_scale: settings.cfg_scale,
    width: run.size.width, height: run.size.height, fit: padded() ? "pad" : "crop",
    ...Object.fromEntries(controls.map((control) => [control.dataset.param, controlValue(control)])),
  };
  run.resent = 0; // a still picture is to be edited again
  run.beat = newBeat(); // and the next frame is due: it brings the new settings
  run.link?.params(run.params);
}

/* Settings that a snapshot carried, to the controls: the page's shared ones through Gradio, the others here. */
function takeOver(params) {
  props.value = JSON.stringify(params);
  trigger("submit");
  for (const control of controls) {
    if (control.dataset.param in params) setControl(control, params[control.dataset.param]);
  }
  prompt.value = params.prompt;
  showDependents();
  markPrompt();
  sendParams();
}

// ------------------------------------------------------------------------------------------- prompts at one's fingers

function markPrompt() {
  const now = prompt.value.trim();
  for (const chip of root.querySelectorAll(".chip[data-prompt]")) {
    chip.setAttribute("aria-pressed", chip.dataset.prompt === now);
  }
  $(".keep").disabled = !now || favourites().includes(now);
}

function favourites() {
  try {
    const kept = JSON.parse(localStorage.getItem(FAVOURITES) || "[]");
    return Array.isArray(kept) ? kept.filter((text) => typeof text === "string") : [];
  } catch { // a browser that keeps nothing, or something that is not ours
    return [];
  }
}

function setFavourites(prompts) {
  try {
    localStorage.setItem(FAVOURITES, JSON.stringify(prompts));
  } catch {
    say("This browser keeps nothing for this page, so there are no favourites.", true);
  }
  showFavourites();
}

function showFavourites() {
  const row = $(".favourites"), prompts = favourites();
  row.hidden = !prompts.length;
  row.replaceChildren(...prompts.map((text) => {
    const both = document.createElement("span"), chip = document.createElement("button"), off = document.createElement("button");
    both.className = "favourite";
    Object.assign(chip, { type: "button", className: "chip", textContent: text, title: text });
    chip.dataset.prompt = text;
    Object.assign(off, { type: "button", className: "off", textContent: "×", title: `Remove favourite: ${text}` });
    off.setAttribute("aria-label", off.title);
    off.addEventListener("click", () => setFavourites(favourites().filter((each) => each !== text)));
    both.append(chip, off);
    return both;
  }));
  markPrompt();
}

let typing = 0;

function applyPrompt(text) {
  clearTimeout(typing);
  if (text !== undefined) prompt.value = text;
  markPrompt();
  sendParams();
}

prompt.addEventListener("input", () => { markPrompt(); clearTimeout(typing); typing = setTimeout(sendParams, TYPING_MS); });
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  if (run) applyPrompt();
  else start();
});
$(".keep").addEventListener("click", () => setFavourites([...favourites(), prompt.value.trim()]));
root.addEventListener("click", (event) => {
  const chip = event.target.closest(".chip[data-prompt]");
  if (chip) applyPrompt(chip.dataset.prompt);
});
for (const control of controls) {
  const name = control.dataset.param;
  if (control.type === "number") [control.min, control.max] = props.limits[name];
  setControl(control, props.defaults[name]);
  control.addEventListener("change", () => {
    if (control.type === "number") control.value = controlValue(control); // what is sent is what is shown
    showDependents();
    sendParams();
  });
}
prompt.value = prompt.dataset.first;
showDependents();
showFavourites();
