// The component's edge: the contract's names.

import * as batches from './batches.js';

export const pluginInfo = { describe: batches.describe };
export const strategy = { plan: batches.plan, rollback: batches.rollback, judge: batches.judge };
