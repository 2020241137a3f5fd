#!/bin/sh
# Makes sure that a machine has what the build and the tests need, and says exactly what to run where it cannot.
#
# Needed: a C compiler (rustls' ring is C and assembly), rustup's toolchain of rust-toolchain.toml. Tests of load balancers
# need HAProxy (they start it themselves: the packaged service may stay off), nftables, and ip for network namespaces. The
# standard library for WebAssembly is looked after by plugins/build.sh.
set -eu

missing=
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need cc gcc
need make make
need ps procps
need /usr/sbin/haproxy haproxy
need /usr/sbin/nft nftables
need ip iproute2

if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        apt-get update -qq
        # shellcheck disable=SC2086 # a list of package names
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing >/dev/null
    else
        echo "setup: these packages are missing. Run this, then try again:" >&2
        echo "    sudo apt-get update && sudo apt-get install -y$missing" >&2
        exit 1
    fi
fi

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: cargo is missing. Install rustup (https://rustup.rs) and run this, then try again:" >&2
    echo "    rustup toolchain install $(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml) --profile minimal -c rustfmt -c clippy" >&2
    exit 1
fi
