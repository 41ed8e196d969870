// Compare: two to four models, one prompt, one seed, side by side; blind, if you want to judge without knowing.

import { html, useEffect, useState } from "./vendor/htm-preact.standalone.module.js";
import { ask, costOf, newAnswer, stop, tokensPerSecond, useAnswer } from "./answer.js";
import { AnswerView } from "./answerview.js";
import { chatRequest } from "./models.js";
import { PromptBox } from "./prompting.js";
import { number } from "./words.js";

const MOST = 4;
const TALLY = "ensemble.tally";
const LETTERS = "ABCD";

const tally = () => JSON.parse(localStorage.getItem(TALLY) ?? "{}");

/** `link`: what a deep link asks to be filled in, {models, prompt}. It is filled in and never sent. */
export function Compare({ models, settingsOf, link }) {
  const [names, choose] = useState([]);
  const [prompt, write] = useState("");
  const [seed, setSeed] = useState("1");
  const [isBlind, setBlind] = useState(false);
  const [run, setRun] = useState(null); // {columns: [{name, answer}], isBlind, verdict}
  const [problem, setProblem] = useState(null);
  const [isLive, setLive] = useState(false);
  const [counts, count] = useState(tally);

  useEffect(() => {
    const known = (name) => models.some((model) => model.id === name);
    if (link) {
      choose(link.models.filter(known).slice(0, MOST));
      write(link.prompt);
    } else if (!names.length) choose(models.slice(0, 2).map((model) => model.id));
  }, [link, models]);

  const send = async () => {
    try {
      const columns = names.map((name) => {
        const model = models.find((one) => one.id === name);
        return { name, answer: newAnswer(chatRequest(model, { ...settingsOf(model), seed }, [{ role: "user", content: prompt }])) };
      });
      if (isBlind) shuffle(columns);
      setProblem(null);
      setRun({ columns, isBlind, verdict: null });
      setLive(true);
      await Promise.all(columns.map(({ answer }) => ask(answer)));
    } catch (error) {
      setProblem(error.message);
    }
    setLive(false);
  };
  const judge = (best) => {
    const all = tally();
    run.columns.forEach(({ name }, k) => {
      all[name] ??= { shown: 0, won: 0 };
      all[name].shown += 1;
      all[name].won += best === k ? 1 : 0;
    });
    localStorage.setItem(TALLY, JSON.stringify(all));
    count(all);
    setRun({ ...run, verdict: best });
  };
  const isHidden = run?.isBlind && run.verdict === null;
  const address = `#compare=${names.map(encodeURIComponent).join(",")}&prompt=${encodeURIComponent(prompt)}`;
  return html`<div class="compare">
    <fieldset class="row choices"><legend>Models, two to four</legend>
      ${models.map((model) => html`<label class="check" key=${model.id}><input type="checkbox" checked=${names.includes(model.id)}
        disabled=${!names.includes(model.id) && names.length >= MOST}
        onChange=${(event) => choose(event.target.checked ? [...names, model.id] : names.filter((name) => name !== model.id))} /> ${model.id}</label>`)}
    </fieldset>
    <div class="row"><label>Seed <input type="number" value=${seed} onInput=${(event) => setSeed(event.target.value)} /></label>
      <label class="check"><input type="checkbox" checked=${isBlind} onChange=${(event) => setBlind(event.target.checked)} /> blind</label>
      <a href=${address}>Link to this comparison</a></div>
    <${PromptBox} label="Prompt for all" value=${prompt} onInput=${write} isLive=${isLive} verb="Compare"
      onSend=${() => (names.length < 2 ? setProblem("Choose at least two models.") : send())}
      onStop=${() => run.columns.forEach(({ answer }) => stop(answer))} />
    ${problem && html`<p class="error" role="alert">${problem}</p>`}
    ${run && isHidden && !isLive && html`<div class="row" role="group" aria-label="Which is best?">Which is best?
      ${run.columns.map((_, k) => html`<button type="button" onClick=${() => judge(k)}>${LETTERS[k]}</button>`)}
      <button type="button" onClick=${() => judge(null)}>None is</button></div>`}
    ${run && html`<div class="columns side-by-side">${run.columns.map(({ name, answer }, k) => html`<section key=${k}
        aria-label=${isHidden ? LETTERS[k] : name}><h3>${isHidden ? LETTERS[k] : name}${run.verdict === k && " ★"}</h3>
      <${AnswerView} answer=${answer} hidesNames=${isHidden} /></section>`)}</div>
      ${!isHidden && html`<${Figures} columns=${run.columns} />`}`}
    ${Object.keys(counts).length > 0 && html`<details><summary>Your blind tally</summary>
      <table><thead><tr><th scope="col">model</th><th scope="col">best</th><th scope="col">shown</th></tr></thead>
        <tbody>${Object.entries(counts).map(([name, { won, shown }]) => html`<tr key=${name}><th scope="row">${name}</th><td>${won}</td><td>${shown}</td></tr>`)}</tbody></table>
      <button type="button" onClick=${() => { localStorage.removeItem(TALLY); count({}); }}>Clear</button></details>`}
  </div>`;
}

function Figures({ columns }) {
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Speed and cost"><table>
    <thead><tr><th scope="col">model</th><th scope="col">tokens/s</th><th scope="col">first token, s</th><th scope="col">tokens of all members</th><th scope="col">cost</th></tr></thead>
    <tbody>${columns.map(({ name, answer }) => html`<${Figure} key=${name} name=${name} answer=${answer} />`)}</tbody></table></div>`;
}

function Figure({ name, answer }) {
  useAnswer(answer);
  const { cost, memberTokens } = costOf(answer);
  const first = answer.firstAt === null ? null : (answer.firstAt - answer.startedAt) / 1000;
  return html`<tr><th scope="row">${name}</th><td>${number(tokensPerSecond(answer), 1)}</td><td>${number(first, 2)}</td>
    <td>${memberTokens ? number(memberTokens, 0) : "–"}</td><td>${cost ? number(cost, 5) : "–"}</td></tr>`;
}

function shuffle(items) {
  for (let k = items.length - 1; k > 0; k -= 1) {
    const other = crypto.getRandomValues(new Uint32Array(1))[0] % (k + 1);
    [items[k], items[other]] = [items[other], items[k]];
  }
}
