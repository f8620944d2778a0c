#!/usr/bin/env bash
# Everything that needs a GPU, in one offline run of less than nine minutes:
#
#     bench/gpu_check.sh DIR             build from source, pytest -m gpu, benchmarks
#     bench/gpu_check.sh DIR --dry-run   the same steps where there is no GPU: collects the tests,
#                                        runs the benchmarks in small shapes on the CPU
#
# PYTHON (default python3) must have torch 2.11 or newer and triton 3.6 or newer; nothing is
# downloaded, and that Python's packages are left as they are. DIR receives eight files: summary.md,
# attention.md and .json, tests.xml, machine.txt, and the logs of build, tests and benchmarks. Exits
# with 1 if the build or a test failed or a result was wrong, with 2 if nothing could be run.
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
# installed beside the results, and removed in the end: no environment is changed
site=$dir/site
# seconds; with what lies between them less than nine minutes together
build_limit=110 test_limit=250 bench_limit=110
status=0

python=$(command -v "${PYTHON:-python3}") || { echo "gpu_check: no ${PYTHON:-python3}" >&2; exit 2; }
# cmake and ninja installed as Python packages stand beside the interpreter
PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH
export PATH PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$dir/triton-cache
unset TRITON_INTERPRET

say() { echo "$*" | tee -a "$summary"; }

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
say "" && say "$(paste -sd ';' "$dir/machine.txt")" && say ""
nvidia-smi >>"$dir/machine.txt" 2>&1

# --- build ---
rm -rf "$site"
begin=$SECONDS
timeout $build_limit "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps \
  --no-compile --target "$site" "$root" >"$dir/build.log" 2>&1
if [ $? -eq 0 ] && [ -d "$site/tilewright" ]; then
  say "- build: $((SECONDS - begin)) s; $(cd "$site/tilewright" && ls _*.so | paste -sd ' ')"
else
  # the Triton kernels need no compiler: lay the packages out as setup.py maps them
  say "- build: failed after $((SECONDS - begin)) s, see build.log; going on without C++ and CUDA"
  status=1
  rm -rf "$site" && mkdir -p "$site"
  cp -r "$root/engine" "$site/tilewright" && rm -f "$site"/tilewright/*.so
  cp -r "$root/bench" "$site/tilewright/bench"
  for room in "$root"/kernels/*/__init__.py; do
    cp -r "$(dirname "$room")" "$site/tilewright/ops/"
  done
fi
export PYTHONPATH=$site
cd "$root" || exit 2
if ! timeout 60 "$python" -P -m tilewright doctor >>"$dir/machine.txt" 2>&1; then
  say "- doctor: failed, see machine.txt"
  if ! timeout 60 "$python" -P -c 'import tilewright' >>"$dir/machine.txt" 2>&1; then
    tail -n 5 "$dir/machine.txt" >&2
    exit 2
  fi
fi

# --- tests ---
# several processes: most of the time goes into compiling kernels, one for each combination
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "$(($(nproc) * 3 / 4 + 1))"); fi
# the first file has the tests that matter most, should the time not suffice for all
files=(tests/test_attention_gpu.py tests)
export OMP_NUM_THREADS=1
begin=$SECONDS
if [ -n "$dry" ]; then
  timeout $test_limit "$python" -P -m pytest -m gpu --collect-only -q -p no:cacheprovider "${files[@]}" \
    >"$dir/tests.log" 2>&1
else
  timeout --signal=INT --kill-after=10 $test_limit "$python" -P -m pytest -m gpu -q \
    -p no:cacheprovider --durations=20 --junitxml="$dir/tests.xml" "${workers[@]}" "${files[@]}" \
    >"$dir/tests.log" 2>&1
fi
code=$?
last=$(grep -E '[0-9]+ (passed|failed|error|selected|tests? collected)|collected' "$dir/tests.log" | tail -1)
say "- tests: exit code $code after $((SECONDS - begin)) s; ${last:-no summary, see tests.log}"
if [ $code -eq 124 ]; then say "- tests: stopped at $test_limit s; what is missing did not run"; fi
if [ $code -ne 0 ]; then
  status=1
  grep -E '^(FAILED|ERROR)' "$dir/tests.log" | head -40 | sed 's/^/  - /' | tee -a "$summary"
fi

# --- benchmarks ---
unset OMP_NUM_THREADS
begin=$SECONDS
timeout --kill-after=10 $((bench_limit + 25)) "$python" -P -m tilewright.bench.gpu_attention \
  "$dir" --budget $bench_limit $dry >"$dir/bench.log" 2>&1
code=$?
say "- benchmarks: exit code $code after $((SECONDS - begin)) s"
if [ $code -ne 0 ]; then
  status=1
  tail -5 "$dir/bench.log" | tee -a "$summary"
fi
if [ -f "$dir/attention.md" ]; then say "" && cat "$dir/attention.md" | tee -a "$summary"; fi
rm -rf "$dir/triton-cache" "$site"
say "" && say "exit code $status after $SECONDS s"
exit $status
