// A box to write in, with a button that sends and, while an answer comes, one that stops it.

import { html } from "./vendor/htm-preact.standalone.module.js";

/** Enter sends and Shift+Enter breaks the line, unless `isLong`: there Ctrl+Enter sends. */
export function PromptBox({ label, value, onInput, onSend, onStop, isLive, isLong = false, verb = "Send", rows = 2 }) {
  const send = () => value.trim() && !isLive && onSend();
  const typed = (event) => {
    if (event.key !== "Enter" || event.isComposing) return;
    if (isLong ? event.ctrlKey || event.metaKey : !event.shiftKey) {
      event.preventDefault();
      send();
    }
  };
  return html`<form class="prompt" onSubmit=${(event) => { event.preventDefault(); send(); }}>
    <textarea aria-label=${label} placeholder=${label} rows=${rows} class=${isLong ? "code" : ""} value=${value}
      onInput=${(event) => onInput(event.target.value)} onKeyDown=${typed}></textarea>
    ${isLive
      ? html`<button type="button" class="primary stop" onClick=${onStop}>Stop</button>`
      : html`<button type="submit" class="primary" disabled=${!value.trim()}>${verb}</button>`}
  </form>`;
}

/** A `<select>` of models in groups: [[title, models], …]. */
export function ModelPicker({ groups, value, onChange, label = "Model" }) {
  return html`<label class="picker">${label} <select value=${value} onChange=${(event) => onChange(event.target.value)}>
    ${groups.map(([title, models]) => html`<optgroup label=${title} key=${title}>
      ${models.map((model) => html`<option key=${model.id} value=${model.id}>${model.id}</option>`)}</optgroup>`)}
  </select></label>`;
}
