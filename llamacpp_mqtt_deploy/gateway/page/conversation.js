// The questions that are under way, and what becomes of their turns. Knows the bus and the chats, nothing of the page.

import { ask } from "./lmd.js";

const KEPT_MS = 600_000; // how long a worker keeps the end of a request (limits.remember_s): later it would run once more
const SAVE_EVERY_MS = 2000;

export class Conversation {
  #running = new Map();

  /** `onChange(chatId, turn)` is called whenever a turn has something new to show. */
  constructor(chats, bus, onChange) {
    this.chats = chats;
    this.bus = bus;
    this.onChange = onChange;
  }

  runs(chatId) {
    return this.#running.has(chatId);
  }

  /** A question and the turn that will hold its answer. */
  ask(chatId, text, fields) {
    const chat = this.chats.find(chatId);
    chat.title ||= text.replace(/\s+/g, " ").trim().slice(0, 80);
    const turn = { role: "assistant", text: "", request: { prompt: text, ...fields } };
    this.chats.turns(chatId).push({ role: "user", text }, turn);
    this.chats.touch(chatId);
    this.#run(chatId, turn);
    return turn;
  }

  /** The same question again after an error, in the place of the answer that failed. */
  again(chatId, turn) {
    if (this.runs(chatId)) return;
    const { request_id, ...fields } = turn.request;
    // A request that this page gave up may have been answered meanwhile: the same id brings that answer.
    const request = turn.problem?.madeHere ? turn.request : fields;
    const { role } = turn;
    for (const name of Object.keys(turn)) delete turn[name];
    Object.assign(turn, { role, text: "", request });
    this.#run(chatId, turn);
  }

  stop(chatId) {
    this.#running.get(chatId)?.cancel();
  }

  /** Goes on with what was under way when the page was left: the worker tells what it said meanwhile. */
  resume() {
    for (const { id } of this.chats.all) {
      const turn = this.chats.turns(id).at(-1);
      if (!turn?.request?.request_id || turn.finish || turn.problem) continue;
      if (Date.now() - turn.heardAt < KEPT_MS) this.#run(id, turn);
      else turn.problem = { code: "interrupted", message: "The page was closed before the end of this answer." };
    }
  }

  /** Before the page is left. */
  save() {
    for (const chatId of this.#running.keys()) this.chats.save(chatId);
  }

  forget(chatId) {
    this.#running.get(chatId)?.cancel();
    this.#running.delete(chatId);
    this.bus.control?.(this.bus.session(chatId), { action: "delete" });
  }

  #run(chatId, turn) {
    turn.heardAt ??= Date.now();
    turn.live = { phase: "waiting", since: Date.now() };
    let savedAt = 0;
    let asked;
    asked = ask(this.bus, { session: this.bus.session(chatId), ...turn.request }, {
      onNews: (news) => {
        turn.heardAt = Date.now();
        note(turn, news, asked?.reader);
        if (Date.now() - savedAt > SAVE_EVERY_MS) {
          savedAt = Date.now();
          this.chats.save(chatId);
        }
        this.onChange(chatId, turn);
      },
    });
    turn.request.request_id = asked.requestId;
    this.#running.set(chatId, asked);
    this.chats.save(chatId);
    this.onChange(chatId, turn);
    asked.done.then((reader) => {
      if (this.#running.get(chatId) === asked) this.#running.delete(chatId);
      conclude(turn, reader);
      this.chats.save(chatId);
      this.onChange(chatId, turn);
    });
  }
}

/** What an event changes in a turn while it lives. */
function note(turn, { event, content, reasoning }, reader) {
  const { live } = turn;
  if (!live) return;
  // Resumed after the page was loaded anew, the reader begins at nothing: what is shown stays until it has as much.
  if (reader && reader.content.length >= turn.text.length) turn.text = reader.content;
  if (reader?.reasoning) turn.reasoning = reader.reasoning;
  if (reader?.toolCalls.length) turn.calls = reader.toolCalls.filter(Boolean);
  if (event.type === "queued") Object.assign(live, { phase: "queued", position: event.position, reason: event.reason });
  else if (event.type === "start") Object.assign(live, { phase: "started", model: event.model });
  else if (event.type === "progress") Object.assign(live, { phase: "reading", share: event.processed / event.total });
  if (reasoning) {
    live.phase = "thinking";
    live.thinkingSince ??= Date.now();
  }
  if (content) {
    live.phase = "writing";
    live.firstTextMs ??= Date.now() - live.since;
    live.thoughtMs ??= live.thinkingSince && Date.now() - live.thinkingSince;
  }
}

/** What the end makes of a turn. */
function conclude(turn, { end, content, reasoning, toolCalls }) {
  const { live } = turn;
  turn.live = undefined;
  turn.text = content;
  if (reasoning) turn.reasoning = reasoning;
  if (toolCalls.length) turn.calls = toolCalls.filter(Boolean);
  if (end.type !== "done") {
    turn.problem = { code: end.code, message: end.message, retryAfterS: end.retry_after_s, madeHere: Boolean(end.made_here) };
    return;
  }
  const { timings = {}, usage = {} } = end;
  turn.finish = end.finish_reason ?? "stop";
  turn.figures = {
    model: live?.model,
    tokens: usage.completion_tokens,
    perSecond: timings.tokens_per_second,
    firstTokenMs: timings.first_token_ms ?? live?.firstTextMs,
    totalMs: timings.total_ms,
    thoughtMs: live?.thoughtMs,
    dropped: end.dropped_messages || undefined,
    warnings: end.warnings,
  };
}
