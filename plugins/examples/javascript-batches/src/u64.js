/** A `u64` of the contract: a BigInt, or a number where build.mjs takes QuickJS. */
export const u64 = (figure) => (globalThis.figuresAreNumbers ? figure : BigInt(figure));
