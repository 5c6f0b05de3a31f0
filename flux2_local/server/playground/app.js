// The page: an endpoint, its form, a generation, and what it came to.

import { Problem, generate, json, local } from "./api.js";
import { LANGUAGES } from "./code.js";
import { byId, make } from "./dom.js";
import { buildForm, values } from "./form.js";
import { refresh } from "./history.js";

const TITLE = document.title;
const NARROW = matchMedia("(max-width: 859px)");

const state = { info: null, endpoint: null, fields: {}, language: "cURL", running: null };

async function start() {
  state.info = await json("GET", "/api/info");
  byId("endpoints").replaceChildren(...state.info.endpoints.map(tab));
  byId("languages").replaceChildren(...Object.keys(LANGUAGES).map(languageButton),
    make("button", { type: "button", onclick: copy, id: "copy" }, "Copy"));
  choose(state.info.endpoints.find((e) => `#${e.name}` === location.hash) ?? state.info.endpoints[0]);
  byId("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
  byId("cancel").addEventListener("click", cancel);
  byId("reset").addEventListener("click", () => fill({}));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
    if (event.key === "Escape") cancel();
  });
  await refresh({ onUse: useAgain, onEdit: edit });
  await watchServer();
}

function tab(endpoint) {
  return make("button", {
    type: "button", role: "tab", id: `tab-${endpoint.name}`, "aria-controls": "request", onclick: () => choose(endpoint),
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const all = state.info.endpoints;
      const next = all[(all.indexOf(endpoint) + step + all.length) % all.length];
      choose(next);
      byId(`tab-${next.name}`).focus();
    },
  }, endpoint.title);
}

function choose(endpoint) {
  const kept = values(state.fields);
  state.endpoint = endpoint;
  for (const e of state.info.endpoints) {
    const selected = e === endpoint;
    byId(`tab-${e.name}`).setAttribute("aria-selected", selected);
    byId(`tab-${e.name}`).tabIndex = selected ? 0 : -1;
  }
  history.replaceState(null, "", `#${endpoint.name}`);
  state.fields = buildForm(endpoint, state.info.sizes, byId("fields"), drawCode);
  fill(kept);
  drawPlan();
}

function fill(settings) {
  for (const [name, field] of Object.entries(state.fields)) field.set(settings[name]);
  complain({});
  drawCode();
}

function useAgain(entry) {
  choose(state.info.endpoints.find((e) => e.name === entry.endpoint));
  fill({ ...entry.arguments, seed: entry.output?.seed ?? entry.arguments.seed });
  byId("prompt").focus();
  byId("prompt").scrollIntoView({ block: "center" });
}

function edit(url) {
  useAgain({ endpoint: state.info.endpoints.find((e) => e.edits).name, arguments: { image_urls: [url] } });
}

function complain(problems) {
  for (const [name, field] of Object.entries(state.fields)) field.problem(problems[name]);
}

async function run() {
  if (state.running) return;
  const started = performance.now();
  state.running = { abort: new AbortController(), request: null, first: null, left: "" };
  busy(true);
  reveal();
  complain({});
  byId("error").hidden = byId("facts").hidden = true;
  const clock = setInterval(() => tick(started), 100);
  try {
    const output = await generate(state.endpoint.name, values(state.fields), {
      signal: state.running.abort.signal,
      onStart: (id) => { state.running.request = id; },
      onEvent: drawStep,
    });
    drawOutput(output);
    byId("said").textContent = "Done.";
    await refresh({ onUse: useAgain, onEdit: edit });
  } catch (error) {
    drawError(error);
  } finally {
    clearInterval(clock);
    state.running = null;
    busy(false);
  }
}

/** Where the result stands below the form, bring it into sight. */
function reveal() {
  if (NARROW.matches) byId("answer").scrollIntoView({ behavior: "smooth" });
}

function busy(yes) {
  byId("generate").disabled = yes;
  byId("cancel").disabled = !yes;
  byId("progress").hidden = !yes;
  byId("answer").setAttribute("aria-busy", yes);
  byId("hello").hidden = yes || byId("pictures").children.length > 0;
  document.title = TITLE;
  if (yes) {
    byId("bar").removeAttribute("value");
    byId("said").textContent = "Generating.";
    state.words = "sending";
  }
}

function tick(started) {
  byId("stage").textContent = `${state.words} · ${((performance.now() - started) / 1000).toFixed(1)} s${state.running.left}`;
}

