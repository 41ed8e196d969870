// Chat: ask, stop, ask again, edit, and branch at any token. Earlier versions stay, one beside the other.

import { html, useEffect, useMemo, useRef, useState } from "./vendor/htm-preact.standalone.module.js";
import { ask, branchOf, newAnswer, stop } from "./answer.js";
import { AnswerView } from "./answerview.js";
import { download } from "./api.js";
import { add, choose, forget, keep, kept, messages, newConversation, path, siblings } from "./conversation.js";
import { markdown } from "./markdown.js";
import { chatRequest, defaults, textRequest } from "./models.js";
import { PromptBox } from "./prompting.js";

export function Chat({ models, model, settings }) {
  const [conversation, show] = useState(newConversation);
  const [draft, write] = useState("");
  const [problem, setProblem] = useState(null);
  const [live, setLive] = useState(null);
  const [, redraw] = useState(0);
  const end = useRef(null);
  const past = useMemo(kept, [conversation, live]);
  const shown = path(conversation);

  /** Asks below node `parent` and shows the answer; `beside`: together with that sibling. */
  const answerTo = async (parent, { answer, beside, by = model } = {}) => {
    try {
      answer ??= newAnswer(chatRequest(by, settings, messages(conversation, parent)));
    } catch (error) {
      setProblem(error.message);
      return;
    }
    setProblem(null);
    add(conversation, parent, { role: "assistant", text: "", model: by.id, answer, beside: beside?.id });
    setLive(answer);
    await ask(answer, { isSpoken: true });
    keep(conversation);
    setLive(null);
  };
  const say = (parent, text) => answerTo(add(conversation, parent, { role: "user", text }).id);
  const branch = (node) => (place, alternative) => {
    const by = models.find((one) => one.id === node.model) ?? model;
    const answer = branchOf(node.answer, place, alternative);
    answer.request = textRequest(by, by.id === model.id ? settings : defaults(by), [...answer.promptIds, ...answer.tokenIds]);
    answerTo(node.parent, { answer, by, beside: node });
  };
  const open = (other) => {
    if (live) stop(live);
    show(other);
  };
  useEffect(() => end.current?.scrollIntoView({ block: "nearest" }), [shown.length]);

  return html`<div class="chat">
    <div class="row conversations">
      <button type="button" onClick=${() => open(newConversation())}>New chat</button>
      ${past.length > 0 && html`<label>Earlier <select value=${past.some((one) => one.id === conversation.id) ? conversation.id : ""}
          onChange=${(event) => open(past.find((one) => one.id === event.target.value) ?? newConversation())}>
        <option value="">this one</option>
        ${past.map((one) => html`<option key=${one.id} value=${one.id}>${one.title || "untitled"}</option>`)}</select></label>`}
      ${shown.length > 0 && html`<button type="button" onClick=${() => download("chat.json", JSON.stringify(shown.map(({ role, text, answer }) =>
          ({ role, content: answer ? answer.text : text })), null, 2))}>Download</button>
        <button type="button" onClick=${() => { forget(conversation); open(newConversation()); }}>Delete</button>`}
      <span class="quiet">Chats stay in this browser.</span>
    </div>
    <div class="turns">
      ${shown.length === 0 && html`<${Welcome} model=${model} onTry=${write} />`}
      ${shown.map((node) => html`<${Turn} key=${node.id} node=${node} others=${siblings(conversation, node.parent)} isBusy=${live !== null}
        beside=${conversation.nodes[node.beside]}
        onChoose=${(other) => { choose(conversation, other); redraw((n) => n + 1); }}
        onEdit=${(text) => say(node.parent, text)} onRetry=${() => answerTo(node.parent)}
        onRerun=${() => answerTo(node.parent, { beside: node })} onBranch=${branch} />`)}
      <div ref=${end}></div>
    </div>
    ${problem && html`<p class="error" role="alert">${problem}</p>`}
    <${PromptBox} label="Message" value=${draft} onInput=${write} isLive=${live !== null} onStop=${() => stop(live)}
      onSend=${() => { write(""); say(shown.at(-1)?.id ?? null, draft); }} />
  </div>`;
}

const EXAMPLES = ["What is the capital of France?", "Write a Python function that adds two numbers.", "Shall I compare thee to a summer's day?"];

function Welcome({ model, onTry }) {
  const members = model?.ensemble?.members ?? [];
  return html`<div class="welcome"><h2>See an ensemble think</h2>
    <p>${members.length > 1
      ? html`<b>${model.id}</b> answers as ${members.length} models together: ${members.join(", ")}. Ask, and look at who drove each word.`
      : "Ask, and look at how sure the model was of each word."}</p>
    <ul class="row">${EXAMPLES.map((text) => html`<li key=${text}><button type="button" onClick=${() => onTry(text)}>${text}</button></li>`)}</ul></div>`;
}

function Turn({ node, others, beside, isBusy, onChoose, onEdit, onRetry, onRerun, onBranch }) {
  const [edited, edit] = useState(null);
  const place = others.indexOf(node);
  const versions = others.length > 1 && html`<span class="versions">
    <button type="button" aria-label="Earlier version" disabled=${isBusy || place === 0} onClick=${() => onChoose(others[place - 1])}>‹</button>
    ${place + 1}/${others.length}
    <button type="button" aria-label="Later version" disabled=${isBusy || place === others.length - 1} onClick=${() => onChoose(others[place + 1])}>›</button></span>`;
  if (node.role === "user") {
    return html`<section class="turn user" aria-label="You">
      ${edited === null ? html`<div class="said raw">${node.text}</div>`
        : html`<${PromptBox} label="Edited message" value=${edited} onInput=${edit} onSend=${() => { edit(null); onEdit(edited); }} />`}
      <div class="row">${versions}<button type="button" disabled=${isBusy} onClick=${() => edit(edited === null ? node.text : null)}>
        ${edited === null ? "Edit" : "Leave as it was"}</button></div></section>`;
  }
  const view = (one, buttons) => html`<div class="version"><h3>${one.model ?? "answer"}</h3>
    ${one.answer
      ? html`<${AnswerView} answer=${one.answer} onBranch=${one.answer.promptIds ? onBranch(one) : null}>${buttons}<//>`
      : html`<article class="answer"><div class="prose">${markdown(one.text)}</div><footer class="row">${buttons}</footer></article>`}</div>`;
  return html`<section class="turn assistant ${beside ? "columns" : ""}" aria-label="Answer">
    ${beside && view(beside)}
    ${view(node, html`${versions}
      <button type="button" disabled=${isBusy} onClick=${onRetry}>Retry</button>
      <button type="button" disabled=${isBusy} onClick=${onRerun} title="A second answer beside this one, with the settings as they are now">Rerun with these</button>`)}
  </section>`;
}
