// Asks llamacpp-mqtt-deploy from a browser or from node: the reader of the protocol's events, the client rules, three ways to the
// worker. No dependencies. Types and documentation: lmd.d.ts and docs/javascript.md. MIT licence.

export const randomId = () =>
  crypto.getRandomValues(new Uint8Array(8)).reduce((id, byte) => id + byte.toString(16).padStart(2, "0"), "");

// What `whole` has beyond `known`; nothing when it does not begin with it: another answer may not be mixed in.
const beyond = (known, whole) => (text(whole).startsWith(known) ? text(whole).slice(known.length) : "");

const text = (value) => (typeof value === "string" ? value : "");

/** The events of one request: what is new in each, what is missing, and the end. Knows no clock and no network. */
export class Reader {
  content = "";
  reasoning = "";
  toolCalls = [];
  next = 0;
  heard = false;
  end = null;
  #hole = false;
  #cut = false; // ended by the worker, but a part of the text is still missing here
  #omitted = false; // the snapshot was too large to be told: only the end can fill the hole

  constructor(requestId, expectsText = true) {
    this.requestId = requestId;
    this.expectsText = expectsText;
  }

  /** A chunk is missing that the same request, sent again, may bring. */
  get lacks() {
    return this.#hole && (this.#cut || !this.#omitted);
  }

  /** The news of an event; null for what is repeated, foreign, unknown, or lies behind a hole. */
  feed(event) {
    if (event?.request_id !== this.requestId || this.end) return null;
    if (event.type === "rejected" && this.heard) return null; // about somebody's other delivery
    this.heard = true;
    switch (event.type) {
      case "chunk":
        if (event.seq > this.next) this.#hole = true;
        if (event.seq !== this.next) return null;
        this.next += 1;
        this.#hole = false;
        if (Array.isArray(event.tool_calls)) event.tool_calls.forEach((delta) => this.#merge(delta));
        return this.#add(event, event.content, event.reasoning);
      case "snapshot":
        if (!(event.next_seq >= this.next)) return null;
        if (event.content_omitted) {
          this.#omitted = true;
          return this.#add(event);
        }
        this.next = event.next_seq;
        this.#hole = false;
        return this.#add(event, beyond(this.content, event.content), beyond(this.reasoning, event.reasoning));
      case "done":
      case "error": {
        const whole = event.full_content ?? event.partial_content;
        const told = event.seq <= this.next && (event.seq > 0 || !this.expectsText);
        if (event.type === "done" && typeof whole !== "string" && !told) {
          this.#hole = this.#cut = true;
          return null;
        }
        this.#hole = false;
        this.end = event;
        this.toolCalls = event.message?.tool_calls ?? this.toolCalls;
        return this.#add(event, beyond(this.content, whole), beyond(this.reasoning, event.full_reasoning));
      }
      case "rejected":
        this.end = event;
    }
    return this.#add(event);
  }

  #merge({ index = 0, id, name, arguments: more }) {
    if (!Number.isInteger(index)) return;
    const call = (this.toolCalls[index] ??= { id, type: "function", function: { name, arguments: "" } });
    call.function.arguments += text(more);
  }

  #add(event, content, reasoning) {
    const news = { event, content: text(content), reasoning: text(reasoning) };
    this.content += news.content;
    this.reasoning += news.reasoning;
    return news;
  }
}

