import assert from 'node:assert/strict';
import test from 'node:test';

import { plan } from '../src/batches.js';

function request(parameters, servers) {
  const application = {
    key: 'shop',
    servers: Array.from({ length: servers }, (_, number) => ({ id: `s${number}`, name: `s${number}` })),
  };
  return { parameters: JSON.stringify(parameters), applications: [application] };
}

test('every server is released once, in its batch', () => {
  const { nodes } = plan(request({ batch: 2, pause_s: 5 }, 5));
  const of = (tag) => nodes.filter((node) => node.kind.tag === tag).map((node) => node.kind.val);
  assert.deepEqual(of('release').map((unit) => unit.server), ['s0', 's1', 's2', 's3', 's4']);
  assert.deepEqual(of('pause'), [5000n, 5000n]);
});

test('parameters that do not fit are refused', () => {
  assert.throws(() => plan(request({ batches: 2 }, 1)), { code: 'invalid-parameter' });
});
