// A form made from an endpoint's JSON schema: one control per parameter, with its range.

import { local, upload } from "./api.js";
import { make } from "./dom.js";

const SMALL = 200; // numbers whose range is at most this wide get a slider
const OURS = /^(\/files\/|data:|blob:)/; // pictures that may be shown: the page asks no other server for any

/** A form's fields by name, each with get() -> value or undefined where it is the default, set(value) and problem(text). */
export function buildForm(endpoint, sizes, root, onChange) {
  root.replaceChildren();
  root.oninput = onChange;
  const fields = {};
  const required = new Set(endpoint.schema.required ?? []);
  for (const [name, schema] of Object.entries(endpoint.schema.properties)) {
    const field = control(name, plain(schema), { endpoint, sizes, onChange, required: required.has(name) });
    field.schema = schema;
    fields[name] = field;
    root.append(field.element);
  }
  return fields;
}

export function values(fields) {
  const out = {};
  for (const [name, field] of Object.entries(fields)) {
    const value = field.get();
    if (value !== undefined) out[name] = value;
  }
  return out;
}

/** A schema without its "or null". */
function plain(schema) {
  const options = schema.anyOf?.filter((o) => o.type !== "null");
  if (!options || options.length !== 1) return schema;
  const { anyOf, ...rest } = schema;
  return { ...rest, ...options[0], nullable: true };
}

function control(name, schema, context) {
  if (name === "image_size") return size(name, schema, context);
  if (schema.type === "array") return pictures(name, schema, context);
  if (schema.type === "boolean") return checkbox(name, schema);
  if (schema.enum) return choice(name, schema);
  if (schema.type === "number" || schema.type === "integer") return number(name, schema, context);
  return text(name, schema, context);
}

function frame(name, schema, range, ...inner) {
  const problem = make("p", { className: "problem", id: `${name}-problem`, hidden: true });
  const words = name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");
  const label = make("label", { htmlFor: name, title: name }, words, range ? make("span", { className: "range" }, ` ${range}`) : null);
  const hint = schema.description ? make("p", { className: "hint", id: `${name}-hint` }, schema.description) : null;
  const element = make("div", { className: "field" }, label, ...inner, problem, hint);
  return { element, problem: (words) => show(element, problem, words) };
}

function show(element, problem, words) {
  problem.textContent = words ?? "";
  problem.hidden = !words;
  element.classList.toggle("wrong", Boolean(words));
}

function text(name, schema, context) {
  const input = make("textarea", {
    id: name, name, rows: 5, required: context.required, placeholder: schema.examples?.[0], "aria-describedby": `${name}-problem`,
  });
  const made = frame(name, { ...schema, description: "" }, null, input);
  made.element.classList.add("wide");
  return {
    ...made,
    get: () => (input.value === "" ? undefined : input.value),
    set: (value) => { input.value = value ?? ""; },
  };
}

function checkbox(name, schema) {
  const input = make("input", { id: name, name, type: "checkbox", checked: schema.default, "aria-describedby": `${name}-hint` });
  const made = frame(name, schema, null);
  made.element.replaceChildren(
    make("div", { className: "check" }, input, made.element.querySelector("label")), ...made.element.querySelectorAll("p"),
  );
  return {
    ...made,
    get: () => (input.checked === schema.default ? undefined : input.checked),
    set: (value) => { input.checked = value ?? schema.default; },
  };
}

function choice(name, schema) {
  const fallback = schema.default ?? "";
  const empty = schema.default ? [] : [make("option", { value: "" }, "the server's own")];
  const input = make("select", { id: name, name, "aria-describedby": `${name}-hint` },
    ...empty, ...schema.enum.map((value) => make("option", { value }, value)));
  input.value = fallback;
  return {
    ...frame(name, schema, null, input),
    get: () => (input.value === fallback ? undefined : input.value),
    set: (value) => { input.value = value ?? fallback; },
  };
}

