// Buttons that put a text on the clipboard, and say so.

import { html, useState } from "./vendor/htm-preact.standalone.module.js";

/** `text()` makes what is copied. Where the browser gives no clipboard (no HTTPS) the text is shown to be selected. */
export function CopyButton({ label, text }) {
  const [state, set] = useState(null);
  const copy = async () => {
    const made = text();
    try {
      await navigator.clipboard.writeText(made);
      set("copied");
      setTimeout(() => set(null), 2000);
    } catch {
      set({ made });
    }
  };
  return html`<span class="copying"><button type="button" onClick=${copy}>${state === "copied" ? "Copied" : label}</button>
    ${state?.made && html`<textarea class="code" readonly rows="6" aria-label=${label} value=${state.made}
      onFocus=${(event) => event.target.select()}></textarea>
      <button type="button" onClick=${() => set(null)}>Close</button>`}</span>`;
}
