// Calls to the server: JSON, and the event stream of a generation.

const KEY = "flux2-local-key";

function headers(more) {
  const key = localStorage.getItem(KEY);
  return { ...(key ? { Authorization: `Key ${key}` } : {}), ...more };
}

export function askKey() {
  const dialog = document.getElementById("key");
  const input = document.getElementById("key-input");
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => { localStorage.setItem(KEY, input.value); resolve(); }, { once: true });
    if (!dialog.open) dialog.showModal();
  });
}

export async function call(method, path, body, signal) {
  const type = body instanceof Blob ? body.type : "application/json";
  const init = { method, signal, headers: headers(body ? { "Content-Type": type } : {}) };
  if (body) init.body = body instanceof Blob ? body : JSON.stringify(body);
  const answer = await fetch(path, init);
  if (answer.status !== 401) return answer;
  await askKey();
  return call(method, path, body, signal);
}

export async function json(method, path, body) {
  const answer = await call(method, path, body);
  const data = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Problem(data);
  return data;
}

/** What the server said is wrong; `fields` maps a field's name to its problem. */
export class Problem extends Error {
  constructor(data) {
    const list = Array.isArray(data?.detail) ? data.detail : [];
    super(list.length ? list.map((d) => `${d.loc.slice(1).join(" ")}: ${d.msg}`).join("\n") : data?.detail ?? "The server failed.");
    this.fields = Object.fromEntries(list.map((d) => [d.loc[1], d.msg]));
    this.type = data?.error_type;
  }
}

/** Send a picture ahead; resolves to its address. */
export async function upload(file) {
  return (await json("POST", "/files/upload", file)).access_url;
}

/** Generate; `onEvent` gets every step, `onStart` the request's id. Resolves to the output. */
export async function generate(endpoint, body, { signal, onStart, onEvent }) {
  const answer = await call("POST", `/${endpoint}/stream`, body, signal);
  if (!answer.ok) throw new Problem(await answer.json());
  onStart(answer.headers.get("x-fal-request-id"));
  for await (const event of events(answer.body)) {
    if (event.error_type) throw new Problem(event);
    if (event.seed !== undefined) return event;
    onEvent(event);
  }
  throw new Problem({ detail: "The server hung up." });
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

/** A picture's address on this very page's server, whatever name the answer knows it by. */
export function local(url) {
  const at = new URL(url, location.href);
  return at.pathname.startsWith("/files/") ? at.pathname : url;
}
