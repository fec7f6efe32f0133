// The three ways to the worker, with stand-ins for socket, fetch and MQTT.js. The real ones: test_real_broker.py and the gateway's tests.
import assert from "node:assert/strict";
import test, { beforeEach, mock } from "node:test";
import { EventEmitter } from "node:events";

import { ask, overFetch, overMqtt, overWebSocket } from "../../clients/js/lmd.js";

const settled = () => new Promise((resolve) => setImmediate(resolve));
const END = { type: "done", seq: 2, final: true, finish_reason: "stop", full_content: "ab" };

beforeEach(() => {
  mock.timers.reset();
  mock.timers.enable({ apis: ["setInterval", "setTimeout", "Date"], now: 1e12 });
});

// --- WebSocket ---

class HandSocket {
  static all = [];
  readyState = 0;
  frames = [];
  constructor(url, protocols) {
    Object.assign(this, { url, protocols });
    HandSocket.all.push(this);
  }
  send(text) {
    this.frames.push(JSON.parse(text));
  }
  accept() {
    this.readyState = 1;
    this.onopen();
  }
  say(event) {
    this.onmessage({ data: typeof event === "string" ? event : JSON.stringify(event) });
  }
  close(code) {
    this.readyState = 3;
    this.code = code;
    this.onclose();
  }
}

function socketBus(options) {
  HandSocket.all = [];
  return overWebSocket("ws://gateway/ws", { Socket: HandSocket, ...options });
}

test("a WebSocket is opened with the first request and carries all of them", async () => {
  const bus = socketBus();
  assert.equal(HandSocket.all.length, 0);
  const [one, two] = [ask(bus, { session: "s", prompt: "1" }), ask(bus, { session: "t", prompt: "2" })];
  const [socket] = HandSocket.all;
  assert.equal(HandSocket.all.length, 1);
  assert.deepEqual(socket.frames, []);
  socket.accept();
  assert.deepEqual(socket.frames[0], { type: "request", session: "s", prompt: "1", request_id: one.requestId });
  socket.say({ ...END, request_id: two.requestId, full_content: "second" });
  socket.say("no JSON");
  socket.say({ type: "ack", action: "cancel" });
  socket.say({ ...END, request_id: one.requestId });
  assert.equal((await one.done).content, "ab");
  assert.equal((await two.done).content, "second");
});

test("a cancel goes over the WebSocket as a control", async () => {
  const bus = socketBus();
  const asked = ask(bus, { session: "s", prompt: "1" });
  HandSocket.all[0].accept();
  asked.cancel();
  assert.deepEqual(HandSocket.all[0].frames[1], { type: "control", session: "s", action: "cancel", request_id: asked.requestId });
});

test("a lost WebSocket is opened again with growing pauses, and the request goes out again as it was", () => {
  const states = [];
  const bus = socketBus({ onState: (state) => states.push(state) });
  ask(bus, { session: "s", prompt: "1" });
  HandSocket.all[0].accept();
  HandSocket.all[0].close();
  for (let half = 0; half < 4; half += 1) mock.timers.tick(250);
  assert.equal(HandSocket.all.length, 2);
  HandSocket.all[1].close();
  mock.timers.tick(200);
  assert.equal(HandSocket.all.length, 2, "the second pause is longer");
  mock.timers.tick(800);
  HandSocket.all[2].accept();
  assert.deepEqual(HandSocket.all[2].frames, HandSocket.all[0].frames);
  assert.deepEqual(states, ["up", "down", "down", "up"]);
});

test("a WebSocket that nobody needs is not opened again", () => {
  const bus = socketBus();
  const asked = ask(bus, { session: "s", prompt: "1" });
  HandSocket.all[0].accept();
  HandSocket.all[0].say({ ...END, request_id: asked.requestId });
  HandSocket.all[0].close();
  mock.timers.tick(60_000);
  assert.equal(HandSocket.all.length, 1);
});

