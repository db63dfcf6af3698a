#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice; run it where gcloud is. The same command again
# continues the run, after a preemption too.
#   TPU=my-slice ZONE=us-east5-b BUCKET=my-bucket bash docs/launch/tpu_pod.sh
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${BUCKET:?of runs and data}"
CONFIG=${CONFIG:-configs/r50_3x.py} RUN=${RUN:-r50_3x}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

# Once; the images and annotations are in the bucket, which the hosts' service account reads.
on_all_hosts "test -d solov2_jax || git clone https://github.com/solov2-jax/solov2_jax
  cd solov2_jax && python3 -m venv .venv && .venv/bin/pip install --quiet '.[gcs]' 'jax[tpu]'"

# A pod's hosts know each other, but not from the environment: --distributed=on.
on_all_hosts "cd solov2_jax && JAX_COMPILATION_CACHE_DIR=gs://$BUCKET/programs \
  .venv/bin/python train.py --config=$CONFIG --workdir=gs://$BUCKET/runs/$RUN \
  --distributed=on \
  --config.data.train.images=gs://$BUCKET/coco/train2017 \
  --config.data.train.annotations=gs://$BUCKET/coco/annotations/instances_train2017.json \
  --config.data.val.images=gs://$BUCKET/coco/val2017 \
  --config.data.val.annotations=gs://$BUCKET/coco/annotations/instances_val2017.json"
