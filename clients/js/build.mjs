// Prints lmd.min.js, made from lmd.js: `make javascript` puts it in its place. terser comes from tests/js/package.json.
import { readFileSync } from "node:fs";

import { minify } from "../../tests/js/node_modules/terser/dist/bundle.min.js";

const { code } = await minify(readFileSync(new URL("lmd.js", import.meta.url), "utf8"), {
  module: true,
  ecma: 2022,
  compress: { passes: 3, unsafe_arrows: true, keep_fargs: false },
  format: { comments: false, preamble: "// llamacpp-mqtt-deploy, MIT; see lmd.js" },
});
process.stdout.write(`${code}\n`);