test("a WebSocket that says nothing for three heartbeats is replaced by another one", () => {
  const bus = socketBus();
  const asked = ask(bus, { session: "s", prompt: "1" });
  HandSocket.all[0].accept();
  HandSocket.all[0].say({ type: "start", request_id: asked.requestId });
  for (let second = 0; second < 46; second += 1) mock.timers.tick(1000);
  assert.equal(HandSocket.all.length, 2);
  assert.equal(HandSocket.all[0].code, 4000, "after a plain close the gateway would cancel the answers of all who share the socket");
  HandSocket.all[1].accept();
  assert.deepEqual(HandSocket.all[1].frames, HandSocket.all[0].frames);
});

test("a WebSocket that was closed stays closed, also where an answer was under way", async () => {
  const bus = socketBus();
  const options = { offlineS: 60 };
  const [one, two] = [ask(bus, { session: "s", prompt: "1" }, options), ask(bus, { session: "s", prompt: "2" }, options)];
  HandSocket.all[0].accept();
  HandSocket.all[0].say({ type: "start", request_id: one.requestId });
  bus.close();
  two.cancel();
  assert.equal((await two.done).end.finish_reason, "cancelled");
  for (let second = 0; second < 61; second += 1) mock.timers.tick(1000);
  assert.equal((await one.done).end.code, "offline");
  assert.equal(HandSocket.all.length, 1);
});

// --- fetch ---

/** A response whose body the test writes. */
function streamed(status = 200) {
  const response = { ok: status < 400, status, statusText: "As said" };
  response.body = new ReadableStream({ start: (controller) => (response.controller = controller) });
  response.say = (text) => response.controller.enqueue(new TextEncoder().encode(text));
  response.text = () => new Response(response.body).text();
  return response;
}

test("server-sent events are read across the borders of packets and characters", async () => {
  const response = streamed();
  const calls = [];
  const bus = overFetch("/ask/events", { headers: { authorization: "Bearer k" }, fetch: async (...given) => (calls.push(given), response) });
  const asked = ask(bus, { session: "s", prompt: "1" });
  await settled();
  const [[url, { method, headers, body }]] = calls;
  assert.deepEqual([url, method, headers.authorization, headers["idempotency-key"]], ["/ask/events", "POST", "Bearer k", asked.requestId]);
  assert.deepEqual(JSON.parse(body), { session_id: "s", prompt: "1", request_id: asked.requestId });
  const bytes = new TextEncoder().encode(
    `: keep-alive\n\ndata: ${JSON.stringify({ type: "chunk", request_id: asked.requestId, seq: 0, content: "größer 🌊" })}\r\n\r\n` +
      `data: ${JSON.stringify({ ...END, request_id: asked.requestId, full_content: "größer 🌊" })}\n\n`,
  );
  for (const byte of bytes) response.controller.enqueue(new Uint8Array([byte]));
  assert.equal((await asked.done).content, "größer 🌊");
});

test("a refused POST ends the answer with the code that the body names", async () => {
  const response = streamed(429);
  const asked = ask(overFetch("/ask/events", { fetch: async () => response }), { prompt: "1" });
  response.say(JSON.stringify({ type: "error", request_id: null, code: "busy", message: "The queue is full.", retry_after_s: 3 }));
  response.controller.close();
  const { end } = await asked.done;
  assert.deepEqual([end.code, end.message, end.retry_after_s, end.made_here], ["busy", "The queue is full.", 3, false]);
});

test("a refused POST without a body that can be read tells the status", async () => {
  const response = streamed(502);
  const asked = ask(overFetch("/ask/events", { fetch: async () => response }), { prompt: "1" });
  response.say("<html>Bad gateway</html>");
  response.controller.close();
  const { end } = await asked.done;
  assert.deepEqual([end.code, end.message], ["http_502", "As said"]);
});

