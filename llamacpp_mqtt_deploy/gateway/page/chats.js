// The chats of this browser, in its local storage: an index, and the turns of each chat under a key of its own.

import { randomId } from "./lmd.js";

const INDEX = "lmd.chats";
const MOST = 200;
const PREFIX = "lmd.chat.";
const key = (id) => PREFIX + id;

/** The chat that is kept under this key, or the list of them: `{list: true}`, `{id}`; nothing for other keys. */
export function keptUnder(name) {
  if (name === INDEX) return { list: true };
  return name?.startsWith(PREFIX) ? { id: name.slice(PREFIX.length) } : {};
}

function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // unreadable, or storage is forbidden here
  }
}

export class Chats {
  #turns = new Map();

  constructor() {
    this.reload();
  }

  /** Newest first: `{id, title, at}`. */
  reload() {
    const index = load(INDEX, []);
    this.all = Array.isArray(index) ? index.filter((chat) => typeof chat?.id === "string") : [];
  }

  /** Reads a chat anew that another tab has written. */
  reread(id) {
    this.#turns.delete(id);
  }

  find(id) {
    return this.all.find((chat) => chat.id === id);
  }

  add() {
    const chat = { id: `web-${randomId()}`, title: "", at: Date.now() };
    this.all.unshift(chat);
    return chat;
  }

  /** The turns of a chat, the same list every time: `{role: "user", text}` and `{role: "assistant", text, ...}`. */
  turns(id) {
    if (!this.#turns.has(id)) {
      const turns = load(key(id), []);
      this.#turns.set(id, Array.isArray(turns) ? turns : []);
    }
    return this.#turns.get(id);
  }

  rename(id, title) {
    const chat = this.find(id);
    if (chat) chat.title = title.trim().slice(0, 200) || chat.title;
    this.#write();
  }

  /** To the top of the list: something was said. */
  touch(id) {
    const chat = this.find(id);
    chat.at = Date.now();
    this.all = [chat, ...this.all.filter((other) => other !== chat)];
    for (const { id: old } of this.all.splice(MOST)) this.#forget(old);
  }

  save(id) {
    if (!this.find(id)) return;
    this.#store(key(id), this.turns(id).map(stored));
    this.#write();
  }

  remove(id) {
    this.all = this.all.filter((chat) => chat.id !== id);
    this.#forget(id);
    this.#write();
  }

  #forget(id) {
    this.#turns.delete(id);
    try {
      localStorage.removeItem(key(id));
    } catch {
      // storage is forbidden here
    }
  }

  #write() {
    this.#store(INDEX, this.all);
  }

  /** When the storage is full, the oldest chats make room. */
  #store(name, value) {
    for (let tries = 0; tries < 20; tries += 1) {
      try {
        localStorage.setItem(name, JSON.stringify(value));
        return;
      } catch (error) {
        if (error.name !== "QuotaExceededError" || this.all.length < 2) return;
        this.#forget(this.all.pop().id);
      }
    }
  }
}

/** What is worth keeping of a turn: nothing that lives only while it is shown. */
function stored({ role, text, reasoning, calls, figures, problem, finish, request, heardAt }) {
  return { role, text, reasoning, calls, figures, problem, finish, request, heardAt };
}
