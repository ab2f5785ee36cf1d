/* Results onto the canvas: the newest that has come, never one older than what is on the screen. */

async function onPicture(own, number, meta, jpeg) {
  const bitmap = await createImageBitmap(jpeg);
  if (!own.alive || number <= own.newest) return bitmap.close();
  own.newest = number;
  own.answered = Math.max(own.answered, number);
  own.lastResultAt = performance.now();
  if (own.said === "frame") unsay(own);
  const asked = own.asked.get(number);
  if (asked && "period_ms" in meta) own.beat = { takenAt: asked.takenAt, waitedMs: meta.waited_ms, periodMs: meta.period_ms };
  for (const old of own.asked.keys()) if (old <= number) own.asked.delete(old);
  own.meta = { ...meta, width: bitmap.width, height: bitmap.height };
  if (meta.skipped) own.repeated += 1;
  else own.modelMs = meta.stages_ms; // a repeated picture took the model no time: its milliseconds are no news
  if (own.frozen) return bitmap.close();
  own.onScreen = { params: asked?.params ?? own.params, meta: own.meta };
  paint(canvas, bitmap);
  if (popout) paint(popout.canvas, bitmap);
  bitmap.close();
  canvas.parentElement.classList.add("filled");
  canvas.setAttribute("aria-label", `Edited picture: ${meta.prompt}`);
  clockWindow().requestAnimationFrame(() => { // the frame is on the screen when the browser has painted
    if (!own.alive) return;
    const at = performance.now();
    own.shown.push({ at, latency: asked && at - asked.capturedAt });
  });
  root.dataset.prompt = meta.prompt;
  root.dataset.seed = meta.seed;
  root.dataset.frames = Number(root.dataset.frames) + 1;
  for (const button of [$(".snap"), $(".record")]) button.disabled = false;
}

function paint(target, bitmap) {
  if (target.width !== bitmap.width || target.height !== bitmap.height) {
    Object.assign(target, { width: bitmap.width, height: bitmap.height });
  }
  target.getContext("2d", { alpha: false }).drawImage(bitmap, 0, 0);
}
