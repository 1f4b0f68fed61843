#!/bin/bash
# Submit the three phases as a chain, each starting from the weights of the one before; prints the job ids.
#     launch/slurm/submit.sh RUN_FOLDER [options of sbatch]
# CONFIGS="a.json b.json c.json" takes other phases. A phase that fails cancels those after it.
set -euo pipefail
if (($# < 1)) || [[ $1 == -* ]]; then
    echo "usage: launch/slurm/submit.sh RUN_FOLDER [options of sbatch]" >&2
    exit 2
fi
run=$1
shift
read -ra configs <<<"${CONFIGS:-ds_configs/phase1.json ds_configs/phase2.json ds_configs/phase3.json}"
for config in "${configs[@]}"; do
    [[ -f $config ]] || { echo "$config: no such file; name the phases in CONFIGS" >&2; exit 1; }
done
previous= job=
for i in "${!configs[@]}"; do
    output=$run/phase$((i + 1))
    after=() start=()
    if [[ -n $job ]]; then
        after=(--dependency="afterok:$job" --kill-on-invalid-dep=yes) # else it would stay pending for ever
        start=(--init_from "$previous")
    fi
    job=$(sbatch --parsable "$@" "${after[@]}" launch/slurm/pretrain.sbatch "${configs[i]}" "$output" "${start[@]}")
    job=${job%%;*}
    echo "job $job: ${configs[i]} -> $output"
    previous=$output
done
