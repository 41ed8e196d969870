// Batches: files of many requests, how far they are, and what came of them.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact.standalone.module.js";
import { blob, download, json } from "./api.js";
import { Bar } from "./charts.js";
import { number, time } from "./words.js";

const LIVE = new Set(["validating", "in_progress", "finalizing", "cancelling"]);
const EVERY_MS = 2000;

export function Batches({ isActive }) {
  const [batches, setBatches] = useState(null);
  const [problem, setProblem] = useState(null);
  const [isBusy, setBusy] = useState(false);
  const file = useRef(null);

  const attempt = async (what) => {
    try {
      const result = await what();
      setProblem(null);
      return result;
    } catch (error) {
      setProblem(error.message);
      return undefined;
    }
  };
  const load = () => attempt(async () => setBatches((await json("v1/batches?limit=50")).data));
  const isAnyLive = batches?.some((batch) => LIVE.has(batch.status)) ?? false;
  useEffect(() => {
    if (!isActive) return undefined;
    load();
    const timer = setInterval(() => document.visibilityState === "visible" && isAnyLive && load(), EVERY_MS);
    return () => clearInterval(timer);
  }, [isActive, isAnyLive]);

  const upload = async (event) => {
    event.preventDefault();
    const chosen = file.current.files[0];
    if (!chosen) return;
    setBusy(true);
    await attempt(async () => {
      const endpoint = await endpointOf(chosen);
      const form = new FormData();
      form.append("purpose", "batch");
      form.append("file", chosen);
      const stored = await json("v1/files", { method: "POST", form });
      await json("v1/batches", { method: "POST", body: { input_file_id: stored.id, endpoint, completion_window: "24h" } });
      file.current.value = "";
      await load();
    });
    setBusy(false);
  };
  const cancel = async (batch) => {
    await attempt(() => json(`v1/batches/${batch.id}/cancel`, { method: "POST" }));
    await load();
  };
  const save = (id) => attempt(async () => download(`${id}.jsonl`, await blob(`v1/files/${id}/content`)));

  return html`<div class="batches">
    <form class="row" onSubmit=${upload}><label class="file">Requests, one JSON object a line <input type="file" ref=${file} accept=".jsonl" required /></label>
      <button type="submit" class="primary" disabled=${isBusy}>${isBusy ? "Sending …" : "Start a batch"}</button>
      <button type="button" onClick=${load}>Refresh</button></form>
    ${problem && html`<p class="error" role="alert">${problem}</p>`}
    ${batches?.length === 0 && html`<p class="empty">There are no batches yet.</p>`}
    ${batches?.length > 0 && html`<div class="scroll" tabindex="0" role="region" aria-label="Batches"><table>
      <thead><tr><th scope="col">batch</th><th scope="col">state</th><th scope="col">rows</th><th scope="col">begun</th><th scope="col">files</th></tr></thead>
      <tbody>${batches.map((batch) => html`<${Batch} key=${batch.id} batch=${batch} onCancel=${cancel} onSave=${save} />`)}</tbody></table></div>`}
  </div>`;
}

function Batch({ batch, onCancel, onSave }) {
  const { total, completed, failed } = batch.request_counts;
  return html`<tr><th scope="row"><code>${batch.id.slice(0, 18)}</code><br /><span class="quiet">${batch.endpoint}${batch.model ? ` · ${batch.model}` : ""}</span></th>
    <td>${batch.status}${(batch.errors?.data ?? []).slice(0, 3).map((error) => html`<p class="error">${error.line ? `line ${error.line}: ` : ""}${error.message}</p>`)}</td>
    <td><${Bar} part=${total ? (completed + failed) / total : 0} /> ${number(completed, 0)} of ${number(total, 0)}${failed > 0 && `, ${number(failed, 0)} failed`}</td>
    <td>${time(batch.created_at)}</td>
    <td>${LIVE.has(batch.status) && html`<button type="button" disabled=${batch.status === "cancelling"} onClick=${() => onCancel(batch)}>Cancel</button>`}
      ${batch.output_file_id && html`<button type="button" onClick=${() => onSave(batch.output_file_id)}>Answers</button>`}
      ${batch.error_file_id && html`<button type="button" onClick=${() => onSave(batch.error_file_id)}>Errors</button>`}</td></tr>`;
}

/** The url of the first line, which is that of all. */
async function endpointOf(file) {
  const [line] = (await file.slice(0, 2 ** 20).text()).split("\n");
  try {
    return JSON.parse(line).url ?? "/v1/chat/completions";
  } catch {
    return "/v1/chat/completions"; // the server says what is wrong with the line
  }
}