test("what a callback throws over POST is told to the program, and does not break off the answer", async () => {
  let posts = 0;
  const response = streamed();
  const bus = overFetch("/ask/events", { fetch: async () => ((posts += 1), response) });
  const asked = ask(bus, { prompt: "1" }, { onNews: () => { throw new Error("of the program"); } });
  const told = [];
  process.setUncaughtExceptionCaptureCallback((error) => told.push(error.message));
  try {
    await settled();
    response.say(`data: ${JSON.stringify({ type: "start", request_id: asked.requestId })}\n\n`);
    response.say(`data: ${JSON.stringify({ ...END, request_id: asked.requestId })}\n\n`);
    assert.equal((await asked.done).content, "ab");
    await settled();
  } finally {
    process.setUncaughtExceptionCaptureCallback(null);
  }
  assert.deepEqual([told, posts], [["of the program", "of the program"], 1]);
});

test("a stream that breaks off is asked for again, and the text is neither lost nor doubled", async () => {
  const responses = [streamed(), streamed()];
  const bodies = [];
  const bus = overFetch("/ask/events", { fetch: async (_, { body }) => (bodies.push(body), responses[bodies.length - 1]) });
  const told = [];
  const asked = ask(bus, { prompt: "1" }, { onNews: ({ content }) => told.push(content) });
  await settled();
  responses[0].say(`data: ${JSON.stringify({ type: "chunk", request_id: asked.requestId, seq: 0, content: "a" })}\n\n`);
  await settled();
  responses[0].controller.error(new Error("cut"));
  await settled();
  mock.timers.tick(1000);
  await settled();
  assert.equal(bodies.length, 2);
  assert.equal(bodies[0], bodies[1]);
  responses[1].say(`data: ${JSON.stringify({ ...END, request_id: asked.requestId })}\n\n`);
  await asked.done;
  assert.equal(told.join(""), "ab");
});

/** Lets the clock run, and what is done meanwhile. */
async function pass(seconds) {
  for (let second = 0; second < seconds; second += 1) {
    for (let turn = 0; turn < 10; turn += 1) await settled();
    mock.timers.tick(1000);
  }
}

test("a gateway that is away is waited for, and that has an end", async () => {
  let there = false;
  const answer = async (_, { body }) => {
    if (!there) throw new TypeError("Failed to fetch");
    return new Response(`data: ${JSON.stringify({ ...END, request_id: JSON.parse(body).request_id })}\n\n`);
  };
  const bus = overFetch("/ask/events", { fetch: answer });
  const given = ask(bus, { prompt: "1" });
  await pass(290);
  there = true;
  await pass(3);
  assert.equal((await given.done).content, "ab");
  there = false;
  const away = ask(bus, { prompt: "1" });
  await pass(302);
  assert.equal((await away.done).end.code, "offline");
});

test("a server that answers with another page is not asked for ever", async () => {
  let posts = 0;
  const bus = overFetch("/ask/events", { fetch: async () => ((posts += 1), new Response("<html>A page</html>")) });
  const asked = ask(bus, { prompt: "1" });
  await pass(10);
  assert.equal((await asked.done).end.code, "lost");
  assert.equal(posts, 5);
});

test("a cancel over POST is a request of its own, and the answer ends with what the worker says", async () => {
  const response = streamed();
  const calls = [];
  const answer = async (url, given) => (calls.push([url, given]), url.endsWith("control") ? new Response("{}") : response);
  const asked = ask(overFetch("https://host/llm/ask/events", { headers: { authorization: "Bearer k" }, fetch: answer }), { session: "s", prompt: "1" });
  await settled();
  asked.cancel();
  await settled();
  const [[, { signal }], [url, { method, headers, body }]] = calls;
  assert.deepEqual([url, method, headers.authorization], ["https://host/llm/control", "POST", "Bearer k"]);
  assert.deepEqual(JSON.parse(body), { session_id: "s", action: "cancel", request_id: asked.requestId });
  assert.equal(signal.aborted, false);
  response.say(`data: ${JSON.stringify({ ...END, request_id: asked.requestId, finish_reason: "cancelled" })}\n\n`);
  const { end, content } = await asked.done;
  assert.deepEqual([end.made_here, content], [undefined, "ab"]);
  assert.equal(calls.length, 2);
});

