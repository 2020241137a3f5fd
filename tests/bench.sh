#!/bin/sh
# Prints every figure of `make bench`: one line `name value unit` each on stdout, nothing else there. What goes on, the goals
# that were missed, the machine and its load are told on stderr. Ends with 0 when every figure was measured, whether or not it
# reaches its goal: a figure is a finding, not a test.
#
#   tests/bench.sh [PROGRAM...]     all programs unless some are named: bench_engine store_bench ...
#
# Expects the binaries and plugins of `make build`.
set -eu
cd "$(dirname -- "$0")/.."
target=${CARGO_TARGET_DIR:-target}
examples=$target/release/examples

# Name, how it compares, goal. A line here is a line of the output.
goals='
server_ready_ms <= 300
plugin_drop_ms <= 1000
plugin_call_p50_us <= 60
plugin_call_p99_us <= 250
registry_call_ratio <= 1.3
registry_call_journal_ratio <= 2.0
plugin_calls_per_s >= 20000
warm_start_100_plugins_ms <= 500
plugin_idle_kb <= 300
replay_identical >= 1000
hostile_p99_ms <= 50
engine_steps_per_s >= 5000
preview_1000_servers_ms <= 1000
preview_1000_servers_mb <= 150
engine_steps_per_s_1000 >= 5000
api_p99_under_load_ms <= 50
store_commits_per_s >= 30000
store_vs_sled_ratio >= 0.85
api_get_vs_bare_ratio >= 0.6
upload_rss_mb <= 20
upload_check_mb_s >= 200
agent_binary_mb <= 10
agent_rss_mb <= 15
idle_agent_kb <= 40
traffic_failed_requests <= 0
traffic_second_tries <= 0
traffic_share_error_pp <= 3
traffic_least_per_s >= 500
'
all='bench_ready plugin_bench registry_bench bench_hostile bench_engine bench_fleet store_bench bench_api_get bench_upload bench_upload_check agent_footprint idle_agents bench_traffic'

say() { echo "bench: $*" >&2; }
load() { cut -d ' ' -f 1-3 /proc/loadavg; }
machine() {
    model=$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1)
    memory=$(awk '/^MemTotal:/ { printf "%.0f", $2 / 1e6 }' /proc/meminfo)
    echo "$(nproc) cores of ${model:-$(uname -m)}, $memory GB, Linux $(uname -r)"
}

# The whole workspace, as in `make build`: the same features are chosen, and nothing is built twice. The store's measurement is
# a feature of the store: this builds the workspace's own crates once more.
say "building"
cargo build --release --workspace --bins --examples >&2
cargo build --release --workspace --features windlass-store/bench --example store_bench >&2

# A hundred plugins are a hundred test guests.
sh plugins/build.sh --guests >&2

figures=$(mktemp)
trap 'rm -f "$figures"' EXIT
before=$(load)
for program in ${*:-$all}; do
    say "$program"
    # A goal that is missed, or a program that fails, keeps no other figure from being measured.
    "$examples/$program" >>"$figures" || say "$program ended with status $?"
done

missing=0
while read -r name is goal; do
    [ -n "$name" ] || continue
    line=$(sed -n "s/^\($name [^ ]* [^ ]*\)\$/\1/p" "$figures" | head -n 1)
    if [ -z "$line" ]; then
        [ $# != 0 ] || { say "$name was not measured"; missing=1; }
        continue
    fi
    echo "$line"
    echo "$line" | awk -v is="$is" -v goal="$goal" '
        (is == "<=" && $2 > goal) || (is == ">=" && $2 < goal) { print "bench: " $1 " misses its goal: " $2 ", not " is " " goal }' >&2
done <<END
$goals
END
say "$(machine)"
say "load (1, 5, 15 minutes): $before before, $(load) after"
exit $missing
