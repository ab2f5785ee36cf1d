/* Ctrl+V or a drop anywhere on the page puts a picture into the tab that is open: Gradio's own paste is a button, and
works only over HTTPS. The file is handed over as if it had been dropped on the field. A file that is dropped outside of all
fields would otherwise make the browser leave the page. */

function handOver(file) {
  const slots = [...document.querySelectorAll(".area-source .image-container")].filter((slot) => slot.offsetParent);
  const slot = slots.find((each) => !each.querySelector("img")) || slots.at(-1);
  const target = slot?.querySelector(".upload-container") || slot;
  if (!target) return false;
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(file);
  target.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer }));
  return true;
}

const pictureIn = (files) => [...(files || [])].find((each) => each.type.startsWith("image/"));

document.addEventListener("paste", (event) => {
  const file = pictureIn(event.clipboardData?.files);
  if (file && handOver(file)) event.preventDefault(); // text goes where text goes
});
document.addEventListener("dragover", (event) => {
  if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  if (event.defaultPrevented || !event.isTrusted) return; // a field has taken it, or it is ours
  event.preventDefault();
  const file = pictureIn(event.dataTransfer?.files);
  if (file) handOver(file);
});