test("a cancel over POST that reaches nobody ends the answer here", async () => {
  const response = streamed();
  const answer = async (url) => {
    if (url === "/control") throw new TypeError("Failed to fetch");
    return response;
  };
  const asked = ask(overFetch("/ask/events", { fetch: answer }), { prompt: "1" });
  await settled();
  response.say(`data: ${JSON.stringify({ type: "chunk", request_id: asked.requestId, seq: 0, content: "a" })}\n\n`);
  await settled();
  asked.cancel();
  await pass(17);
  const { end, content } = await asked.done;
  assert.deepEqual([end.finish_reason, end.made_here, content], ["cancelled", true, "a"]);
});

test("under another address a cancel closes the HTTP request, which is how the gateway learns of it", async () => {
  let signal;
  const bus = overFetch("/api/chat", { fetch: async (_, given) => ((signal = given.signal), streamed()) });
  const asked = ask(bus, { prompt: "1" });
  await settled();
  asked.cancel();
  assert.equal(signal.aborted, true);
  assert.equal((await asked.done).end.finish_reason, "cancelled");
});

// --- MQTT.js ---

class HandClient extends EventEmitter {
  connected = true;
  did = [];
  subscribe(topic, { qos }, callback) {
    this.did.push(["subscribe", topic, qos]);
    this.granted = callback;
  }
  unsubscribe(topic) {
    this.did.push(["unsubscribe", topic]);
  }
  publish(topic, payload, { qos }) {
    this.did.push(["publish", topic, qos, JSON.parse(payload)]);
  }
}

test("over MQTT the request is published after the subscription was granted, and the topic is given back at the end", async () => {
  const client = new HandClient();
  const bus = overMqtt(client, { root: "home/llm" });
  const asked = ask(bus, { session: "s", prompt: "1" });
  assert.deepEqual(client.did, [["subscribe", "home/llm/reply/s", 1]]);
  client.granted(null, [{ qos: 1 }]);
  assert.deepEqual(client.did[1], ["publish", "home/llm/request/s", 1, { prompt: "1", request_id: asked.requestId }]);
  const payload = (event) => new TextEncoder().encode(JSON.stringify({ request_id: asked.requestId, ...event }));
  client.emit("message", "home/llm/reply/s", payload({ ...END, full_content: "retained" }), { retain: true });
  client.emit("message", "home/llm/reply/other", payload({ ...END, full_content: "another" }), { retain: false });
  client.emit("message", "home/llm/reply/s", new TextEncoder().encode("no JSON"), { retain: false });
  client.emit("message", "home/llm/reply/s", payload(END), { retain: false });
  assert.equal((await asked.done).content, "ab");
  assert.deepEqual(client.did.at(-1), ["unsubscribe", "home/llm/reply/s"]);
});

test("over MQTT a subscription that the broker refuses ends the answer with a sentence", async () => {
  const client = new HandClient();
  const asked = ask(overMqtt(client), { session: "s", prompt: "1" });
  client.granted(null, [{ qos: 128 }]);
  const { end } = await asked.done;
  assert.equal(end.code, "not_permitted");
  assert.match(end.message, /llm\/reply\/s/);
});

test("after a lost connection it subscribes first and asks then", () => {
  const client = new HandClient();
  ask(overMqtt(client), { session: "s", prompt: "1" });
  client.granted(null, [{ qos: 1 }]);
  client.emit("close");
  client.emit("connect");
  assert.deepEqual(client.did.map(([what]) => what), ["subscribe", "publish", "subscribe"]);
  client.granted(null, [{ qos: 1 }]);
  assert.deepEqual(client.did.map(([what]) => what), ["subscribe", "publish", "subscribe", "publish"]);
});
