#!/usr/bin/env bash
# accelerate 1.15.0 and torch 2.13.0: on CPUs an FSDP plugin is ignored without a word, and DDP runs in its place.
#
# Two gloo processes ask Accelerator(cpu=True) for FSDP2. prepare() returns DistributedDataParallel, each process holds
# every weight, and nothing is warned of: memory that was to be shared is not. accelerate's own function for FSDP2,
# called directly, shards the same model on the same processes.
#
# Fails if prepare() shards, or if a warning says that it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy==2.4.2
cat > "$folder/two.py" <<'PYTHON'
import os
import warnings

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.tensor import DTensor


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def sharded(module):
    return [isinstance(weight, DTensor) for weight in module.parameters()]


def plugin():
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )


with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin())
    prepared = accelerator.prepare(model())
assert not any("fsdp" in str(warning.message).lower() for warning in said), "it says so now"
assert not any(sharded(prepared)), "it shards now"
accelerator.state.fsdp_plugin = plugin()
by_itself = fsdp2_prepare_model(accelerator, model())
assert all(sharded(by_itself))
if os.environ["RANK"] == "0":
    print(f"prepare(): {accelerator.distributed_type}, {type(prepared).__name__}, {sum(sharded(prepared))} weights sharded")
    print(f"fsdp2_prepare_model(): {type(by_itself).__name__}, {sum(sharded(by_itself))} weights sharded")
torch.distributed.destroy_process_group()
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node=2 "$folder/two.py"
