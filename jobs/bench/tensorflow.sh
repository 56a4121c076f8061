#!/usr/bin/env bash
# TensorFlow's strategies beside our exchanges. MultiWorkerMirroredStrategy and ParameterServerStrategy train the
# quickstart's transformer on two workers, from our initial weights, on our batches and with our AdamW, over the loopback
# and over two hosts that are joined by a shaped link; so do allreduce, ddp and parameter_server. What is synchronous must
# have the same losses, or the command ends with an error. A table says what each costs, and `hvdllm report` draws all
# curves into one picture. The program that TensorFlow runs is tensorflow_train.py, its reader tensorflow_shards.py.
#
#   jobs/bench/tensorflow.sh [--communication ring|nccl] [--pack-mb MB] [--link RATE|none] [--updates N] [--seeds 0,1,2]
#                            [SETTING=VALUE ...]
#
# It needs jobs/setup.sh --dev, 1.5 GB of disk, root and iproute2 for the link, Open MPI, and the machine for itself: less
# than 10 minutes on two cores. TensorFlow lies in an environment of its own, runs/tensorflow/env, which is made once;
# HVDLLM_PIP_ARGS chooses another index. Everything else is in runs/tensorflow/DATE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH
exec python tests/tensorflow_bench.py "$@"
