/* The line at the top of the page: which model, how far it has been loaded, and why this one. Asks GET /health until
the loading has ended, and then now and then, to say when the program has gone. Gradio runs this with `element`, the root of header.html. */

const top_ = element.querySelector(".top");
const $ = (selector) => top_.querySelector(selector);

function show(health) {
  const { choice, description } = health;
  top_.dataset.state = health.state;
  const percent = Math.round(health.fraction * 100);
  $(".bar").setAttribute("aria-valuenow", percent);
  $(".bar span").style.width = `${percent}%`;
  if (health.state === "ready") {
    const lora = description.lora ? ` + ${description.lora}` : "";
    $(".what").textContent = [`${description.model}${lora}`, description.device, description.dtype]
      .filter(Boolean).join(" · ").replaceAll("torch.", "");
  } else if (health.state === "failed") {
    $(".what").textContent = `The model could not be loaded: ${health.text}`;
  } else if (health.state === "stopping") {
    $(".what").textContent = health.text;
  } else {
    $(".what").textContent = `Loading ${choice.model || "the model"}: ${percent} % · ${health.text}`;
  }
  $("details").hidden = !choice.reason;
  $(".reason").textContent = choice.reason || "";
  $(".other").textContent = choice.how_to_get_other || "";
  $(".version").textContent = `Version ${health.version}`;
}

async function ask() {
  let again = 3000;
  try {
    const answer = await fetch(new URL("health", document.baseURI));
    const health = await answer.json();
    if (!answer.ok) throw new Error(health.error);
    show(health);
    again = { loading: 700, stopping: 3000 }[health.state] ?? 15000;
  } catch (error) {
    top_.dataset.state = "away";
    $(".what").textContent = "The program does not answer";
  }
  if (element.isConnected) setTimeout(ask, again);
}

$("details").hidden = true;
ask();
