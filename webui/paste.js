/* Ctrl+V anywhere on the page puts a copied picture into the tab that is open: Gradio's own paste is a button, and
works only over HTTPS. A pasted file is handed over as if it had been dropped. */

document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files || [])].find((each) => each.type.startsWith("image/"));
  if (!file) return; // text goes where text goes
  const slots = [...document.querySelectorAll(".area-source .image-container")].filter((slot) => slot.offsetParent);
  const slot = slots.find((each) => !each.querySelector("img")) || slots.at(-1);
  const target = slot?.querySelector(".upload-container") || slot;
  if (!target) return;
  event.preventDefault();
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(file);
  target.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer }));
});
