#!/usr/bin/env bash
# Everything about one GPU in one run under eight minutes; see gpu.py.
# PYTHON: an environment with this project and jax[cuda]; TORCH_PYTHON: one with torch
# and CUDA (may be the same). Other arguments go to gpu.py; --tiny needs no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python}
for argument in "$@"; do
  if [ "$argument" = --tiny ]; then # on the CPU, to see that all of it runs
    exec "$python" benchmarks/gpu.py ${TORCH_PYTHON:+--torch_python "$TORCH_PYTHON"} "$@"
  fi
done
if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
  echo "error: $python: JAX finds no GPU; install jax[cuda13] or jax[cuda12]" >&2
  exit 2
fi
arguments=()
torch_python=${TORCH_PYTHON:-$python}
if "$torch_python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  arguments+=(--torch_python "$torch_python")
else
  echo "no torch with CUDA in $torch_python: measuring ours alone" >&2
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
exec "$python" benchmarks/gpu.py "${arguments[@]}" "$@"