/** Sends a request and follows the client rules until its end. `done` resolves with the reader; it never rejects. */
export function ask(bus, { session = `js-${randomId()}`, ...body }, { onNews, signal, heartbeatS = 15, offlineS = 300 } = {}) {
  body.request_id ??= randomId();
  const reader = new Reader(body.request_id, body.stream !== false || body.full_content !== false);
  let isUp = false;
  let lostAt = Date.now();
  let sentAt = 0;
  let heardAt = 0;
  let cancelledAt = 0;
  let vain = 0;
  let resolve, close, timer;
  const done = new Promise((settle) => (resolve = settle));

  const take = (news) => {
    if (reader.end) {
      clearInterval(timer);
      signal?.removeEventListener("abort", cancel);
      close?.();
      resolve(reader);
    }
    if (news) onNews?.(news);
  };
  const finish = (end) => take(reader.feed({ final: true, made_here: true, ...end, request_id: body.request_id }));
  const fail = (code, message, more) => finish({ type: "error", code, message, retryable: true, partial_content: reader.content, ...more });
  const lost = () => fail("lost", "The answer broke off.");
  const stopped = () => finish({ type: "done", finish_reason: "cancelled", full_content: reader.content });
  const send = () => {
    sentAt = Date.now();
    vain += 1;
    bus.send(entry, body);
  };
  const entry = {
    session,
    fail,
    up() {
      isUp = true;
      if (vain > 4) return lost(); // it may be this very request that the connections end for
      send(); // what came meanwhile is lost
      if (cancelledAt) tell(); // as may be the cancel
    },
    down(unsent) {
      isUp = false;
      lostAt ||= Date.now();
      if (unsent) vain -= 1;
    },
    event(event) {
      const known = reader.next;
      const news = reader.feed(event);
      if (event?.request_id === body.request_id) {
        heardAt = Date.now();
        lostAt = 0;
      }
      if (heardAt && (!reader.lacks || reader.next > known)) vain = 0;
      take(news);
      if (reader.lacks && !news) check();
    },
  };
  const check = () => {
    const now = Date.now();
    if (cancelledAt && now > cancelledAt + 15e3) return stopped();
    if (!isUp) return now > lostAt + offlineS * 1e3 && fail("offline", "The connection did not come back.");
    const silence = reader.heard || body.stream === false ? 3e3 * heartbeatS : 5e3;
    const due = reader.lacks ? sentAt + Math.min(500 * 2 ** vain, 1e4) : Math.max(sentAt, heardAt) + silence;
    if (now < due) return;
    if (vain > (reader.heard ? 4 : 2)) return reader.heard ? lost() : fail("no_worker", "No worker answers.");
    if (bus.renew && !reader.lacks) bus.renew(); // which sends it, when connected again
    else send();
  };
  const tell = () => bus.control?.(session, { action: "cancel", request_id: body.request_id });
  const cancel = () => {
    if (reader.end || cancelledAt) return;
    cancelledAt = Date.now();
    tell();
    if (!isUp || !bus.control) stopped();
  };

  if (signal?.aborted) stopped();
  else {
    timer = setInterval(check, 500);
    signal?.addEventListener("abort", cancel);
    close = bus.open(entry);
    if (reader.end) close();
  }
  return { requestId: body.request_id, session, reader, cancel, done };
}

const COMES_BACK = 4000; // tells the gateway that the answers are asked for again: after a plain close it would cancel them

/** Through the gateway's WebSocket: one socket for all requests, opened when needed, opened again when lost. */
export function overWebSocket(url, { protocols, Socket = globalThis.WebSocket, onState } = {}) {
  const entries = new Set();
  let socket = null;
  let pause = 0;
  let waiting = 0;

  const all = (what, ...told) => [...entries].forEach((entry) => entry[what](...told));
  const open = () => {
    clearTimeout(waiting);
    waiting = 0;
    const opened = (socket = new Socket(url, protocols));
    opened.onopen = () => {
      pause = 0;
      onState?.("up");
      all("up");
    };
    opened.onmessage = ({ data }) => all("event", parsed(data));
    opened.onclose = () => {
      if (socket !== opened) return;
      socket = null;
      onState?.("down");
      all("down");
      pause = Math.min(pause * 2 || 250, 8e3);
      if (entries.size) waiting = setTimeout(open, pause * (0.5 + Math.random() / 2));
    };
  };
  const isOpen = () => socket?.readyState === 1;
  const say = (type, session, body) => isOpen() && socket.send(JSON.stringify({ type, session, ...body }));
  return {
    open(entry) {
      entries.add(entry);
      if (isOpen()) entry.up();
      else if (!socket && !waiting) open();
      return () => entries.delete(entry);
    },
    ...saying(say),
    /** A socket that says nothing may be dead without knowing it: another one takes its place. */
    renew() {
      const old = socket;
      socket = null;
      old?.close(COMES_BACK);
      all("down");
      open();
    },
    close(code = 1000) {
      clearTimeout(waiting);
      all("down"); // for good: nothing opens it again for them
      entries.clear();
      socket?.close(code);
    },
  };
}

