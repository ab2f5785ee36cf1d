/* Gradio's video players have no name for those who cannot see them: they get their field's. */

function nameVideos() {
  for (const video of document.querySelectorAll(".block video:not([aria-label])")) {
    const label = video.closest(".block").querySelector("[data-testid='block-label'], label")?.innerText.trim();
    video.setAttribute("aria-label", label || "Video");
  }
}

new MutationObserver(nameVideos).observe(document.body, { childList: true, subtree: true });
