// The models that the server lists, by kind, and what a request may change of each.

const GROUPS = [
  ["probability_average", "Averages of next-token distributions"],
  ["routing", "Routers"],
  ["crowd_vote", "Crowd votes"],
  ["majority", "Majority votes"],
  ["ranking", "Rankings"],
  ["exchange_of_thought", "Exchanges of thought"],
  ["answer_fusion", "Fusions of answers"],
];

export const methodOf = (model) => model?.ensemble?.method ?? null;

/** Whether each of its tokens is explained, with every member's view. */
export const hasTokens = (model) => model?.explains_tokens ?? false;

/** Whether its answers stand for votes that can be compared with each other. */
export const isVote = (model) => ["crowd_vote", "majority", "ranking"].includes(methodOf(model));

export const isExchange = (model) => methodOf(model) === "exchange_of_thought";

/** [[title, models], …] for a picker. */
export function grouped(models) {
  const ofMethod = (method) => models.filter((model) => methodOf(model) === method);
  const known = new Set(GROUPS.map(([method]) => method));
  const rest = models.filter((model) => methodOf(model) && !known.has(methodOf(model)));
  const singles = models.filter((model) => !methodOf(model));
  return [
    ...GROUPS.map(([method, title]) => [title, ofMethod(method)]),
    ["Other ensembles", rest],
    ["Single models", singles.filter((model) => model.kind !== "remote")],
    ["Remote models", singles.filter((model) => model.kind === "remote")],
  ].filter(([, found]) => found.length);
}

/** What is asked of `model` unless the person changes it. Weights, pool and share are the config's. */
export function defaults(model) {
  const ensemble = model?.ensemble ?? {};
  return { temperature: 0.7, top_p: 1, seed: "", max_tokens: 256, system: "", explain: true,
    weights: { ...(ensemble.weights ?? {}) }, pool: ensemble.pool ?? null, share: ensemble.share ?? 0, more: "" };
}

/** The request's `ensemble` object: what differs from the config. Throws if `more` is no JSON object. */
export function ensembleObject(model, settings) {
  const standard = defaults(model);
  const asked = {};
  if (settings.explain) asked.explain = hasTokens(model) ? { top: 5 } : true;
  if (JSON.stringify(settings.weights) !== JSON.stringify(standard.weights)) asked.weights = settings.weights;
  if (settings.pool !== standard.pool) asked.pool = settings.pool;
  if (settings.pool === "posterior" && (settings.share !== standard.share || asked.pool)) asked.share = settings.share;
  if (settings.more.trim()) {
    let more;
    try {
      more = JSON.parse(settings.more);
    } catch (error) {
      throw new Error(`"More" is no JSON: ${error.message}`);
    }
    if (typeof more !== "object" || more === null || Array.isArray(more)) throw new Error('"More" must be a JSON object');
    Object.assign(asked, more);
  }
  return asked;
}

/** What chats and raw texts share of a request's body. */
export function sampling(model, settings) {
  const ensemble = ensembleObject(model, settings);
  const body = { temperature: settings.temperature, top_p: settings.top_p, max_tokens: settings.max_tokens };
  if (settings.seed !== "") body.seed = Number(settings.seed);
  if (Object.keys(ensemble).length) body.ensemble = ensemble;
  return hasTokens(model) ? { ...body, return_token_ids: true } : body;
}

export function chatRequest(model, settings, messages) {
  const logprobs = settings.explain && hasTokens(model) ? { logprobs: true, top_logprobs: 10 } : {};
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  return { path: "v1/chat/completions",
    body: { model: model.id, messages: [...system, ...messages], ...sampling(model, settings), ...logprobs } };
}

/** `prompt`: a text or token ids. */
export function textRequest(model, settings, prompt) {
  const logprobs = settings.explain && hasTokens(model) ? { logprobs: 10 } : {};
  return { path: "v1/completions", body: { model: model.id, prompt, ...sampling(model, settings), ...logprobs } };
}
