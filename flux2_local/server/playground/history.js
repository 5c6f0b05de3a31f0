// What this server has made: a list with settings to use again.

import { json, local } from "./api.js";
import { byId, make } from "./dom.js";

const PAGE = 24;
let oldest = 0;

/** Show the newest entries; `onUse` is given an entry whose settings are wanted, `onEdit` the address of a picture. */
export async function refresh(actions) {
  byId("entries").replaceChildren();
  oldest = 0;
  byId("more").onclick = () => more(actions);
  await more(actions);
}

async function more(actions) {
  const { requests } = await json("GET", `/api/history?limit=${PAGE}${oldest ? `&before=${oldest}` : ""}`);
  byId("entries").append(...requests.map((entry) => item(entry, actions)));
  oldest = requests.at(-1)?.ended ?? oldest;
  byId("more").hidden = requests.length < PAGE;
  byId("empty").hidden = byId("entries").children.length > 0;
}

function item(entry, { onUse, onEdit }) {
  const image = entry.output?.images[0];
  const name = entry.endpoint.split("/").slice(1).join("/");
  const count = entry.output ? ` · ${entry.output.images.length} × ${image.width}×${image.height}` : "";
  const element = make("li", {},
    image ? make("a", { href: local(image.url), target: "_blank" }, make("img", { src: local(image.url), alt: entry.arguments.prompt, loading: "lazy" })) : null,
    make("p", {}, entry.arguments.prompt),
    make("p", { className: "hint" }, entry.error ? `${name} · ${entry.error}` : `${name}${count} · ${entry.output.timings.inference.toFixed(1)} s`),
    make("div", { className: "row" },
      make("button", { type: "button", onclick: () => onUse(entry) }, "Use settings"),
      image ? make("button", { type: "button", onclick: () => onEdit(image.url) }, "Edit") : null,
      make("button", { type: "button", onclick: async () => {
        await json("DELETE", `/api/history/${entry.request_id}`);
        element.remove();
        byId("empty").hidden = byId("entries").children.length > 0;
      } }, "Delete"),
    ),
  );
  return element;
}
