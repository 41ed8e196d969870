// Talks to the server that this page came from, and to no other. A key is kept for this tab only, and sent as Bearer.

const ROOT = new URL("../", import.meta.url); // the server's root, also behind a proxy that adds a prefix
const KEY = "ensemble.key";

export const address = (path) => new URL(path.replace(/^\//, ""), ROOT).href;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server refused, or that it cannot be reached (`status` 0). */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(path, { method = "GET", body, form, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), { method, headers, body: body === undefined ? form : JSON.stringify(body),
      signal, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) dispatchEvent(new Event("key-needed"));
  throw new ApiError(response.status, answer.error?.message ?? `The server answered ${response.status}.`);
}

/** The JSON answer to a request. */
export const json = async (path, options) => (await send(path, options)).json();

/** The answer as text. */
export const text = async (path, options) => (await send(path, options)).text();

/** The answer as bytes, for a download. */
export const blob = async (path, options) => (await send(path, options)).blob();

/** The chunks of a streamed answer, parsed. An error inside the stream is thrown. */
export async function* chunks(path, body, signal) {
  const response = await send(path, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment that keeps the connection open
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(500, chunk.error.message);
      yield chunk;
    }
  }
}

/** Saves `content` (text or a blob) as a file of the person's. */
export function download(name, content, type = "application/json") {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
