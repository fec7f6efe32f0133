// Types of lmd.js. The events and the fields of a request are those of docs/protocol.md.

export interface ToolCall {
  id?: string;
  type: "function";
  function: { name?: string; arguments: string };
}

/** An event of the protocol; which fields it has depends on `type`. */
export interface ProtocolEvent {
  type: "queued" | "start" | "progress" | "chunk" | "ping" | "snapshot" | "done" | "error" | "rejected";
  request_id: string;
  [field: string]: any;
}

/** A terminal event. `made_here`: no worker said it; the client gave up (`offline`, `lost`, `no_worker`) or stopped waiting. */
export interface EndEvent extends ProtocolEvent {
  type: "done" | "error" | "rejected";
  made_here?: true;
}

/** One event and the text that is new with it. Joined `content` of all news is the answer. */
export interface News {
  event: ProtocolEvent;
  content: string;
  reasoning: string;
}

/** The events of one request: what is new in each, what is missing, and the end. Knows no clock and no network. */
export class Reader {
  constructor(requestId: string, expectsText?: boolean);
  readonly requestId: string;
  content: string;
  reasoning: string;
  toolCalls: ToolCall[];
  /** The number of the next chunk. */
  next: number;
  /** An event of this request came. */
  heard: boolean;
  /** The terminal event, once it came. */
  end: EndEvent | null;
  /** A chunk is missing that the same request, sent again, may bring. */
  get lacks(): boolean;
  /** The news of an event; null for what is repeated, foreign, unknown, or lies behind a hole. */
  feed(event: unknown): News | null;
}

/** The fields of a request (docs/protocol.md), and the session it belongs to. Without one it gets a session of its own. */
export interface Request {
  session?: string;
  request_id?: string;
  prompt?: string;
  messages?: { role: string; content: unknown; [field: string]: unknown }[];
  [field: string]: unknown;
}

export interface Options {
  /** Called with every event that says something new, the terminal one last. */
  onNews?: (news: News) => void;
  /** Aborting it cancels the request on the worker. */
  signal?: AbortSignal;
  /** The worker's `streaming.heartbeat_s`: after three of them without an event the request is sent again. Default 15. */
  heartbeatS?: number;
  /** How long a lost connection is waited for. Default 300. */
  offlineS?: number;
}

export interface Asked {
  readonly requestId: string;
  readonly session: string;
  readonly reader: Reader;
  /** Resolves with the reader at the end, whatever the end is: look at `reader.end.type`. Never rejects. */
  readonly done: Promise<Reader>;
  /** Asks the worker to stop; the answer ends with `finish_reason` `cancelled` and the text so far. */
  cancel(): void;
}

/** What a bus calls for a request that is under way. */
export interface Entry {
  readonly session: string;
  event(event: unknown): void;
  up(): void;
  /** `unsent`: what was sent last reached nobody, and so does not count as a delivery in vain. */
  down(unsent?: boolean): void;
  fail(code: string, message: string, more?: object): void;
}

/** A way to the worker. */
export interface Bus {
  /** Takes a request under way; returns what ends its use of the bus. */
  open(entry: Entry): () => void;
  send(entry: Entry, body: object): void;
  /** A control message: `{action: "cancel" | "reset" | "delete" | ..., request_id?}`. */
  control?(session: string, body: object): void;
  renew?(): void;
  close?(code?: number): void;
}

export interface WebSocketOptions {
  protocols?: string | string[];
  /** The class to use, where `WebSocket` is no global (node before 22: the package ws). */
  Socket?: new (url: string, protocols?: string | string[]) => any;
  onState?: (state: "up" | "down") => void;
}

/** Sends a request and follows the client rules until its end. */
export function ask(bus: Bus, request: Request, options?: Options): Asked;

/**
 * Through the gateway's WebSocket: one socket for all requests, opened when needed, opened again when lost. `close()` cancels what is under
 * way; with a code from 4000 to 4999 the answers go on for a while, to be asked for again over another socket. Those that are still waited
 * for end with `offline` after `offlineS`.
 */
export function overWebSocket(url: string, options?: WebSocketOptions): Bus & Required<Pick<Bus, "control" | "renew" | "close">>;

/**
 * Through the gateway by POST and server-sent events: one HTTP request for each answer, and one for its cancel, to `control` beside an
 * address that ends in `ask/events`. With any other address there is no `control`, and a cancel closes the request of the answer.
 */
export function overFetch(url?: string, options?: { headers?: Record<string, string>; fetch?: typeof fetch }): Bus;

/** Straight over the broker, with a client of MQTT.js that the caller has connected. */
export function overMqtt(client: any, options?: { root?: string }): Bus & Required<Pick<Bus, "control" | "close">>;

/** Stops the answer; awaited, it waits for the end. */
export type Stop = (() => void) & PromiseLike<void>;

export type Stream<Asking> = (
  request: Asking,
  onChunk?: (text: string) => void,
  onComplete?: (end: EndEvent) => void,
  onError?: (error: Error & { code: string; retryable?: boolean; [field: string]: any }) => void,
  options?: Options,
) => Stop;

export interface ChatRequest extends Request {
  messages: { role: string; content: unknown; [field: string]: unknown }[];
}

export interface SessionRequest {
  session_id: string;
  message: string;
  system_prompt?: string;
  [field: string]: unknown;
}

export interface LlmAPI {
  chatStream: Stream<ChatRequest>;
  chatSessionStream: Stream<SessionRequest>;
}

/** `chatStream` and `chatSessionStream` over a bus; without one through the gateway that served the page. */
export function llmAPI(bus?: Bus): LlmAPI;

export const chatStream: Stream<ChatRequest>;
export const chatSessionStream: Stream<SessionRequest>;

/** 16 random hexadecimal digits. */
export function randomId(): string;
