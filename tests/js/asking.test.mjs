// ask(): the client rules of the protocol, at a clock set by the test.
import assert from "node:assert/strict";
import test, { beforeEach, mock } from "node:test";

import { ask, llmAPI } from "../../clients/js/lmd.js";

/** A bus without a network: keeps what is sent, says what the test says. */
class HandBus {
  sent = [];
  controls = [];
  opened = 0;
  open(entry) {
    this.entry = entry;
    this.opened += 1;
    entry.up();
    return () => (this.opened -= 1);
  }
  send(_entry, body) {
    this.sent.push(JSON.stringify(body));
  }
  control(session, body) {
    this.controls.push({ session, ...body });
  }
  say(...events) {
    const { request_id } = JSON.parse(this.sent[0]);
    for (const event of events) this.entry.event({ request_id, ...event });
  }
}

const chunk = (seq, content) => ({ type: "chunk", seq, content });
const END = { type: "done", seq: 2, final: true, finish_reason: "stop", full_content: "ab" };
let bus;

beforeEach(() => {
  mock.timers.reset();
  mock.timers.enable({ apis: ["setInterval", "setTimeout", "Date"], now: 1e12 });
  bus = new HandBus();
});

const wait = (seconds) => {
  for (let half = 0; half < seconds * 2; half += 1) mock.timers.tick(500);
};

test("a request is sent once and its answer told as it comes", async () => {
  const told = [];
  const asked = ask(bus, { session: "s", prompt: "Hello" }, { onNews: ({ content }) => told.push(content) });
  assert.deepEqual(JSON.parse(bus.sent[0]), { prompt: "Hello", request_id: asked.requestId });
  bus.say({ type: "start" }, chunk(0, "a"), chunk(1, "b"), END);
  const { end, content } = await asked.done;
  assert.equal(end.finish_reason, "stop");
  assert.equal(content, "ab");
  assert.deepEqual(told, ["", "a", "b", ""]);
  wait(200);
  assert.equal(bus.sent.length, 1);
  assert.equal(bus.opened, 0);
});

test("a hole is asked about at once, with the same bytes, and then less and less often", () => {
  ask(bus, { prompt: "Hello" });
  wait(1);
  bus.say({ type: "start" }, chunk(0, "a"), chunk(2, "c"));
  assert.equal(bus.sent.length, 2);
  assert.equal(bus.sent[1], bus.sent[0]);
  bus.say(chunk(3, "d"), chunk(4, "e"));
  assert.equal(bus.sent.length, 2, "further chunks behind the hole change nothing");
  wait(8);
  assert.ok(bus.sent.length >= 4 && bus.sent.length <= 6, `${bus.sent.length}`);
});

test("an answer whose hole cannot be filled is lost, and says so", async () => {
  const asked = ask(bus, { prompt: "Hello" });
  bus.say({ type: "start" }, chunk(0, "a"), chunk(2, "c"));
  wait(60);
  const { end } = await asked.done;
  assert.equal(end.code, "lost");
  assert.equal(end.partial_content, "a");
  assert.equal(end.made_here, true);
});

test("three heartbeats of silence send the request again, and a ping is a sign of life", () => {
  ask(bus, { prompt: "Hello" });
  bus.say({ type: "start" });
  wait(44);
  assert.equal(bus.sent.length, 1);
  bus.say({ type: "ping", state: "prompt" });
  wait(44);
  assert.equal(bus.sent.length, 1);
  wait(2);
  assert.equal(bus.sent.length, 2);
});

test("without any event the request is sent three times, then there is no worker", async () => {
  const asked = ask(bus, { prompt: "Hello" });
  wait(16);
  assert.equal(bus.sent.length, 3);
  assert.equal((await asked.done).end.code, "no_worker");
});

test("a connection that comes back sends the request again; the snapshot tells what was lost meanwhile", async () => {
  const asked = ask(bus, { prompt: "Hello" });
  bus.say({ type: "start" }, chunk(0, "a"));
  bus.entry.down();
  wait(100);
  assert.equal(bus.sent.length, 1, "nothing is sent where nothing is connected");
  bus.entry.up();
  assert.equal(bus.sent.length, 2);
  bus.say({ type: "snapshot", content: "abc", next_seq: 3 }, chunk(3, "d"), { ...END, seq: 4, full_content: "abcd" });
  assert.equal((await asked.done).content, "abcd");
});

test("a connection that stays away is given up", async () => {
  const asked = ask(bus, { prompt: "Hello" });
  bus.entry.down();
  wait(301);
  assert.equal((await asked.done).end.code, "offline");
});

test("a request that ends every connection is given up", async () => {
  const asked = ask(bus, { prompt: "x".repeat(3e6) });
  for (let connection = 0; connection < 10; connection += 1) {
    bus.entry.down();
    bus.entry.up();
  }
  assert.equal((await asked.done).end.code, "lost");
  assert.equal(bus.sent.length, 5);
});

