// node over_fetch.mjs: `{url, cancelAt, request}` on standard input; asks, cancels once the text ends with `cancelAt`, prints the end.
import { text } from "node:stream/consumers";

import { ask, overFetch } from "../../clients/js/lmd.js";

const { url, cancelAt, request } = JSON.parse(await text(process.stdin));
const asked = ask(overFetch(url), request, { onNews: () => asked.reader.content.endsWith(cancelAt) && asked.cancel() });
const { end, content } = await asked.done;
process.stdout.write(JSON.stringify({ end, content }));
