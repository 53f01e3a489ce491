#!/usr/bin/env bash
# Everything that only a machine with a CUDA GPU can tell, in at most 8 minutes:
#
#   bench/gpu_check.sh OUT.json [WHEEL]
#
# Builds the package for the GPU at hand (or takes a built wheel), runs the CUDA tests, compute-sanitizer's four tools
# over a small run, and the kernel benchmarks. Where Nsight Compute is there and may count, it profiles the large kernels, too.
# OUT.json has all results; a short table is printed last. Needs torch with CUDA, pytest and hypothesis, and nvcc unless a
# wheel is given. Installs nothing outside a folder that it removes. Outside a git checkout, COMMIT names the code.
set -uo pipefail
out=$(realpath -m "${1:?usage: bench/gpu_check.sh OUT.json [WHEEL]}")
wheel=${2:+$(realpath "$2")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$work/site" PYTHONUNBUFFERED=1

# Runs a part within its time and notes what came of it: its name, exit status, seconds.
part() {
  local name=$1 limit=$2 started=$SECONDS status=0
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$work/$name.log" 2>&1 || status=$?
  tail -n 5 "$work/$name.log"
  echo "$name $status $((SECONDS - started))" >>"$work/parts"
  return "$status"
}

capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
if [[ -n $wheel ]]; then
  part install 60 "$python" -m pip install --quiet --no-deps --target "$work/site" "$wheel" || exit 1
else
  TORCH_CUDA_ARCH_LIST=$capability part build 60 "$python" -m pip install --quiet --no-deps --no-build-isolation \
    --target "$work/site" . || exit 1
fi

# From their own folder, so that they import the package that was installed. The others have run on a CPU already.
part tests 100 env -C tests "$python" -m pytest . -k "cuda and not host and not test_cuda_kernels" \
  -p no:cacheprovider -p no:benchmark
# Every kernel of ours, and none of torch's; without torch's own pooling of memory, so that bounds are those of tensors.
for tool in memcheck racecheck initcheck synccheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 26 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --kernel-name kernel_substring=eroseg "$python" bench/every_kernel.py
done
part kernels 175 "$python" -m bench.kernels --device cuda --out "$work/kernels.json" --limit 140 \
  ${COMMIT:+--commit "$COMMIT"}
if command -v ncu >/dev/null; then
  part profile 40 ncu --clock-control none --kernel-name 'regex:erosion_grad|pixel_grad|select|linf_step' \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section SchedulerStats --section WarpStateStats \
    --section LaunchStats --section Occupancy "$python" bench/large_kernels.py
fi
"$python" - "$work" "$out" <<'PYTHON'
import json, sys
from pathlib import Path

work, out = map(Path, sys.argv[1:])
parts = [line.split() for line in (work / "parts").read_text().splitlines()]
checks = {}
for name, status, seconds in parts:
    lines = (work / f"{name}.log").read_text().splitlines()
    kept = lines if name == "profile" else lines[-5 if status == "0" else -60 :]
    checks[name] = {"status": int(status), "seconds": int(seconds), "output": kept}
kernels = work / "kernels.json"
result = json.loads(kernels.read_text()) if kernels.is_file() else {"figures": [], "skipped": {}}
out.write_text(json.dumps(result | {"checks": checks}, indent=1) + "\n")
PYTHON
cat "$work/kernels.log"
# Who may count is a matter of the machine: a profile that fails is not held against the package.
awk '{ printf "%-10s %-7s %4d s\n", $1, $2 == 0 ? "passed" : "FAILED", $3; failed += $2 != 0 && $1 != "profile" }
  END { exit failed > 0 }' "$work/parts"
