// Server: is it well, how long is the queue, how fast are answers, and what each member does.

import { html, useEffect, useState } from "./vendor/htm-preact.standalone.module.js";
import { json, text } from "./api.js";
import { Bar, Sparkline, TableTwin } from "./charts.js";
import { parseMetrics, quantile, sum, sumBy } from "./metrics.js";
import { number } from "./words.js";

const EVERY_MS = 2000;
const NUM_KEPT = 90; // three minutes

export function Server({ isActive, models }) {
  const [health, setHealth] = useState(null);
  const [version, setVersion] = useState("");
  const [history, setHistory] = useState([]); // [{at, running, waiting, memberTokens}, …]
  const [samples, setSamples] = useState([]);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    if (!isActive) return undefined;
    const look = async () => {
      if (document.visibilityState !== "visible") return;
      setHealth(await json("health").catch((error) => ({ status: error.message })));
      try {
        const read = parseMetrics(await text("metrics"));
        setSamples(read);
        setHistory((past) => [...past, { at: performance.now() / 1000, running: sum(read, "num_requests_running"),
          waiting: sum(read, "num_requests_waiting"), memberTokens: sum(read, "member_tokens_total") }].slice(-NUM_KEPT));
        setProblem(null);
      } catch (error) {
        setProblem(error.message);
      }
    };
    json("version").then((answer) => setVersion(answer.version), () => {});
    look();
    const timer = setInterval(look, EVERY_MS);
    return () => clearInterval(timer);
  }, [isActive]);

  const rates = history.slice(1).map((now, k) => Math.max(0, (now.memberTokens - history[k].memberTokens) / (now.at - history[k].at)));
  const latest = history.at(-1);
  const members = Object.entries(sumBy(samples, "member_tokens_total", "member"));
  const most = Math.max(...members.map(([, count]) => count), 1);
  const down = new Set(health?.down ?? []);
  const impaired = new Set(health?.impaired ?? []);
  const wait = (q, labels) => quantile(samples, "time_to_first_token_seconds", q, labels);
  const seconds = (value) => (value === null ? "–" : `${number(value, 2)} s`);
  return html`<div class="server">
    <p class="health" role="status"><span class="mark ${health?.status === "ok" ? "" : "warning"}">${health?.status ?? "…"}</span>
      ensemble-server ${version}${down.size > 0 && html` · down: ${[...down].join(", ")}`}${impaired.size > 0 && html` · impaired: ${[...impaired].join(", ")}`}</p>
    ${problem && html`<p class="error" role="alert">${problem}</p>`}
    <dl class="tiles">
      <${Tile} title="Running" value=${number(latest?.running ?? 0, 0)} values=${history.map((one) => one.running)} />
      <${Tile} title="Waiting" value=${number(latest?.waiting ?? 0, 0)} values=${history.map((one) => one.waiting)} />
      <${Tile} title="Tokens/s through members" value=${number(rates.at(-1) ?? 0, 1)} values=${rates} />
      <${Tile} title="First token, p50" value=${seconds(wait(0.5))} />
      <${Tile} title="First token, p95" value=${seconds(wait(0.95))} />
    </dl>
    <${TableTwin} title="The last minutes as a table" head=${["seconds ago", "running", "waiting", "tokens/s"]}
      rows=${() => history.map((one, k) => [number(latest.at - one.at, 0), one.running, one.waiting, k ? number(rates[k - 1], 1) : "–"])} />
    <h3>Models</h3>
    <div class="scroll" tabindex="0" role="region" aria-label="Models"><table><thead><tr><th scope="col">model</th><th scope="col">state</th><th scope="col">requests</th>
        <th scope="col">first token p50</th><th scope="col">p95</th><th scope="col">tokens written</th></tr></thead>
      <tbody>${models.map(({ id }) => html`<tr key=${id}><th scope="row">${id}</th>
        <td>${down.has(id) ? "down" : impaired.has(id) ? "impaired" : "up"}</td><td>${number(sum(samples, "requests_total", { model: id }), 0)}</td>
        <td>${seconds(wait(0.5, { model: id }))}</td><td>${seconds(wait(0.95, { model: id }))}</td>
        <td>${number(sum(samples, "completion_tokens_total", { model: id }), 0)}</td></tr>`)}</tbody></table></div>
    <h3>Tokens through each member</h3>
    ${members.length === 0 && html`<p class="quiet">None yet.</p>`}
    <table class="views"><tbody>${members.map(([name, count], k) => html`<tr key=${name}><th scope="row">${name}</th>
      <td><${Bar} part=${count / most} colour=${k} /> ${number(count, 0)}</td></tr>`)}</tbody></table>
  </div>`;
}

function Tile({ title, value, values }) {
  return html`<div class="tile"><dt>${title}</dt><dd>${value}${values?.length > 1 && html` <${Sparkline} values=${values} label="${title} over the last minutes" />`}</dd></div>`;
}
