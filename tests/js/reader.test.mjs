// The reader: events in, text out; what is missing, what is repeated, how it ends.
import assert from "node:assert/strict";
import test from "node:test";

import { Reader } from "../../clients/js/lmd.js";

const ID = "r1";
const chunk = (seq, content) => ({ type: "chunk", request_id: ID, seq, content });
const done = (seq, more) => ({ type: "done", request_id: ID, seq, final: true, finish_reason: "stop", ...more });
const PIECES = ["The sea", " says", " little, ", "größer", " 🌊"];
const WHOLE = PIECES.join("");

function read(events, reader = new Reader(ID)) {
  const told = events.map((event) => reader.feed(event)?.content ?? "").join("");
  return { reader, told };
}

test("the joined news are the answer", () => {
  const { reader, told } = read([
    { type: "queued", request_id: ID, position: 1, reason: "waiting" },
    { type: "start", request_id: ID, worker: "w" },
    ...PIECES.map((piece, seq) => chunk(seq, piece)),
    done(5, { full_content: WHOLE }),
  ]);
  assert.equal(told, WHOLE);
  assert.equal(reader.content, WHOLE);
  assert.equal(reader.end.finish_reason, "stop");
});

test("what comes twice is read once, and what is not ours not at all", () => {
  const events = PIECES.flatMap((piece, seq) => [chunk(seq, piece), chunk(seq, piece), { ...chunk(seq, "x"), request_id: "other" }]);
  const { reader, told } = read([...events, done(5, { full_content: WHOLE }), ...events, done(5, { full_content: "another" })]);
  assert.equal(told, WHOLE);
  assert.equal(reader.end.full_content, WHOLE);
});

test("a hole is seen, and a snapshot fills it", () => {
  const { reader, told } = read([chunk(0, "a"), chunk(2, "c")]);
  assert.equal(told, "a");
  assert.equal(reader.lacks, true);
  assert.equal(reader.feed({ type: "snapshot", request_id: ID, content: "abc", next_seq: 3 }).content, "bc");
  assert.equal(reader.lacks, false);
  assert.equal(reader.feed(chunk(3, "d")).content, "d");
  assert.equal(reader.content, "abcd");
});

test("chunks that are published again fill a hole where the snapshot was too large", () => {
  const { reader } = read([chunk(0, "a"), chunk(2, "c"), { type: "snapshot", request_id: ID, content: "", next_seq: 3, content_omitted: true }]);
  assert.equal(reader.lacks, false, "asking again would bring the same");
  read([chunk(0, "a"), chunk(1, "b"), chunk(2, "c"), done(3, { content_omitted: true })], reader);
  assert.equal(reader.content, "abc");
  assert.equal(reader.end.type, "done");
});

test("an end without its text does not end an answer that lacks a part of it", () => {
  const { reader } = read([chunk(0, "a"), chunk(2, "c"), done(3, { content_omitted: true })]);
  assert.equal(reader.end, null);
  assert.equal(reader.lacks, true);
  read([chunk(0, "a"), chunk(1, "b"), chunk(2, "c"), done(3, { content_omitted: true })], reader);
  assert.equal(reader.content, "abc");
  assert.equal(reader.end.type, "done");
  assert.equal(reader.lacks, false);
});

test("an end that left its text out on purpose ends", () => {
  const { reader } = read([done(0, { content_omitted: true })], new Reader(ID, false));
  assert.equal(reader.end.type, "done");
});

test("the stored end alone is the answer", () => {
  const { told, reader } = read([done(5, { full_content: WHOLE, full_reasoning: "hm" })]);
  assert.equal(told, WHOLE);
  assert.equal(reader.reasoning, "hm");
});

test("another text is never mixed into what was told", () => {
  const { told } = read([chunk(0, "a"), { type: "snapshot", request_id: ID, content: "zzzz", next_seq: 4 }, chunk(4, "e")]);
  assert.equal(told, "ae");
});

test("an error keeps the text so far", () => {
  const { told, reader } = read([chunk(0, "The"), { type: "error", request_id: ID, seq: 2, code: "engine_lost", message: "gone", partial_content: "The sea" }]);
  assert.equal(told, "The sea");
  assert.equal(reader.end.code, "engine_lost");
});

test("reasoning is kept apart, and tool calls are put together from their pieces", () => {
  const reader = new Reader(ID);
  reader.feed({ type: "chunk", request_id: ID, seq: 0, reasoning: "I look " });
  reader.feed({ type: "chunk", request_id: ID, seq: 1, tool_calls: [{ index: 0, id: "c1", name: "get_time", arguments: '{"a"' }] });
  reader.feed({ type: "chunk", request_id: ID, seq: 2, tool_calls: [{ index: 0, arguments: ":1}" }] });
  assert.equal(reader.content, "");
  assert.equal(reader.reasoning, "I look ");
  assert.deepEqual(reader.toolCalls, [{ id: "c1", type: "function", function: { name: "get_time", arguments: '{"a":1}' } }]);
});

test("a rejection ends a request that was not heard of, and is not about one that runs", () => {
  const rejected = { type: "rejected", request_id: ID, code: "duplicate_request", message: "another one has this id" };
  assert.equal(read([rejected]).reader.end.code, "duplicate_request");
  assert.equal(read([chunk(0, "a"), rejected]).reader.end, null);
});

test("what is no event of the protocol changes nothing", () => {
  const { told, reader } = read([null, undefined, 7, "x", [], {}, { request_id: ID }, { request_id: ID, type: "chunk" }, { request_id: ID, type: "later_invention" }]);
  assert.equal(told, "");
  assert.equal(reader.end, null);
  assert.equal(reader.lacks, false);
  assert.equal(read([chunk(0, 7), { ...chunk(1), content: {}, reasoning: [], tool_calls: [{ index: "__proto__" }] }, chunk(2, "a")]).told, "a");
});
