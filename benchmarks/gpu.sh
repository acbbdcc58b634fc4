#!/usr/bin/env bash
# Everything that needs a GPU, in one command that leaves a folder of results: tests on CUDA, the stream sanitizer on small
# pipelines, and full-size SDXL against resident and stock. About ten minutes on an H200-class card.
#   bash benchmarks/gpu.sh OUT
set -uo pipefail
out=${1:?folder for the results}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
status=0
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
timeout 150 python -m pytest -q -m cuda tests/test_cuda.py 2>&1 | tee "$out/tests.txt" || status=1
TORCH_CUDA_SANITIZER=1 timeout 120 python -m pytest -q -m cuda tests/test_cuda.py -k sanitizer 2>&1 | tee "$out/sanitizer.txt" || status=1
timeout 280 python -m benchmarks.offload --device cuda --model sdxl --out "$out" 2>&1 | tee "$out/benchmark.txt" || status=1
exit $status
