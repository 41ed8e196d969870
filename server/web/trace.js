// How an ensemble of texts came to its answer, in the form that suits its method.

import { html } from "./vendor/htm-preact.standalone.module.js";
import { download } from "./api.js";
import { ExchangeReport } from "./exchangereport.js";
import { VoteReport } from "./votereport.js";

export function Trace({ ensemble }) {
  const { trace } = ensemble;
  const own = trace.choices ? trace.choices[0] : trace; // several choices: the first one is shown
  return html`<div class="trace">
    ${own.rounds && own.states ? html`<${ExchangeReport} transcript=${own} />`
      : own.candidates ? html`<${VoteReport} trace=${own} />`
      : own.layers ? own.layers.map((layer, index) => html`<h4>Layer ${index + 1}</h4><${VoteReport} trace=${layer} />`)
      : own.gates ? html`<${Gates} trace=${own} />`
      : html`<pre tabindex="0">${JSON.stringify(own, null, 2)}</pre>`}
    <button type="button" onClick=${() => download("trace.json", JSON.stringify(trace, null, 2))}>Download the trace</button>
  </div>`;
}

function Gates({ trace }) {
  return html`<p>Answered by ${(trace.answered ?? []).join(", ")}.</p>
    <table><thead><tr><th scope="col">member</th><th scope="col">gate</th></tr></thead>
      <tbody>${Object.entries(trace.gates).map(([name, gate]) => html`<tr><th scope="row">${name}</th><td>${gate}</td></tr>`)}</tbody></table>`;
}
