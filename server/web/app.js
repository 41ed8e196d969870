// The page: the rail, the model picker, the drawer with settings, and one view at a time. Views that are not shown keep
// their state, so that an answer goes on while one looks elsewhere.

import { html, render, useEffect, useRef, useState } from "./vendor/htm-preact.standalone.module.js";
import { json, key } from "./api.js";
import { Batches } from "./batches.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { defaults, grouped, isExchange, isVote } from "./models.js";
import { ModelPicker } from "./prompting.js";
import { Report } from "./report.js";
import { Server } from "./server.js";
import { Settings } from "./settings.js";
import { Text } from "./text.js";

// name -> [title, the picker that it shares with others, the models that it can show]
const VIEWS = {
  chat: ["Chat", "any", () => true],
  text: ["Text", "any", () => true],
  compare: ["Compare", null],
  vote: ["Vote", "vote", isVote],
  exchange: ["Exchange", "exchange", isExchange],
  batches: ["Batches", null],
  server: ["Server", null],
};

/** The view of the address, and what a link asks to be filled in: #compare=mix,base&prompt=… */
function place() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const view = [...asked.keys()].find((name) => name in VIEWS) ?? "chat";
  const models = (asked.get("compare") ?? "").split(",").filter(Boolean);
  return { view, link: models.length || asked.has("prompt") ? { models, prompt: asked.get("prompt") ?? "" } : null };
}

function App() {
  const [{ view, link }, go] = useState(place);
  const [models, setModels] = useState(null);
  const [chosen, choose] = useState({});
  const [changed, change] = useState({}); // model -> its settings, where they were touched
  const [problem, setProblem] = useState(null);
  const [asksKey, askKey] = useState(false);
  const [isDrawerOpen, openDrawer] = useState(() => innerWidth > 1100);

  const load = () => json("v1/models").then((answer) => {
    setModels(answer.data.filter((model) => model.kind !== "embedding"));
    setProblem(null);
  }, (error) => error.status !== 401 && setProblem(error.message));
  useEffect(() => {
    const moved = () => go(place());
    const refused = () => askKey(true);
    addEventListener("hashchange", moved);
    addEventListener("key-needed", refused);
    load();
    return () => {
      removeEventListener("hashchange", moved);
      removeEventListener("key-needed", refused);
    };
  }, []);

  const settingsOf = (model) => changed[model.id] ?? defaults(model);
  const modelOf = (name) => {
    const [, picker, fits] = VIEWS[name];
    if (!picker || !models) return null;
    const fitting = models.filter(fits);
    return fitting.find((model) => model.id === chosen[picker]) ?? mainOf(fitting);
  };
  const [, picker, fits] = VIEWS[view];
  const model = modelOf(view);
  const shown = (name, content) => html`<div hidden=${view !== name} key=${name}>${content}</div>`;
  const withModel = (name, Component, more = {}) => {
    const own = modelOf(name);
    return shown(name, (own || name !== "chat") && html`<${Component} models=${models} model=${own} settings=${own && settingsOf(own)} ...${more} />`);
  };
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); document.getElementById("main").focus(); }}>Skip to the content</a>
    <nav class="rail" aria-label="Views"><strong>ensemble</strong>
      ${Object.entries(VIEWS).map(([name, [title]]) => html`<a key=${name} href="#${name}" aria-current=${view === name ? "page" : null}>${title}</a>`)}
      <a class="quiet" href="docs">API</a></nav>
    <header class="topbar">
      <h1>${VIEWS[view][0]}</h1>
      ${picker && models && model && html`<${ModelPicker} groups=${grouped(models.filter(fits))} value=${model.id}
        onChange=${(id) => choose({ ...chosen, [picker]: id })} />
        <button type="button" aria-expanded=${isDrawerOpen} aria-controls="drawer" onClick=${() => openDrawer(!isDrawerOpen)}>Settings</button>`}
      ${(key.get() || asksKey) && html`<button type="button" onClick=${() => askKey(true)}>Key</button>`}
    </header>
    <main id="main" tabindex="-1">
      ${problem && html`<p class="error" role="alert">${problem} <button type="button" onClick=${load}>Try again</button></p>`}
      ${models && html`
        ${withModel("chat", Chat)}
        ${modelOf("text") && withModel("text", Text)}
        ${shown("compare", html`<${Compare} models=${models} settingsOf=${settingsOf} link=${view === "compare" ? link : null} />`)}
        ${withModel("vote", Report, { what: "a vote" })}
        ${withModel("exchange", Report, { what: "an exchange" })}
        ${shown("batches", html`<${Batches} isActive=${view === "batches"} />`)}
        ${shown("server", html`<${Server} isActive=${view === "server"} models=${models} />`)}`}
    </main>
    ${model && isDrawerOpen && html`<aside id="drawer" class="drawer" aria-label="Settings"><header class="row"><h2>Settings of ${model.id}</h2>
      <button type="button" class="plain" aria-label="Close the settings" onClick=${() => openDrawer(false)}>✕</button></header>
      <${Settings} key=${model.id} model=${model} settings=${settingsOf(model)} onChange=${(settings) => change({ ...changed, [model.id]: settings })} /></aside>`}
    ${asksKey && html`<${KeyDialog} onClose=${() => { askKey(false); load(); }} />`}
    <div id="announcements" class="hidden" aria-live="polite"></div>`;
}

/** What a newcomer should see first: the average of the most members, else the first model. */
function mainOf(models) {
  const size = (model) => (model.ensemble?.method === "probability_average" ? model.ensemble.members.length : 0);
  return models.reduce((best, model) => (size(model) > size(best) ? model : best), models[0]) ?? null;
}

function KeyDialog({ onClose }) {
  const dialog = useRef(null);
  const [value, write] = useState(key.get());
  useEffect(() => dialog.current.showModal(), []);
  const save = (event) => {
    event.preventDefault();
    key.set(value.trim());
    onClose();
  };
  return html`<dialog ref=${dialog} aria-labelledby="key-title" onClose=${onClose}><form onSubmit=${save}>
    <h2 id="key-title">This server asks for a key</h2>
    <label>API key <input type="password" value=${value} autocomplete="off" autofocus onInput=${(event) => write(event.target.value)} /></label>
    <p class="quiet">It is kept for this tab only, and sent to this server only.</p>
    <div class="row"><button type="submit" class="primary">Use it</button><button type="button" onClick=${onClose}>Not now</button></div>
  </form></dialog>`;
}

document.getElementById("app").replaceChildren();
render(html`<${App} />`, document.getElementById("app"));
