/* The preview of picture 2 on picture 1, as `collage.py` and `images.blend` make it: drawn here, so that it moves with the
hand. Gradio runs this with `element`, `props` and `trigger`; what the controls say is in window.collage. */

const SIDE = 640; // of the preview at most: it is shown no larger
const STEP = 0.02;
const root = element.querySelector(".collage");
const canvas = root.querySelector(".flat");
const pen = canvas.getContext("2d");
const pictures = { first: null, second: null };

async function load(name, url) {
  if (pictures[name]?.src === url) return;
  pictures[name] = null;
  if (!url) return;
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    return; // a file that no browser shows is replaced by one that it does; its address comes then
  }
  if (window.collage?.[name] === url) pictures[name] = { src: url, image };
}

function draw() {
  const said = window.collage, { first, second } = pictures;
  const both = Boolean(first && second && said && said.mode !== "references");
  root.classList.toggle("filled", both);
  root.classList.toggle("placing", both && said.mode === "collage");
  root.querySelector(".how").hidden = !(both && said.mode === "collage");
  if (!both) return;
  const w = first.image.naturalWidth, h = first.image.naturalHeight, shrink = Math.min(1, SIDE / Math.max(w, h));
  canvas.width = Math.max(1, Math.round(w * shrink));
  canvas.height = Math.max(1, Math.round(h * shrink));
  pen.imageSmoothingQuality = "high";
  pen.globalAlpha = 1;
  pen.drawImage(first.image, 0, 0, canvas.width, canvas.height);
  const shape = second.image.naturalHeight / second.image.naturalWidth;
  let width, height, x, y;
  if (said.mode === "collage") {
    pen.globalAlpha = said.opacity;
    width = said.scale * canvas.width;
    height = width * shape;
    [x, y] = [said.across * canvas.width, said.down * canvas.height];
  } else { // blended: picture 2 fills picture 1, its middle in its middle
    pen.globalAlpha = said.ratio;
    width = Math.max(canvas.width, canvas.height / shape);
    height = width * shape;
    [x, y] = [canvas.width / 2, canvas.height / 2];
  }
  pen.drawImage(second.image, x - width / 2, y - height / 2, width, height);
  root.dataset.drawn = Number(root.dataset.drawn) + 1;
}

async function onChange() {
  const said = window.collage;
  await Promise.all([load("first", said.first), load("second", said.second)]);
  draw();
}

function clamp(value, low, high) {
  return Math.min(high, Math.max(low, value));
}

function place(across, down, scale) {
  Object.assign(window.collage, {
    across: clamp(across, 0, 1), down: clamp(down, 0, 1), scale: clamp(scale, 0.05, 2),
  });
  draw();
  const round = (value) => Math.round(value * 100) / 100;
  props.value = { across: round(window.collage.across), down: round(window.collage.down), scale: round(window.collage.scale) };
  trigger("input");
}

const placing = () => root.classList.contains("placing");
let held = null; // where picture 2's middle was, from the pointer, in shares of the picture

function pointAt(event) {
  // The canvas keeps its shape inside its box, with bars at two sides.
  const box = canvas.getBoundingClientRect();
  const fits = Math.min(box.width / canvas.width, box.height / canvas.height);
  const left = box.left + (box.width - canvas.width * fits) / 2, top = box.top + (box.height - canvas.height * fits) / 2;
  return [(event.clientX - left) / (canvas.width * fits), (event.clientY - top) / (canvas.height * fits)];
}

canvas.addEventListener("pointerdown", (event) => {
  if (!placing() || event.button !== 0) return;
  const [x, y] = pointAt(event);
  held = [window.collage.across - x, window.collage.down - y];
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  if (!held) return;
  const [x, y] = pointAt(event);
  place(x + held[0], y + held[1], window.collage.scale);
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { held = null; });
canvas.addEventListener("wheel", (event) => {
  if (!placing()) return;
  event.preventDefault();
  const { across, down, scale } = window.collage;
  place(across, down, scale * (event.deltaY < 0 ? 1.05 : 1 / 1.05));
}, { passive: false });
canvas.addEventListener("keydown", (event) => {
  if (!placing()) return;
  const { across, down, scale } = window.collage;
  const to = {
    ArrowLeft: [across - STEP, down, scale], ArrowRight: [across + STEP, down, scale],
    ArrowUp: [across, down - STEP, scale], ArrowDown: [across, down + STEP, scale],
    "+": [across, down, scale + STEP], "-": [across, down, scale - STEP],
  }[event.key];
  if (!to) return;
  event.preventDefault();
  place(...to);
});

window.addEventListener("collage", onChange);
