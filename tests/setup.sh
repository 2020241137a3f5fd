#!/bin/sh
# Makes sure that a machine has what the build and the tests need, and says exactly what to run where it cannot.
#
# Needed: a C compiler (rustls' ring is C and assembly), rustup's toolchain of rust-toolchain.toml. Tests of load balancers
# need HAProxy (they start it themselves: the packaged service may stay off), nftables, and ip for network namespaces. The
# standard library for WebAssembly is looked after by plugins/build.sh.
# Python 3.11 and node 20, for the plugins in these languages that tests build; componentize-py and componentize-js are installed
# by the plugins' own build scripts, below target/.
set -eu

# An ordinary user's PATH may lack what services are installed to.
PATH=$PATH:/usr/sbin:/sbin
missing=
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need cc gcc
need make make
need ps procps
need node nodejs
need npm npm
python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || missing="$missing python3 python3-venv"
need /usr/sbin/haproxy haproxy
need /usr/sbin/nft nftables
need ip iproute2
# Tests make a file immutable, as something that cannot be removed.
need chattr e2fsprogs
# References of the archive tests, and the programs that compress for them.
need bsdtar libarchive-tools
need unzip unzip
need xz xz-utils
need zstd zstd
need bzip2 bzip2
# The runtimes of the shipped tech stacks, on which the tests release. `javac` compiles the tests' jar.
need java openjdk-17-jre-headless
need javac openjdk-17-jdk-headless
need nginx nginx-light
[ -x /usr/bin/python3 ] || missing="$missing python3"
/usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"

if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        apt-get update -qq
        # Services of packages are not started: nothing here needs them, and their ports may be taken.
        policy=/usr/sbin/policy-rc.d
        if [ ! -e "$policy" ]; then
            printf '#!/bin/sh\nexit 101\n' > "$policy"
            chmod 755 "$policy"
            trap 'rm -f "$policy"' EXIT
        fi
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