function number(name, schema, context) {
  const { minimum: min, maximum: max } = schema;
  const step = schema.type === "integer" ? 1 : 0.1;
  const own = name === "num_inference_steps" ? context.endpoint.plan?.steps : undefined;
  const fallback = schema.default ?? undefined;
  const wide = max === undefined || max - min > SMALL;
  const input = make("input", {
    id: name, name, type: "number", inputMode: "decimal", min, max: wide ? undefined : max, step: schema.type === "integer" ? 1 : "any",
    value: fallback ?? "", placeholder: own ?? (name === "seed" ? "random" : "auto"), "aria-describedby": `${name}-hint ${name}-problem`,
  });
  let slider = null;
  if (!wide) {
    slider = make("input", { type: "range", min, max, step, value: fallback ?? own ?? min, "aria-label": `${name}, slider`, tabIndex: -1 });
    slider.addEventListener("input", () => { input.value = slider.value; });
    input.addEventListener("input", () => { slider.value = input.value || (fallback ?? own ?? min); });
  }
  const inner = slider ? make("div", { className: "pair" }, slider, input) : input;
  return {
    ...frame(name, schema, wide ? null : `${min} to ${max}`, inner),
    get: () => (input.value === "" || Number(input.value) === fallback ? undefined : Number(input.value)),
    set: (value) => {
      input.value = value ?? fallback ?? "";
      if (slider) slider.value = value ?? fallback ?? own ?? min;
    },
  };
}

function size(name, schema, context) {
  const { width: w, height: h } = context.endpoint.schema.$defs.ImageSize.properties;
  const side = (key, s) => make("input", {
    id: key, type: "number", inputMode: "numeric", min: s.minimum, max: s.maximum, step: 1, value: 1024, "aria-label": `${key} in pixels`,
  });
  const width = side("width", w);
  const height = side("height", h);
  const custom = make("div", { className: "two", hidden: true }, width, height);
  const options = Object.entries(context.sizes).map(([key, [x, y]]) => make("option", { value: key }, `${key} — ${x}×${y}`));
  const input = make("select", { id: name, name }, ...options, make("option", { value: "custom" }, "custom"));
  input.value = schema.default;
  input.addEventListener("change", () => { custom.hidden = input.value !== "custom"; });
  return {
    ...frame(name, schema, `or ${w.minimum} to ${w.maximum} pixels a side`, input, custom),
    get: () => {
      if (input.value === "custom") return { width: Number(width.value), height: Number(height.value) };
      return input.value === schema.default ? undefined : input.value;
    },
    set: (value) => {
      const pixels = typeof value === "object" && value !== null;
      input.value = pixels ? "custom" : value ?? schema.default;
      if (pixels) [width.value, height.value] = [value.width ?? w.default, value.height ?? h.default];
      custom.hidden = !pixels;
    },
  };
}

function pictures(name, schema, context) {
  let urls = [];
  const list = make("ul", { className: "thumbs" });
  const input = make("input", { id: name, name, type: "file", multiple: true, accept: "image/png,image/jpeg,image/webp" });
  const address = make("input", { type: "url", placeholder: "or an address: https://…", "aria-label": "Address of a picture" });
  const draw = () => {
    list.replaceChildren(...urls.map((url, i) => make("li", {},
      OURS.test(local(url)) ? make("img", { src: local(url), alt: `reference ${i + 1}` }) : make("span", { className: "elsewhere" }, url),
      make("button", { type: "button", "aria-label": `remove reference ${i + 1}`, onclick: () => change(urls.filter((_, n) => n !== i)) }, "remove"),
    )));
  };
  const change = (next) => { urls = next.slice(0, schema.maxItems); draw(); context.onChange(); };
  input.addEventListener("change", async () => {
    made.problem();
    for (const file of input.files) {
      await upload(file).then((url) => change([...urls, url]), (error) => made.problem(`${file.name}: ${error.message}`));
    }
    input.value = "";
  });
  address.addEventListener("change", () => {
    if (address.value) change([...urls, address.value]);
    address.value = "";
  });
  const made = frame(name, schema, `${schema.minItems} to ${schema.maxItems} pictures`, input, address, list);
  made.element.classList.add("wide");
  return {
    ...made,
    get: () => (urls.length ? urls : undefined),
    set: (value) => { urls = value ?? []; draw(); },
  };
}