/** Through the gateway by POST and server-sent events: one HTTP request for each answer, and one for its cancel. */
export function overFetch(url = "/ask/events", { headers, fetch: get = (...given) => fetch(...given) } = {}) {
  const running = new Map();
  const abort = (entry) => running.get(entry)?.abort();
  const post = (to, session, body, signal) =>
    get(to, {
      method: "POST",
      headers: { "content-type": "application/json", ...(signal && { "idempotency-key": body.request_id }), ...headers },
      body: JSON.stringify({ session_id: session, ...body }),
      signal,
    });
  return {
    open(entry) {
      running.set(entry, null);
      queueMicrotask(() => running.has(entry) && entry.up());
      return () => {
        abort(entry);
        running.delete(entry);
      };
    },
    async send(entry, body) {
      abort(entry);
      const http = new AbortController();
      running.set(entry, http);
      let response;
      try {
        response = await post(url, entry.session, body, http.signal);
        if (!response.ok) {
          const told = parsed(await response.text());
          return entry.fail(`http_${response.status}`, response.statusText, told?.code && { ...told, made_here: false });
        }
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        for (let rest = "", piece; !(piece = await reader.read()).done; ) {
          const lines = (rest + piece.value).split("\n");
          rest = lines.pop();
          // Not within this `try`: what a callback throws is no lost connection.
          for (const line of lines) if (line.startsWith("data:")) queueMicrotask(() => entry.event(parsed(line.slice(5))));
        }
      } catch {
        // cut off: asked again below
      }
      if (running.get(entry) !== http) return; // ended, or sent anew
      entry.down(!response);
      setTimeout(() => running.get(entry) === http && entry.up(), 1e3);
    },
    // Where a program's own server passes the requests on, nobody knows an address for controls: there a cancel closes the request.
    control: url.endsWith("ask/events")
      ? (session, body) => post(url.slice(0, -10) + "control", session, body).catch(() => {})
      : undefined,
  };
}

/** Straight over the broker, with a client of MQTT.js that the caller has connected. */
export function overMqtt(client, { root = "llm" } = {}) {
  const entries = new Set();
  const decoder = new TextDecoder();
  const topic = (kind, session) => `${root}/${kind}/${session}`;
  const reply = ({ session }) => topic("reply", session);
  const subscribe = (entry) =>
    client.subscribe(reply(entry), { qos: 1 }, (error, granted) => {
      if (error || granted?.some(({ qos }) => qos > 2)) entry.fail("not_permitted", `The broker refuses ${reply(entry)}.`);
      else if (entries.has(entry)) entry.up();
    });
  const publish = (kind, session, body) => client.publish(topic(kind, session), JSON.stringify(body), { qos: 1 });
  const connected = () => entries.forEach(subscribe);
  const lost = () => entries.forEach((entry) => entry.down());
  const received = (name, payload, { retain }) => {
    if (!retain) for (const entry of entries) if (name === reply(entry)) entry.event(parsed(decoder.decode(payload)));
  };
  client.on("connect", connected).on("close", lost).on("message", received);
  return {
    open(entry) {
      entries.add(entry);
      if (client.connected) subscribe(entry);
      return () => {
        entries.delete(entry);
        if (![...entries].some(({ session }) => session === entry.session)) client.unsubscribe(reply(entry));
      };
    },
    ...saying(publish),
    close: () => client.off("connect", connected).off("close", lost).off("message", received),
  };
}

const saying = (say) => ({
  send: ({ session }, body) => say("request", session, body),
  control: (session, body) => say("control", session, body),
});

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/**
 * `chatStream` and `chatSessionStream(request, onChunk, onComplete, onError, options)` over a bus. What they return is a function that
 * stops the answer, and can be awaited until its end.
 */
export function llmAPI(bus = overFetch()) {
  const stream = (request, onChunk, onComplete, onError, options = {}) => {
    const onNews = (news) => {
      options.onNews?.(news);
      if (news.content) onChunk?.(news.content);
    };
    const { cancel, done } = ask(bus, request, { ...options, onNews });
    const told = done.then(({ end }) => {
      if (end.type === "done") onComplete?.(end);
      else onError?.(Object.assign(new Error(end.message), end));
    });
    cancel.then = told.then.bind(told);
    return cancel;
  };
  return {
    chatStream: stream,
    chatSessionStream: ({ session_id: session, message: prompt, ...rest }, ...callbacks) => stream({ session, prompt, ...rest }, ...callbacks),
  };
}

export const { chatStream, chatSessionStream } = llmAPI();
