// The deployment strategy `batches`: servers in batches, one batch after the other, with a pause between them.
//
// The functions are pure: equal requests get equal answers. Whatever is planned here, the core enforces the order's limits.

import { u64 } from './u64.js';

const schema = {
  type: 'object',
  additionalProperties: false,
  properties: {
    batch: { type: 'integer', minimum: 1, maximum: 1000, default: 1, description: 'Servers of one batch.' },
    pause_s: { type: 'integer', minimum: 0, maximum: 86400, default: 0, description: 'Seconds between two batches.' },
  },
};

export function describe() {
  return {
    name: 'batches',
    version: '0.1.0',
    title: 'Batches',
    summary: 'Releases servers in batches of one size, with a pause between batches.',
    provider: 'you',
    category: 'general',
    parametersSchema: JSON.stringify(schema),
    operatingSystems: [],
    wishes: { users: [], pathRoots: [], attributes: [] },
    items: [],
    presets: [],
    attributes: [],
  };
}

export function plan(request) {
  const parameters = JSON.parse(request.parameters);
  const unknown = Object.keys(parameters).find((name) => !Object.hasOwn(schema.properties, name));
  if (unknown !== undefined) {
    throw { code: 'invalid-parameter', message: `unknown parameter ${unknown}`, field: `/${unknown}` };
  }
  const size = parameters.batch ?? 1;
  const pauseMs = (parameters.pause_s ?? 0) * 1000;
  const nodes = [];
  // Adds a node below its parent and answers its index.
  const add = (parent, name, role, kind) => nodes.push({ parent, name: name.slice(0, 60), role, kind, attributes: [] }) - 1;
  for (const { key, servers } of request.applications) {
    const parent = add(undefined, key, 'application', { tag: 'sequence' });
    for (let at = 0; at < servers.length; at += size) {
      if (at > 0 && pauseMs > 0) {
        add(parent, 'pause', 'plain', { tag: 'pause', val: u64(pauseMs) });
      }
      const limits = { maxInFlight: 0, maxFailures: 0 };
      const group = add(parent, `batch ${at / size + 1}`, 'group', { tag: 'parallel', val: limits });
      for (const server of servers.slice(at, at + size)) {
        const unit = {
          application: key, server: server.id, restore: { tag: 'remembered' }, healthyForMs: u64(0), healthDeadlineMs: undefined,
        };
        add(group, server.name, 'plain', { tag: 'release', val: unit });
      }
    }
  }
  return { nodes, onFailure: 'block', progressDeadlineMs: undefined, attributes: [] };
}

/** The core's own rollback plan runs then. */
export function rollback() {
  throw { code: 'unsupported', message: 'this strategy has no rollback of its own', field: undefined };
}

export function judge() {
  return { verdict: 'go-on', reason: 'nothing was to be judged' };
}
