// A request as code for each client.

export const LANGUAGES = { cURL: curl, Python: python, JavaScript: javascript };

function curl(endpoint, body) {
  const text = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl ${location.origin}/${endpoint} \\
  --header "Authorization: Key $FAL_KEY" \\
  --header "Content-Type: application/json" \\
  --data '${text}'`;
}

function literal(value, depth = 1) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  const pad = "    ".repeat(depth);
  const inner = Array.isArray(value)
    ? value.map((v) => `${pad}    ${literal(v, depth + 1)},\n`)
    : Object.entries(value).map(([k, v]) => `${pad}    ${JSON.stringify(k)}: ${literal(v, depth + 1)},\n`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return `${open}\n${inner.join("")}${pad}${close}`;
}

function python(endpoint, body) {
  return `import os

os.environ.setdefault("FAL_KEY", "any")
import fal_client
import fal_client.client as fal

fal.RUN_URL_FORMAT, fal.QUEUE_URL_FORMAT = "${location.origin}/", "${location.origin}/queue/"

result = fal_client.subscribe(
    "${endpoint}",
    arguments=${literal(body)},
)
print(result["images"][0]["url"])`;
}

function javascript(endpoint, body) {
  const text = JSON.stringify(body, null, 2).replaceAll("\n", "\n  ");
  return `import { fal } from "@fal-ai/client";

fal.config({ proxyUrl: { url: "${location.origin}/api/fal/proxy", when: "always" } });

const result = await fal.subscribe("${endpoint}", {
  input: ${text},
});
console.log(result.data.images[0].url);`;
}
