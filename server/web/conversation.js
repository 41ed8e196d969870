// A conversation is a tree: what was asked again or edited stands beside what was there. It stays in this browser.

const STORE = "ensemble.conversations";
const MAX_KEPT = 30;

let count = 0;
const newId = () => `${Date.now().toString(36)}-${(count += 1)}`;

export const newConversation = () => ({ id: newId(), title: "", nodes: {}, chosen: {} });

/** Adds a node under `parent` (null: at the beginning) and shows it. `node`: {role, text, answer?, model?}. */
export function add(conversation, parent, node) {
  const added = { ...node, id: newId(), parent };
  conversation.nodes[added.id] = added;
  conversation.chosen[parent] = added.id;
  if (!conversation.title && node.role === "user") conversation.title = node.text.slice(0, 60);
  return added;
}

export const siblings = (conversation, parent) =>
  Object.values(conversation.nodes).filter((node) => node.parent === parent);

/** The nodes that are shown, from the first to the last. */
export function path(conversation) {
  const shown = [];
  for (let id = conversation.chosen[null]; id; id = conversation.chosen[id]) shown.push(conversation.nodes[id]);
  return shown;
}

export const choose = (conversation, node) => (conversation.chosen[node.parent] = node.id);

/** What a model is told to answer below `id`: everything from the beginning to that node. */
export function messages(conversation, id) {
  const told = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) {
    told.unshift({ role: node.role, content: node.answer ? node.answer.text : node.text });
  }
  return told;
}

/** All that were kept, newest first. What cannot be read is left out. */
export function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return Array.isArray(found) ? found.filter((one) => one?.id && one.nodes && one.chosen) : [];
  } catch {
    return [];
  }
}

/** Keeps the texts, not the tokens: these take hundreds of bytes each. A full store forgets the oldest first. */
export function keep(conversation) {
  const nodes = Object.fromEntries(Object.entries(conversation.nodes).map(([id, { answer, ...node }]) =>
    [id, { ...node, text: answer ? answer.text : node.text }]));
  let all = [{ ...conversation, nodes }, ...kept().filter((one) => one.id !== conversation.id)].slice(0, MAX_KEPT);
  while (all.length) {
    try {
      localStorage.setItem(STORE, JSON.stringify(all));
      return;
    } catch {
      all = all.slice(0, -1);
    }
  }
}

export const forget = (conversation) =>
  localStorage.setItem(STORE, JSON.stringify(kept().filter((one) => one.id !== conversation.id)));
