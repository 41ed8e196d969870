// A request as what a person would type: curl, Python, YAML. A key is named, never written.

import { address, key } from "./api.js";

export function asCurl({ path, body }) {
  const quotedBody = `'${JSON.stringify(body).replaceAll("'", `'\\''`)}'`;
  const bearer = key.get() ? ` \\\n  -H "Authorization: Bearer $ENSEMBLE_KEY"` : "";
  return `curl ${address(path)} -H 'Content-Type: application/json'${bearer} \\\n  -d ${quotedBody}\n`;
}

const OPENAI = new Set(["model", "messages", "prompt", "temperature", "top_p", "seed", "max_tokens", "logprobs", "top_logprobs",
  "stream", "n", "stop"]);

export function asPython({ path, body }) {
  const [known, extra] = [{}, {}];
  for (const [name, value] of Object.entries(body)) (OPENAI.has(name) ? known : extra)[name] = value;
  const lines = Object.entries(known).map(([name, value]) => `    ${name}=${literal(value)},\n`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${literal(extra)},\n`);
  const apiKey = key.get() ? `os.environ["ENSEMBLE_KEY"]` : `"none"`;
  const isChat = path.includes("chat");
  return `${key.get() ? "import os\n\n" : ""}from openai import OpenAI\n\n` +
    `client = OpenAI(base_url=${literal(address("v1"))}, api_key=${apiKey})\n` +
    `answer = client.${isChat ? "chat.completions" : "completions"}.create(\n${lines.join("")})\n` +
    `print(answer.choices[0].${isChat ? "message.content" : "text"})\n`;
}

function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item)}`).join(", ")}}`;
  }
  return typeof value === "string" ? text(value) : String(value);
}

// JSON's escapes are Python's, but for halves of surrogate pairs, which JSON.stringify leaves as they are in pairs
const text = (value) => JSON.stringify(value).replaceAll("\u2028", "\\u2028").replaceAll("\u2029", "\\u2029");

/** The entry of a config that makes the settings of a probability average its own. */
export function asYaml(model, settings) {
  const scalar = (name) => (/^[A-Za-z_][\w-]*$/.test(name) && !/^(true|false|null|yes|no|on|off|y|n)$/i.test(name) ? name : JSON.stringify(name));
  const members = Object.entries(settings.weights).map(([name, weight]) => `${scalar(name)}: ${weight}`).join(", ");
  const pool = settings.pool ? `, pool: ${settings.pool}` : "";
  const share = settings.pool === "posterior" ? `, share: ${settings.share}` : "";
  return `${scalar(model.id)}: {method: ${model.ensemble.method}, members: {${members}}${pool}${share}}\n`;
}
