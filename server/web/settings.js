// The drawer: what the next request asks for. Nothing is sent by moving a slider.

import { html } from "./vendor/htm-preact.standalone.module.js";
import { MAX_COLOURS } from "./drivers.js";
import { CopyButton } from "./copying.js";
import { asYaml } from "./snippets.js";
import { defaults, hasTokens, methodOf } from "./models.js";
import { number } from "./words.js";

const POOLS = ["arithmetic", "geometric", "posterior"];
const LEAST_SHARE = -4; // the slider's left end: 10 ** -4; below it is 0

function Slider({ label, value, min, max, step, onInput, shown = number(value, 2), swatch }) {
  return html`<label class="slider"><span>${swatch} ${label}</span> <output>${shown}</output>
    <input type="range" aria-label=${label} aria-valuetext=${shown} min=${min} max=${max} step=${step} value=${value}
      onInput=${(event) => onInput(Number(event.target.value))} /></label>`;
}

export function Settings({ model, settings, onChange }) {
  const set = (changes) => onChange({ ...settings, ...changes });
  const allowed = model?.ensemble?.overrides ?? [];
  const isMixture = methodOf(model) === "probability_average";
  const least = settings.pool === "geometric" ? -2 : 0;
  const setPool = (pool) => {
    const weights = pool === "geometric" ? settings.weights : Object.fromEntries(
      Object.entries(settings.weights).map(([name, weight]) => [name, Math.max(0, weight)]));
    set({ pool, weights });
  };
  return html`<div class="settings">
    ${allowed.includes("weights") && html`<fieldset><legend>Weights</legend>
      ${Object.entries(settings.weights).map(([name, weight], k) => html`<${Slider} key=${name} label=${name} value=${weight}
        min=${Math.min(least, weight)} max=${Math.max(2, weight)} step="0.05"
        swatch=${html`<span class="swatch member${k % MAX_COLOURS}"></span>`}
        onInput=${(value) => set({ weights: { ...settings.weights, [name]: value } })} />`)}
    </fieldset>`}
    ${allowed.includes("pool") && html`<label>Pool <select value=${settings.pool} onChange=${(event) => setPool(event.target.value)}>
      ${POOLS.map((pool) => html`<option value=${pool}>${pool}</option>`)}</select></label>`}
    ${allowed.includes("share") && settings.pool === "posterior" && html`<${Slider} label="Share" min=${LEAST_SHARE} max="-0.05" step="0.05"
      value=${settings.share > 0 ? Math.log10(settings.share) : LEAST_SHARE} shown=${number(settings.share, 4)}
      onInput=${(value) => set({ share: value <= LEAST_SHARE ? 0 : Number((10 ** value).toPrecision(3)) })} />`}
    <${Slider} label="Temperature" value=${settings.temperature} min="0" max="2" step="0.05" onInput=${(temperature) => set({ temperature })} />
    <${Slider} label="top_p" value=${settings.top_p} min="0.05" max="1" step="0.05" onInput=${(top_p) => set({ top_p })} />
    <div class="pair">
      <label>Seed <input type="number" value=${settings.seed} placeholder="random" step="1"
        onInput=${(event) => set({ seed: event.target.value })} /></label>
      <label>Most tokens <input type="number" value=${settings.max_tokens} min="1" step="1"
        onInput=${(event) => event.target.value && set({ max_tokens: Number(event.target.value) })} /></label>
    </div>
    <label>System prompt <textarea rows="2" value=${settings.system} onInput=${(event) => set({ system: event.target.value })}></textarea></label>
    <label class="check"><input type="checkbox" checked=${settings.explain} onChange=${(event) => set({ explain: event.target.checked })} />
      ${hasTokens(model) ? "Explain every token" : "Show how the answer came to be"}</label>
    ${allowed.length > 0 && !isMixture && html`<label>More of the ensemble, as JSON
      <textarea rows="2" class="code" value=${settings.more} placeholder='{"samples": 3}'
        onInput=${(event) => set({ more: event.target.value })}></textarea>
      <span class="quiet">It may change: ${allowed.join(", ")}.</span></label>`}
    <div class="row">
      <button type="button" onClick=${() => onChange(defaults(model))}>Reset</button>
      ${isMixture && html`<${CopyButton} label="Copy as YAML" text=${() => asYaml(model, settings)} />`}
    </div>
  </div>`;
}
