// Markdown to elements. marked reads it; the elements are made here, one by one, from text: no HTML of an answer is ever parsed,
// so there is none to clean. The page's policy for trusted types allows no HTML strings either.

import { Lexer } from "./vendored/marked.esm.js";

const LONGEST = 300_000; // characters; a longer answer is shown as it is
const DEEPEST = 40; // elements within each other; some browsers fall over at thousands
const REFERENCES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", hellip: "…", mdash: "—", ndash: "–", rarr: "→", larr: "←", times: "×", deg: "°", copy: "©", euro: "€", middot: "·", bull: "•", le: "≤", ge: "≥", ne: "≠" };
const INLINE = { strong: "strong", em: "em", del: "del", blockquote: "blockquote" };

/** The elements of one answer: `update` touches only the blocks that changed, so that a selection survives the stream. */
export class Prose {
  constructor(element) {
    this.element = element;
    this.blocks = [];
  }

  /** Shows the text. Returns the text of the blocks that are finished and were not before, for whoever reads aloud. */
  update(source, ended) {
    const text = source.replace(/\r\n?/g, "\n");
    const settled = ended ? [] : this.#settled(text);
    const start = settled.reduce((length, { raw }) => length + raw.length, 0);
    const tokens = blocksOf(text.slice(start));
    const changeable = this.blocks.slice(settled.length);
    let same = 0;
    while (same < changeable.length && changeable[same].raw === tokens[same]?.raw) same += 1;
    const told = changeable.slice(same).map((block) => block.told);
    for (const { nodes } of this.blocks.splice(settled.length + same)) nodes.forEach((node) => node.remove());
    for (const token of tokens.slice(same)) {
      const nodes = [...made([token], { depth: 0 }).childNodes];
      this.element.append(...nodes);
      this.blocks.push({ raw: token.raw, nodes, told: told.shift() ?? 0 });
    }
    return this.#finished(settled.length, ended);
  }

  /** The blocks that nothing which follows can change: all but the last two, while the text goes on as it began. */
  #settled(text) {
    const blocks = this.blocks.slice(0, -2);
    return text.startsWith(blocks.map(({ raw }) => raw).join("")) ? blocks : [];
  }

  #finished(from, ended) {
    const news = this.blocks.slice(from, ended ? undefined : -1).map((block) => {
      const text = block.nodes.map((node) => (node.querySelector?.("pre code") ?? node).textContent).join("");
      const untold = text.slice(block.told); // a list may have grown after it looked finished
      block.told = text.length;
      return untold;
    });
    return news.filter(Boolean);
  }
}

function blocksOf(text) {
  const plain = [{ type: "text", raw: text, text }];
  if (text.length > LONGEST) return plain;
  try {
    return new Lexer({ gfm: true, breaks: true }).lex(text);
  } catch {
    return plain; // thousands of nested quotes, and what else is made to be too deep
  }
}

function made(tokens = [], { depth, tight = false }) {
  const fragment = document.createDocumentFragment();
  const inside = { depth: depth + 1 };
  for (const token of tokens) fragment.append(depth < DEEPEST ? one(token, inside, tight) : (token.raw ?? ""));
  return fragment;
}

function one(token, inside, tight) {
  switch (token.type) {
    case "strong":
    case "em":
    case "del":
    case "blockquote":
      return element(INLINE[token.type], made(token.tokens, inside));
    case "paragraph":
      return element("p", made(token.tokens, inside));
    case "heading":
      return element(`h${Math.min(token.depth + 2, 6)}`, made(token.tokens, inside)); // below the headings of the page
    case "text":
      if (!token.tokens) return decoded(token.text);
      return tight ? made(token.tokens, inside) : element("p", made(token.tokens, inside));
    case "escape":
      return token.text;
    case "codespan":
      return element("code", token.text);
    case "code":
      return codeBlock(token);
    case "space":
    case "def":
      return "";
    case "br":
      return element("br");
    case "hr":
      return element("hr");
    case "checkbox":
      return Object.assign(element("input"), { type: "checkbox", checked: token.checked, disabled: true, ariaLabel: token.checked ? "Done" : "To do" });
    case "list":
      return list(token, inside);
    case "table":
      return table(token, inside);
    case "link":
    case "image":
      return link(token, inside);
    default:
      return token.raw ?? ""; // HTML among it: shown as the text that it is
  }
}

function element(name, ...content) {
  const node = document.createElement(name);
  node.append(...content);
  return node;
}

function list({ ordered, start, items, loose }, inside) {
  const rows = items.map((item) => element("li", made(item.tokens, { ...inside, tight: !loose })));
  const whole = element(ordered ? "ol" : "ul", ...rows);
  if (ordered && Number.isInteger(start) && start !== 1) whole.start = start;
  return whole;
}

function table({ header, rows, align }, inside) {
  const cells = (row, name) =>
    row.map((cell, at) => {
      const field = element(name, made(cell.tokens, inside));
      if (align[at]) field.classList.add(`to-${align[at]}`);
      return field;
    });
  const head = element("thead", element("tr", ...cells(header, "th")));
  const body = element("tbody", ...rows.map((row) => element("tr", ...cells(row, "td"))));
  const frame = element("div", element("table", head, body));
  frame.className = "wide";
  frame.tabIndex = 0; // so that the arrow keys scroll it
  frame.setAttribute("role", "region");
  frame.setAttribute("aria-label", "Table");
  return frame;
}

function codeBlock({ text, lang }) {
  const language = (lang ?? "").split(/\s/)[0];
  const copy = Object.assign(element("button", "Copy"), { type: "button", className: "copy-code" });
  const pre = element("pre", element("code", text));
  pre.tabIndex = 0;
  const frame = element("figure", element("figcaption", element("span", language), copy), pre);
  frame.className = "code";
  return frame;
}

/** Only whole addresses of the web and of mail become links; a picture becomes one too, since fetching it would tell its server. */
function link({ type, href, text, tokens }, inside) {
  const content = type === "image" ? `🖼 ${text || "picture"}` : made(tokens, inside);
  let address;
  try {
    address = new URL(href);
  } catch {
    return element("span", content);
  }
  if (!["http:", "https:", "mailto:"].includes(address.protocol)) return element("span", content);
  const anchor = element("a", content);
  anchor.href = address.href;
  anchor.target = "_blank";
  anchor.rel = "noopener noreferrer nofollow";
  anchor.title = address.href;
  anchor.referrerPolicy = "no-referrer";
  return anchor;
}

/** Character references, which browsers resolve in HTML. */
function decoded(text) {
  return text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|([a-z]{2,8}));/gi, (whole, decimal, hex, name) => {
    if (name) return REFERENCES[name.toLowerCase()] ?? whole;
    const code = decimal ? Number(decimal) : Number.parseInt(hex, 16);
    return code > 0 && code < 0x110000 ? String.fromCodePoint(code) : whole;
  });
}
