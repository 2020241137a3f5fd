// Builds target/batches.wasm from src/plugin.js.
//
//   --engine spidermonkey   componentize-js: all of JavaScript, about 12 MB (default)
//   --engine quickjs        componentize-qjs: about 1.5 MB, builds and compiles ten times faster, calculates slower

import { mkdir, readFile, rename, writeFile } from 'node:fs/promises';

const engines = {
  async spidermonkey() {
    const { componentize } = await import('@bytecodealliance/componentize-js');
    const { component } = await componentize({
      sourcePath: 'src/plugin.js',
      witPath: 'wit',
      worldName: 'deployment-strategy',
      // A plugin has no network; what is left of WASI is empty, and output goes to the server's log.
      disableFeatures: ['http', 'fetch-event'],
    });
    return component;
  },
  async quickjs() {
    const { componentize } = await import('componentize-qjs');
    const { component } = await componentize({
      witPath: 'wit',
      // This engine passes a u64 as a number; see src/u64.js.
      jsSource: `globalThis.figuresAreNumbers = true;\n${await readFile('src/plugin.js', 'utf8')}`,
      jsPath: 'src/plugin.js',
      world: 'deployment-strategy',
      sync: true,
    });
    return component;
  },
};

const at = process.argv.indexOf('--engine');
const engine = at < 0 ? 'spidermonkey' : process.argv[at + 1];
if (!Object.hasOwn(engines, engine)) {
  console.error(`unknown engine ${engine}: expected ${Object.keys(engines).join(' or ')}`);
  process.exit(2);
}
await mkdir('target', { recursive: true });
await writeFile('target/.new.wasm', await engines[engine]());
await rename('target/.new.wasm', 'target/batches.wasm');
