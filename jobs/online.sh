#!/usr/bin/env bash
# Online learning in two minutes: a Redis server, a writer that plays this machine's Python standard library into it, two
# ranks under horovodrun that learn it while it arrives, and a sample that follows the stream.
#
#   jobs/online.sh [SETTING=VALUE ...]
#
# It needs jobs/setup.sh --dev and redis-server (apt-get install redis-server). Everything is in runs/online, and what it
# started ends with it. SECONDS_=120 RATE=15 are variables of the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH=$PWD/.venv/bin:$PATH
SECONDS_=${SECONDS_:-120}  # how long it learns
RATE=${RATE:-15}           # documents of 1 kB a second
command -v redis-server >/dev/null || { echo "jobs/online.sh: redis-server is not installed: apt-get install redis-server" >&2; exit 2; }
work=runs/online
rm -rf "$work"
mkdir -p "$work/redis"
pids=()
end() {
  trap - EXIT INT TERM
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
}
trap end EXIT
trap 'end; exit 130' INT TERM

PORT=$(python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
REDIS_PASSWORD=$(python -c 'import secrets; print(secrets.token_hex(16))')
export PORT REDIS_PASSWORD RATE
(umask 077 && printf 'port %s\nbind 127.0.0.1\ndir %s\nsave ""\nrequirepass %s\n' "$PORT" "$PWD/$work/redis" "$REDIS_PASSWORD" >"$work/redis/redis.conf")
redis-server "$work/redis/redis.conf" >"$work/redis/log.txt" &
pids+=($!)

python - <<'END_OF_PYTHON' &
import os, time
import redis
from hvdllm.text import corpus
from hvdllm.text.parts import Stdlib

client = redis.Redis(port=int(os.environ["PORT"]), password=os.environ["REDIS_PASSWORD"])
while True:
    try:
        client.ping()
        break
    except redis.exceptions.ConnectionError:
        time.sleep(0.05)
rate, begun = float(os.environ["RATE"]), time.monotonic()
number = 0
for each in corpus.documents(Stdlib()):
    for at in range(0, len(each.text), 1000):  # a document of the stream is a page
        client.xadd("documents", {"text": each.text[at : at + 1000]})
        number += 1
        time.sleep(max(0.0, begun + number / rate - time.monotonic()))
END_OF_PYTHON
pids+=($!)

echo "== two ranks learn what arrives, for $SECONDS_ s"
horovodrun --gloo -np 2 hvdllm train name=online runs_dir="$work" text=stream text.source=redis \
  text.address="redis://127.0.0.1:$PORT/0" text.forget=true schedule=infinite publish_every=40_000 sample_every=0 \
  eval_every=100_000 save_every=40_000 log_every=20_000 budget_tokens=1e12 "$@" \
  2> >(sed "/^Traceback/,\$d" >&2) & # horovodrun shows where in it a run that is stopped ends
train=$!
pids+=($train)
python - "$work/online" "$SECONDS_" <<'END_OF_PYTHON'
import sys, time
from pathlib import Path

run, end = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end and not (run / "published" / "latest").exists():
    time.sleep(0.5)
END_OF_PYTHON
hvdllm sample "$work/online" "def " --follow --tokens 60 &
pids+=($!)
sleep "$SECONDS_" &
pids+=($!)
wait $! || true
kill -INT "$train" 2>/dev/null || true
wait "$train" || true
python - "$work/online/metrics.jsonl" <<'END_OF_PYTHON'
import json, sys

print(f"{'tokens':>10} {'prequential':>12} {'recent':>8} {'bits/byte':>10} {'arrived':>9} {'waiting':>9}")
for line in open(sys.argv[1]):
    record = json.loads(line)
    if record["kind"] == "commit":
        values = (record["tokens"], record["prequential"], record["prequential_recent"], record["prequential_recent_bits_per_byte"])
        print("{:>10,} {:>12.4f} {:>8.4f} {:>10.4f}".format(*values), f"{record['arrived']:>9,} {record['waiting_tokens']:>9,}")
END_OF_PYTHON
