/* Prompt presets as a row of buttons: a press makes the text this component's value and fires its click event.
Gradio runs this with `element`, `props` and `trigger`. */

element.addEventListener("click", (event) => {
  const chip = event.target.closest(".chip");
  if (!chip) return;
  props.value = chip.dataset.prompt;
  trigger("click");
});