/** The time that the steps to come take, if they take what those before took. */
function drawRemaining({ step, total }) {
  const { running } = state;
  const now = performance.now();
  running.first ??= { step, at: now };
  const done = step - running.first.step;
  running.left = done ? `, about ${Math.ceil(((now - running.first.at) / done) * (total - step) / 1000)} s left` : "";
}

function drawStep(event) {
  if (event.status === "IN_QUEUE") {
    state.words = `waiting, ${event.queue_position} before`;
  } else if (event.stage === "denoise" && event.step) {
    byId("bar").max = event.total;
    byId("bar").value = event.step;
    state.words = `step ${event.step} of ${event.total}`;
    document.title = `${event.step}/${event.total} · ${TITLE}`;
    drawRemaining(event);
  } else {
    state.running.left = "";
    state.words = event.stage ?? event.logs.at(-1)?.message ?? "starting";
  }
  if (event.images) {
    const onload = byId("preview") ? null : reveal;
    byId("pictures").replaceChildren(make("figure", {}, make("img", { src: event.images[0].url, alt: "preview", id: "preview", onload })));
  }
}

function drawOutput(output) {
  byId("pictures").replaceChildren(...output.images.map((image, i) => make("figure", {},
    make("a", { href: local(image.url), download: image.file_name },
      make("img", { src: local(image.url), width: image.width, height: image.height, alt: output.prompt, className: "finished" })),
    make("figcaption", {}, `seed ${output.seed + i} · ${image.width}×${image.height} · ${(image.file_size / 1024).toFixed(0)} KiB`
      + (output.has_nsfw_concepts[i] ? " · flagged by the safety check" : "")),
  )));
  const rows = Object.entries(output.timings).filter(([, seconds]) => seconds > 0);
  byId("timings").replaceChildren(...rows.map(([name, seconds]) => make("tr", {},
    make("th", { scope: "row" }, name), make("td", {}, `${seconds.toFixed(2)} s`))));
  byId("used-seed").textContent = `Seed ${output.seed}${output.prompt === values(state.fields).prompt ? "" : ` — prompt: ${output.prompt}`}`;
  byId("facts").hidden = false;
}

function drawError(error) {
  byId("pictures").replaceChildren();
  byId("error").hidden = false;
  byId("said").textContent = "";
  byId("error").textContent = error.type === "client_cancelled" || error.name === "AbortError" ? "Cancelled." : error.message;
  if (error instanceof Problem) complain(error.fields);
}

async function cancel() {
  const { running } = state;
  if (!running) return;
  state.words = "cancelling";
  if (!running.request) return running.abort.abort();
  await json("PUT", `/queue/${state.endpoint.name}/requests/${running.request}/cancel`).catch(() => running.abort.abort());
}

function languageButton(name) {
  return make("button", { type: "button", "aria-pressed": name === state.language, onclick: (event) => {
    state.language = name;
    for (const button of byId("languages").children) button.setAttribute("aria-pressed", button === event.target);
    drawCode();
  } }, name);
}

function drawCode() {
  byId("snippet").textContent = LANGUAGES[state.language](state.endpoint.name, { prompt: "", ...values(state.fields) });
}

async function copy() {
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
    byId("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(byId("snippet"));
    byId("copy").textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 2000);
}

function drawPlan() {
  const { plan, description } = state.endpoint;
  byId("description").textContent = description;
  const steps = byId("num_inference_steps");
  if (steps && plan?.steps) steps.placeholder = plan.steps;
  const words = plan?.plan ?? plan?.error ?? "The model is still being loaded.";
  if (byId("plan-text").textContent !== words) byId("plan-text").textContent = words;
}

async function watchServer() {
  for (;;) {
    const { queue, ready, endpoints } = state.info;
    const model = endpoints.map((e) => e.plan).find((plan) => plan?.model);
    byId("server").textContent = !ready ? "loading the model …"
      : `${model?.model ?? "ready"} on ${model?.device ?? "?"} in ${model?.dtype ?? "?"} · ${queue.busy ? "working" : "idle"}, ${queue.waiting} waiting`;
    await new Promise((resolve) => { setTimeout(resolve, ready ? 5000 : 1000); });
    try {
      const info = await json("GET", "/api/info");
      for (const endpoint of endpoints) endpoint.plan = info.endpoints.find((e) => e.name === endpoint.name)?.plan;
      Object.assign(state.info, { queue: info.queue, ready: info.ready });
      drawPlan();
    } catch {
      byId("server").textContent = "the server does not answer";
    }
  }
}

start().catch(drawError);
