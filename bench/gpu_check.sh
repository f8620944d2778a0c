#!/usr/bin/env bash
# Everything that needs a GPU, in one offline run of less than nine minutes:
#
#     bench/gpu_check.sh DIR             build from source, pytest -m gpu, benchmarks
#     bench/gpu_check.sh DIR --dry-run   the same steps without a GPU: every GPU test is skipped, and
#                                        the benchmarks run in small shapes on the CPU
#
# PYTHON (default python3) must have torch 2.11 or newer and triton 3.6 or newer; nothing is
# downloaded, and that Python's packages are left as they are. The build has at most 110 s (a dry
# run's 1200); of the rest the benchmarks have 150 s or more, the tests what is left, in as many
# processes as there are cores (tests/run_shards.py), the most telling first.
#
# Each bench/gpu_NAME.py is run as `python -m tilewright.bench.gpu_NAME FOLDER --budget S` (and
# --dry-run), with an equal share of the time. It writes FOLDER/NAME.md, a table, and
# FOLDER/NAME.json after each case, so that a run that is cut keeps what it has, and exits with 0 only
# if every result was right.
#
# DIR receives
#     summary.md    each step in a line, failed tests, the benchmarks' tables
#     machine.txt   versions, GPU, what was built and how, what `tilewright doctor` says
#     tests.log     failures, what was skipped or did not run and why, the slowest
#     tests.xml     the same as JUnit
#     bench.log     what the benchmarks printed
#     NAME.json     a file for each benchmark
#
# Exits with 1 if the build or a test failed, a test did not run in time or a result was wrong, with
# 2 if nothing could be run.
set -uo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ] || { [ $# -eq 2 ] && [ "$2" != --dry-run ]; }; then
  echo "usage: bench/gpu_check.sh DIR [--dry-run]" >&2
  exit 2
fi
dry=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" || exit 2
dir=$(cd "$1" && pwd)
summary=$dir/summary.md
# seconds since the start at which the tests and then all has to be over
all_end=525 tests_end=375 build_limit=110
if [ -n "$dry" ]; then build_limit=1200; fi # no GPU is held up meanwhile
status=0
# nproc would count the threads that OMP_NUM_THREADS allows
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)

# what is installed, caches and half-done results: no environment is changed, nothing is left behind
work=$(mktemp -d) || exit 2
child=
finish() {
  [ -n "$child" ] && kill "$child" 2>/dev/null && wait "$child"
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
site=$work/site

python=$(command -v "${PYTHON:-python3}") || { echo "gpu_check: no ${PYTHON:-python3}" >&2; exit 2; }
# cmake and ninja installed as Python packages stand beside the interpreter
PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH
export PATH PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
unset TRITON_INTERPRET
if [ -n "$dry" ]; then export CUDA_VISIBLE_DEVICES=; fi

say() { echo "$*" | tee -a "$summary"; }

# in the background, so that a signal to this script is heeded at once and passed on
run() {
  local code
  "$@" &
  child=$!
  wait "$child"
  code=$?
  child=
  return $code
}

rm -f "$summary" "$dir"/{machine.txt,tests.log,tests.xml,bench.log}
if ! "$python" -c 'import torch, triton' >"$dir/machine.txt" 2>&1; then
  echo "gpu_check: $python has no torch or no triton; PYTHON=... names one that has" >&2
  tail -n 1 "$dir/machine.txt" >&2
  exit 2
fi
if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: torch sees no CUDA device; --dry-run does what can be done without one" >&2
  exit 2
fi
echo "# tilewright on a GPU, $(date -u +%FT%TZ)" >"$summary"
"$python" - >"$dir/machine.txt" 2>&1 <<'PYTHON' || { cat "$dir/machine.txt" >&2; exit 2; }
import platform, torch, triton
print("Python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(p.name, f"compute capability {p.major}.{p.minor}", p.multi_processor_count, "processors")
    print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
PYTHON
revision=$(git -C "$root" describe --always --dirty=+ 2>/dev/null)
echo "tilewright revision ${revision:-unknown}, $cores cores" >>"$dir/machine.txt"
say "" && say "$(paste -sd ';' "$dir/machine.txt")" && say ""
nvidia-smi >>"$dir/machine.txt" 2>&1

# --- build ---
begin=$SECONDS
run timeout --kill-after=5 $build_limit "$python" -m pip install --quiet --no-index \
  --no-build-isolation --no-deps --no-compile --target "$site" "$root" >"$work/build.log" 2>&1
code=$?
{ echo; echo "--- build, exit code $code"; tail -n 200 "$work/build.log"; } >>"$dir/machine.txt"
if [ $code -eq 0 ] && [ -d "$site/tilewright" ]; then
  say "- build: $((SECONDS - begin)) s; $(cd "$site/tilewright" && ls _*.so | paste -sd ' ')"
else
  # the Triton kernels need no compiler: lay the packages out as setup.py maps them
  say "- build: failed after $((SECONDS - begin)) s, see machine.txt; going on without C++ and CUDA"
  status=1
  rm -rf "$site" && mkdir -p "$site"
  cp -r "$root/engine" "$site/tilewright" && rm -f "$site"/tilewright/*.so
  cp -r "$root/bench" "$site/tilewright/bench"
  for room in "$root"/kernels/*/__init__.py; do
    cp -r "$(dirname "$room")" "$site/tilewright/ops/"
  done
fi
if [ -n "$dry" ]; then all_end=$((all_end + SECONDS)) tests_end=$((tests_end + SECONDS)); fi
export PYTHONPATH=$site
cd "$root" || exit 2
{ echo; echo "--- tilewright doctor"; } >>"$dir/machine.txt"
if ! timeout 60 "$python" -P -m tilewright doctor >>"$dir/machine.txt" 2>&1; then
  say "- doctor: failed, see machine.txt"
  if ! timeout 60 "$python" -P -c 'import tilewright' >>"$dir/machine.txt" 2>&1; then
    tail -n 5 "$dir/machine.txt" >&2
    exit 2
  fi
fi

# --- tests ---
begin=$SECONDS
limit=$((tests_end - SECONDS))
# a process is a core's worth of compiling: neither torch nor its compiler may take more
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # whatever else is installed there
run timeout --kill-after=10 $((limit + 15)) "$python" tests/run_shards.py "$dir" \
  --shards "$cores" --seconds $limit -- -m gpu tests >"$work/tests.out" 2>&1
code=$?
say "- tests: exit code $code after $((SECONDS - begin)) s; $(tail -n 1 "$work/tests.out")"
if [ $code -ne 0 ]; then
  status=1
  grep -E '^(FAILED|ERROR|nothing was collected)' "$work/tests.out" | head -40 | sed 's/^/  - /' |
    tee -a "$summary"
fi
unset OMP_NUM_THREADS TORCHINDUCTOR_COMPILE_THREADS

# --- benchmarks ---
benchmarks=(bench/gpu_*.py)
left=${#benchmarks[@]}
for file in "${benchmarks[@]}"; do
  name=$(basename "$file" .py)
  begin=$SECONDS
  share=$(((all_end - SECONDS) / left))
  left=$((left - 1))
  # the last case may begin just before its budget ends
  budget=$((share * 4 / 5))
  echo "--- $name, $budget s" >>"$dir/bench.log"
  run timeout --kill-after=5 $share "$python" -P -m "tilewright.bench.$name" "$work" \
    --budget $budget $dry >>"$dir/bench.log" 2>&1
  code=$?
  name=${name#gpu_}
  say "- benchmark $name: exit code $code after $((SECONDS - begin)) s"
  if [ $code -ne 0 ]; then
    status=1
    tail -n 5 "$dir/bench.log" | sed 's/^/  /' | tee -a "$summary"
  fi
  if [ -f "$work/$name.json" ]; then cp "$work/$name.json" "$dir/"; fi
  if [ -f "$work/$name.md" ]; then { echo; cat "$work/$name.md"; } >>"$work/tables.md"; fi
done
if [ -f "$work/tables.md" ]; then tee -a "$summary" <"$work/tables.md"; fi
say "" && say "exit code $status after $SECONDS s"
exit $status
