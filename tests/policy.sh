#!/bin/sh
# The rules of dependencies, checked against Cargo.lock and the manifests: where crates come from, which licences they have,
# that each has its reason, and the layers of the house. Advisories are not checked here: cargo-deny and cargo-audit take their
# database from GitHub (github.com/rustsec/advisory-db), and this has to pass where nothing but package registries can be
# reached. By hand, where it can: `cargo audit`. Last compared with Cargo.lock: the database's commit bf5c0d245 of 2026-08-21.
# What it says of crates that we have, with the reason why it is accepted:
#
#   RUSTSEC-2024-0384 (instant, unmaintained), RUSTSEC-2025-0057 (fxhash, unmaintained): dependencies of sled 0.34, which is
#   given; neither is a fault. Both go with sled's next version.
set -eu
cd "$(dirname -- "$0")/.."
failed=0
fail() { echo "policy: $1" >&2; failed=1; }

# Every crate comes from crates.io or from here.
if grep '^source = ' Cargo.lock | grep -v '"registry+https://github.com/rust-lang/crates.io-index"' >&2; then
    fail "Cargo.lock names a source other than crates.io"
fi

# Every third-party crate of the workspace has its reason on its line.
sed -n '/^\[workspace.dependencies\]/,/^\[workspace.lints/p' Cargo.toml | grep -E '^[a-z0-9_-]+ *= ' | grep -v 'path = ' |
    grep -v '#' >&2 && fail "a dependency in Cargo.toml has no reason beside it"

# Versions are named once, in the workspace.
for manifest in host/*/Cargo.toml sdk/Cargo.toml tests/Cargo.toml plugins/*/Cargo.toml; do
    if sed -n '/dependencies\]/,$p' "$manifest" | grep -E '^[a-z0-9_-]+ *= *"[0-9^~=<>*]' >&2; then
        fail "$manifest names a version of its own: use the workspace's"
    fi
done

# Licences: permissive ones only. `bzip2-1.0.6` is that of bzip2: BSD with its own clause on misrepresenting the origin.
allowed='bzip2-1.0.6|MIT-0|MIT|Apache-2.0|BSD-2-Clause|BSD-3-Clause|ISC|Zlib|Unicode-3.0|CC0-1.0|0BSD|Unlicense|BSL-1.0|CDLA-Permissive-2.0|MPL-2.0'
cargo metadata --format-version 1 --locked 2>/dev/null |
    python3 -c '
import json, re, sys
allowed = set(sys.argv[1].split("|"))
bad = []
for package in json.load(sys.stdin)["packages"]:
    if package["source"] is None:
        continue
    licence = (package["license"] or "").replace("/", " OR ")
    # An expression is fine when some choice of its OR parts holds allowed licences only.
    ways = [re.findall(r"[A-Za-z0-9.-]+", way) for way in re.split(r"\bOR\b", licence.replace("(", " ").replace(")", " "))]
    ways = [[word for word in way if word not in ("AND", "WITH", "LLVM-exception")] for way in ways]
    if not any(way and all(word in allowed for word in way) for way in ways):
        bad.append((package["name"], package["version"], licence))
for name, version, licence in bad:
    print(f"policy: {name} {version} has the licence `{licence}`", file=sys.stderr)
sys.exit(1 if bad else 0)
' "$allowed" || failed=1

# The layers. Only the store names sled, only the runtime names wasmtime, only the API knows HTTP, the domain is pure.
named=$(grep -lE '^(sled)(\.workspace)? *=' host/*/Cargo.toml sdk/Cargo.toml plugins/*/Cargo.toml | grep -v '^host/store/' || true)
[ -z "$named" ] || fail "only host/store may depend on sled: $named"
named=$(grep -lE '^(wasmtime|wasmtime-wasi)(\.workspace)? *=' host/*/Cargo.toml sdk/Cargo.toml plugins/*/Cargo.toml | grep -v '^host/runtime/' || true)
[ -z "$named" ] || fail "only host/runtime may depend on wasmtime: $named"
named=$(grep -rlE '\b(axum|http)::' host/server/src --include=*.rs | grep -vE '^host/server/src/api(\.rs|/)' || true)
[ -z "$named" ] || fail "only host/server/src/api may know HTTP: $named"
named=$(grep -rlE 'SystemTime::now|Utc::now|Timestamp::now' host/*/src --include=*.rs | grep -vE '/clock\.rs$' || true)
[ -z "$named" ] || fail "only a clock module reads the clock: $named"
if grep -E '^windlass-' host/domain/Cargo.toml >&2; then fail "host/domain depends on nothing of ours"; fi

exit $failed
