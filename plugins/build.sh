#!/bin/sh
# Builds the plugins of this directory, and on request the test guests, as WebAssembly components.
#
#   plugins/build.sh [OUT_DIR]                    plugins → OUT_DIR/<name>.wasm   (default target/plugins)
#   plugins/build.sh --guests [OUT_DIR]           test guests → OUT_DIR/<name>.wasm (default target/test-guests)
#
# The target's standard library is looked for in this order: an installed wasm32-unknown-unknown; `rustup target add`; an
# installed wasm32-wasip2; Debian's rustc-web with -Zbuild-std. Idempotent: a file is replaced, by rename, only when its
# bytes changed, so that a server that watches OUT_DIR sees nothing when nothing changed.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"

case "${1:-}" in
    --guests) what=guests; out=${2:-$root/target/test-guests} ;;
    -*) echo "plugins/build.sh: unknown option $1: expected --guests or an output directory" >&2; exit 2 ;;
    *) what=plugins; out=${1:-$root/target/plugins} ;;
esac

has_target() { [ -n "$(find "$sysroot/lib/rustlib/$1/lib" -name 'libstd-*.rlib' 2>/dev/null | head -n 1)" ]; }

has_debian_rust() { dpkg -s rustc-web cargo-web rust-web-src >/dev/null 2>&1; }

sysroot=$(rustc --print sysroot)
host=$(rustc -vV | sed -n 's/^host: //p')
tools=$sysroot/lib/rustlib/$host/bin
target=wasm32-unknown-unknown
build_std=
cargo=cargo

if ! has_target wasm32-unknown-unknown; then
    if command -v rustup >/dev/null 2>&1 && rustup target add wasm32-unknown-unknown >&2 && has_target wasm32-unknown-unknown; then
        :
    elif has_target wasm32-wasip2; then
        target=wasm32-wasip2
    elif has_debian_rust; then
        build_std='-Zbuild-std=std,panic_abort'
    elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 &&
        apt-get install -y --no-install-recommends rustc-web cargo-web rust-web-src >&2 && has_debian_rust; then
        build_std='-Zbuild-std=std,panic_abort'
    else
        echo "plugins/build.sh: no standard library for WebAssembly. Run one of these, then try again:" >&2
        echo "    rustup target add wasm32-unknown-unknown" >&2
        echo "    sudo apt-get install -y rustc-web cargo-web rust-web-src" >&2
        exit 1
    fi
fi

if [ -n "$build_std" ]; then
    # Debian's compiler comes with the sources of the standard library; the linker comes from the rustup toolchain.
    RUSTC=/usr/bin/rustc
    RUSTC_BOOTSTRAP=1
    cargo=/usr/bin/cargo
    export RUSTC RUSTC_BOOTSTRAP
fi

if [ ! -x "$tools/wasm-component-ld" ]; then
    echo "plugins/build.sh: no wasm-component-ld in $tools: install the toolchain of rust-toolchain.toml with rustup" >&2
    exit 1
fi
PATH=$tools:$PATH
CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER=$tools/wasm-component-ld
# Guests have a target directory of their own: their flags never make the host build again.
CARGO_TARGET_DIR=$root/target/guests
export PATH CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER CARGO_TARGET_DIR

built=$CARGO_TARGET_DIR/$target/guest
mkdir -p "$out"

install_component() { # crate's file name, output name
    if ! cmp -s "$built/$1" "$out/$2"; then
        # A name that does not end in .wasm is not looked at by a server that watches the directory.
        cp "$built/$1" "$out/.$2.new"
        mv "$out/.$2.new" "$out/$2"
    fi
}

if [ "$what" = plugins ]; then
    set --
    for manifest in plugins/*/Cargo.toml; do
        set -- "$@" -p "windlass-plugin-$(basename "$(dirname "$manifest")")"
    done
    # shellcheck disable=SC2086 # $build_std is one option or nothing
    "$cargo" build --quiet $build_std --target "$target" --profile guest --lib "$@"
    for manifest in plugins/*/Cargo.toml; do
        name=$(basename "$(dirname "$manifest")")
        install_component "windlass_plugin_$(printf '%s' "$name" | tr - _).wasm" "$name.wasm"
    done
else
    for feature in tech-stack deployment-strategy diagnostic public-command entropy tiny; do
        # shellcheck disable=SC2086 # as above
        "$cargo" build --quiet $build_std --target "$target" --profile guest --lib -p windlass-test-guests --features "$feature"
        install_component windlass_test_guests.wasm "test-$feature.wasm"
    done
fi
