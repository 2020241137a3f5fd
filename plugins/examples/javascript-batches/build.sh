#!/bin/sh
# Builds target/batches.wasm. What is missing is installed below target/: componentize-js, from npm, in the versions of
# package.json. Options go to build.mjs.
#
# WINDLASS_NODE_TOOLS names a directory to share between projects. Needs node 20 or newer, with npm.
set -eu
cd "$(dirname -- "$0")"

tools=${WINDLASS_NODE_TOOLS:-target/node}
if ! cmp -s package.json "$tools/installed.json"; then
    mkdir -p "$tools"
    cp package.json "$tools/package.json"
    npm install --prefix "$tools" --silent --no-audit --no-fund
    cp package.json "$tools/installed.json"
fi
# Packages are looked for beside the sources.
ln -sfn "$tools/node_modules" node_modules
exec node build.mjs "$@"
