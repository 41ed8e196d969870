// The official `openai` package against /v1/responses.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.SERVER}/v1`, apiKey: "none", maxRetries: 0 });
const WEATHER = { type: "function", name: "weather", strict: false,
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } };

const whole = await client.responses.create({ model: "mix", input: "Say hello." });
assert.equal(whole.output_text, "Hello world");
assert.equal(whole.usage.output_tokens, 4);

const types = [];
let text = "";
for await (const event of await client.responses.create({ model: "mix", input: "Say hello.", stream: true })) {
  assert.equal(event.sequence_number, types.length);
  types.push(event.type);
  if (event.type === "response.output_text.delta") text += event.delta;
}
assert.equal(text, "Hello world");
assert.equal(types.at(-1), "response.completed");

const helper = client.responses.stream({ model: "mix", input: "Say hello." });
assert.equal((await helper.finalResponse()).output_text, "Hello world");

const next = await client.responses.create({ model: "mix", input: "Again.", previous_response_id: whole.id });
assert.equal(next.previous_response_id, whole.id);
assert.equal((await client.responses.retrieve(whole.id)).id, whole.id);
await client.responses.delete(whole.id);
await assert.rejects(client.responses.retrieve(whole.id), OpenAI.NotFoundError);

const called = await client.responses.create({ model: "caller", input: "Weather in Oslo?", tools: [WEATHER] });
const call = called.output.find((item) => item.type === "function_call");
assert.deepEqual(JSON.parse(call.arguments), { city: "Oslo" });
const answered = await client.responses.create({ model: "caller", tools: [WEATHER],
  input: [{ role: "user", content: "Weather in Oslo?" }, ...called.output,
    { type: "function_call_output", call_id: call.call_id, output: "sunny" }] });
assert.equal(answered.output_text, "It is sunny.");

const thought = await client.responses.create({ model: "thinker", input: "9 * 2?" });
assert.equal(thought.output[0].content[0].text, "Nine times two.");
assert.equal(thought.output_text, "18");

const explained = await client.responses.create({ model: "mix", input: "?", ensemble: { explain: true } });
assert.equal(explained.output[0].content[0].logprobs[0].members.mix.weight, 1);

await assert.rejects(client.responses.create({ model: "mixx", input: "?" }), OpenAI.NotFoundError);
await assert.rejects(async () => {
  for await (const _ of await client.responses.create({ model: "dies", input: "?", stream: true }));
}, OpenAI.APIError);
console.log("ok");
