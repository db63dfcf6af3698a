#!/usr/bin/env bash
# Train step and whole image on a GPU, ours beside mmdetection: network.py at several batch
# sizes and precisions. PYTHON: an environment with this project and jax[cuda]. Other
# arguments go to network.py: --peers without a name measures ours alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python}
if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
  echo "error: $python: JAX finds no GPU; install jax[cuda13] or jax[cuda12]" >&2
  exit 2
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
for dtype in bfloat16 float32; do
  for batch in 16 1; do
    for what in train image; do
      "$python" benchmarks/network.py "$what" --size 800 1344 --batch "$batch" \
        "--config.model.dtype=$dtype" --peers channels_last "$@"
    done
  done
done