test("connections that are lost again and again end no answer that goes on meanwhile", async () => {
  const asked = ask(bus, { prompt: "Hello" });
  for (let seq = 0; seq < 10; seq += 1) {
    bus.say(chunk(seq, "a"));
    bus.entry.down();
    wait(200);
    bus.entry.up();
  }
  bus.say({ ...END, seq: 10, full_content: "a".repeat(10) });
  assert.equal((await asked.done).content, "a".repeat(10));
});

test("a signal cancels on the worker, and the answer ends with the text so far", async () => {
  const abort = new AbortController();
  const asked = ask(bus, { session: "s", prompt: "Hello" }, { signal: abort.signal });
  bus.say({ type: "start" }, chunk(0, "a"));
  abort.abort();
  abort.abort();
  assert.deepEqual(bus.controls, [{ session: "s", action: "cancel", request_id: asked.requestId }]);
  bus.say({ ...END, seq: 1, finish_reason: "cancelled", full_content: "a" });
  assert.equal((await asked.done).end.finish_reason, "cancelled");
});

test("a cancel that nobody answers ends all the same", async () => {
  const asked = ask(bus, { prompt: "Hello" });
  bus.say({ type: "start" }, chunk(0, "a"));
  asked.cancel();
  wait(16);
  const { end } = await asked.done;
  assert.deepEqual([end.finish_reason, end.full_content, end.made_here], ["cancelled", "a", true]);
});

test("a cancel that was lost with the connection is said again over the next one", async () => {
  const asked = ask(bus, { session: "s", prompt: "Hello" });
  bus.say({ type: "start" }, chunk(0, "a"));
  asked.cancel();
  bus.entry.down();
  wait(2);
  bus.entry.up();
  const cancel = { session: "s", action: "cancel", request_id: asked.requestId };
  assert.deepEqual(bus.controls, [cancel, cancel]);
  bus.say({ ...END, seq: 1, finish_reason: "cancelled", full_content: "a" });
  assert.equal((await asked.done).end.made_here, undefined);
});

test("a cancel without a connection ends at once", async () => {
  const asked = ask(bus, { prompt: "Hello" });
  bus.entry.down();
  asked.cancel();
  assert.equal((await asked.done).end.finish_reason, "cancelled");
});

test("a request whose signal was aborted before is never sent", async () => {
  const asked = ask(bus, { prompt: "Hello" }, { signal: AbortSignal.abort() });
  assert.equal((await asked.done).end.finish_reason, "cancelled");
  assert.equal(bus.sent.length, 0);
});

test("chatStream tells chunks, then the end once", async () => {
  const told = [];
  const stop = llmAPI(bus).chatStream(
    { messages: [{ role: "user", content: "Hello" }], temperature: 0.5 },
    (text) => told.push(text),
    (end) => told.push(end.finish_reason),
    (error) => told.push(error),
  );
  const { request_id: _, ...body } = JSON.parse(bus.sent[0]);
  assert.deepEqual(body, { messages: [{ role: "user", content: "Hello" }], temperature: 0.5 });
  bus.say({ type: "start" }, chunk(0, "a"), chunk(1, "b"), END, END);
  await stop;
  assert.deepEqual(told, ["a", "b", "stop"]);
});

test("chatSessionStream asks in the session, and tells an error with its code", async () => {
  const told = [];
  const stop = llmAPI(bus).chatSessionStream(
    { session_id: "my-session-123", message: "Hello", system_prompt: "Be brief.", max_tokens: 9 },
    (text) => told.push(text),
    () => told.push("complete"),
    (error) => told.push(error),
  );
  assert.equal(bus.entry.session, "my-session-123");
  const { request_id: _, ...body } = JSON.parse(bus.sent[0]);
  assert.deepEqual(body, { prompt: "Hello", system_prompt: "Be brief.", max_tokens: 9 });
  bus.say({ type: "error", final: true, code: "busy", message: "The queue is full.", retryable: true, retry_after_s: 3 });
  await stop;
  const [error] = told;
  assert.equal(told.length, 1);
  assert.ok(error instanceof Error);
  assert.deepEqual([error.code, error.message, error.retryable, error.retry_after_s], ["busy", "The queue is full.", true, 3]);
});

test("what chatStream returns stops it", async () => {
  const told = [];
  const stop = llmAPI(bus).chatStream({ messages: [{ role: "user", content: "Hello" }] }, () => {}, (end) => told.push(end.finish_reason));
  stop();
  assert.equal(bus.controls[0].action, "cancel");
  bus.say({ ...END, finish_reason: "cancelled" });
  await stop;
  assert.deepEqual(told, ["cancelled"]);
});

test("a callback that throws does not keep the answer from its end", async () => {
  const asked = ask(bus, { prompt: "Hello" }, { onNews: () => { throw new Error("of the program"); } });
  const failing = () => bus.say(chunk(0, "a"));
  assert.throws(failing, /of the program/);
  assert.throws(() => bus.say({ ...END, seq: 1, full_content: "a" }), /of the program/);
  assert.equal((await asked.done).content, "a");
});
