#!/usr/bin/env bash
# What a rented GPU tells in 20 minutes, the most important first:
#   1. parity.py: whether it computes what the reference does, at each precision; a wrong
#      figure ends the script, unless KEEP_GOING is set
#   2. device.py: dispatch, transfers and their overlap, evaluation's images a second
#   3. network.py: train step and whole image, ours beside mmdetection, batch 16 and 1
# PYTHON: an environment with this project and jax[cuda]. RESULTS: folder of the results.
# Other arguments go to network.py: --peers without a name measures ours alone. --tiny as
# the first one runs all of it on this CPU, in a few minutes: it tests the script, and its
# figures say nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python} results=${RESULTS:-benchmarks/results}
only=() config=() size=(800 1344) batches=(16 1) dtypes=(bfloat16 float32) runs=() measured=()
if [ "${1:-}" = --tiny ]; then
  shift
  export JAX_PLATFORMS=cpu
  results=${RESULTS:-$(mktemp -d)}
  only=(--only "float32 highest") config=(--config configs/light_448_r18.py) size=(64 64)
  batches=(1) dtypes=(float32) runs=(--runs 2)
  measured=(--eval_batch 1 --eval_images 2)
  set -- --peers "$@"
else
  if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
    echo "error: $python: JAX finds no GPU; install jax[cuda13] or jax[cuda12]" >&2
    exit 2
  fi
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  set -- --peers channels_last "$@"
fi

mkdir -p "$results"
"$python" benchmarks/parity.py --results "$results" "${only[@]}" || [ -n "${KEEP_GOING:-}" ]
for dtype in "${dtypes[@]}"; do
  "$python" benchmarks/device.py "${config[@]}" --size "${size[@]}" --batch "${batches[0]}" \
    "${runs[@]}" "${measured[@]}" --results "$results" "--config.model.dtype=$dtype"
done
for dtype in "${dtypes[@]}"; do
  for batch in "${batches[@]}"; do
    for what in train image; do
      "$python" benchmarks/network.py "$what" "${config[@]}" --size "${size[@]}" \
        --batch "$batch" "${runs[@]}" --results "$results" "--config.model.dtype=$dtype" "$@"
    done
  done
done
echo "results: $results"
