// The integration test: builds the component and runs the conformance kit on it, with the samples of samples/.
// The kit is part of the windlass program; WINDLASS names it where it is not on the PATH.

import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import test from 'node:test';

test('the component conforms', () => {
  const project = fileURLToPath(new URL('..', import.meta.url));
  const run = spawnSync(process.env.WINDLASS ?? 'windlass', ['plugin', 'test', project], { encoding: 'utf8' });
  assert.equal(run.error, undefined, 'windlass does not run: set WINDLASS to its path');
  assert.equal(run.status, 0, run.stdout + run.stderr);
});
