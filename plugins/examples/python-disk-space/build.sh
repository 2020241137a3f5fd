#!/bin/sh
# Builds target/disk-space.wasm. What is missing is installed below target/: componentize-py, from PyPI, in this version.
#
# WINDLASS_PYTHON_TOOLS names a virtual environment to share between projects. Needs python3 3.11 or newer with venv.
set -eu
cd "$(dirname -- "$0")"

version=0.25.1
tools=${WINDLASS_PYTHON_TOOLS:-target/venv}
if [ "$("$tools/bin/componentize-py" --version 2>/dev/null || true)" != "componentize-py $version" ]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check "componentize-py==$version"
fi

mkdir -p target
world=windlass:plugin/diagnostic
# For unit tests and editors: the contract's types as Python.
rm -rf target/bindings
"$tools/bin/componentize-py" --quiet -d wit -w "$world" bindings target/bindings
# Only src/ and the standard library go into the component.
"$tools/bin/componentize-py" --quiet -d wit -w "$world" componentize --python-path src -o target/.new.wasm plugin
mv target/.new.wasm target/disk-space.wasm
