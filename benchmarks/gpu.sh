#!/usr/bin/env bash
# Everything that needs a GPU, in one command that leaves a folder of results: tests on CUDA, the stream sanitizer on small
# pipelines, full-size SDXL against resident and stock, and full-size Flux in several budgets. Parts, each under ten minutes:
#   bash benchmarks/gpu.sh OUT          # tests, sanitizer, SDXL
#   bash benchmarks/gpu.sh OUT flux     # Flux.1 dev: resident, stock, 8, 12, 16 and 24 GiB, default
set -uo pipefail
out=${1:?folder for the results}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
status=0
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
if [[ ${2:-} == flux ]]; then
  mkdir -p "$out/flux"
  timeout 580 python -m benchmarks.offload --device cuda --model flux --out "$out/flux" --steps 28 --rounds 2 \
    --only resident --only "ours, default" --budget 16GiB --budget 8GiB --budget 24GiB --budget 12GiB --only stock \
    2>&1 | tee "$out/flux.txt" || status=1
  exit $status
fi
timeout 150 python -m pytest -q -m cuda tests/test_cuda.py 2>&1 | tee "$out/tests.txt" || status=1
TORCH_CUDA_SANITIZER=1 timeout 120 python -m pytest -q -m cuda tests/test_cuda.py -k sanitizer 2>&1 | tee "$out/sanitizer.txt" || status=1
timeout 280 python -m benchmarks.offload --device cuda --model sdxl --out "$out" 2>&1 | tee "$out/benchmark.txt" || status=1
exit $status
