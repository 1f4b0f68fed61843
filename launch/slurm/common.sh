# What the batch scripts do around their ranks. They set `output`, the run folder, and source this file.
python=${PYTHON:-.venv/bin/python}
max_retries=${MAX_RETRIES:-3}
restarts=${SLURM_RESTART_COUNT:-0}
logs=$output/logs
left_out=$logs/$SLURM_JOB_ID.left_out # hosts, one a line
failures=$logs/$SLURM_JOB_ID.failures # newest checkpoint of every start that failed
mkdir -p "$logs" || exit 1

# A variable that sbatch exports from the submitting shell would give all ranks one rank or another job's port.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE MASTER_ADDR
export MASTER_PORT=$((15000 + (SLURM_JOB_ID + 7919 * restarts) % 17000)) # of this job, a new one after a restart, below those that Linux gives out
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
cache=${TMPDIR:-/tmp}/neomoba-$SLURM_JOB_ID # of this job: a lock left by a killed one stops nobody
export TORCH_EXTENSIONS_DIR=$cache/extensions TRITON_CACHE_DIR=$cache/triton
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor} # graphs are kept where it outlives the job
rank_logs=$logs/$SLURM_JOB_ID.$restarts.%t.log

container=() inside=() # CONTAINER: an image of Apptainer (*.sif), else one that pyxis pulls
case ${CONTAINER:-} in
    '') ;;
    *.sif) inside=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "$CONTAINER") ;;
    *) container=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD" --container-workdir="$PWD") ;;
esac

banner() { # what runs where
    echo "$(date -Is) job $SLURM_JOB_ID, start $((restarts + 1)), $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, port $MASTER_PORT"
    srun --ntasks=1 --nodes=1 "${container[@]}" "${inside[@]}" "$python" -c '
import importlib.metadata as m, platform
names = ("torch", "deepspeed", "megatron-core", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
found = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
print("python", platform.python_version(), *(f"{n} {found[n]}" for n in names if n in found))' || exit 1
    git log -1 --format='commit %h' 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | sort | uniq -c
}

check_hosts() { # one that computes wrongly or slowly would hold up all others; HEALTH_CHECK=0 skips it
    [[ ${HEALTH_CHECK:-1} == 0 ]] && return
    rm -f "$logs/bad_hosts"
    srun --kill-on-bad-exit=1 "${container[@]}" "${inside[@]}" "$python" launch/check_hosts.py \
        ${HEALTH_TOLERANCE:+--tolerance "$HEALTH_TOLERANCE"} --bad_hosts "$logs/bad_hosts" && return
    [[ -s $logs/bad_hosts ]] && failed "the check of the hosts" $(<"$logs/bad_hosts")
    echo "the check of the hosts itself failed; going on without it" >&2
}

run_ranks() { # the program and its words; ends this shell
    local ranks code time_is_up=
    rm -f "$output/REFUSED" "$output/INTERRUPTED"
    srun --kill-on-bad-exit=1 --output="$rank_logs" "${container[@]}" "${inside[@]}" "$python" "$@" \
        2> >(tee "$logs/srun" >&2) &
    ranks=$!
    # srun passes USR1 to every rank; they finish their step, save and end with code 75. At TERM it would give them
    # SLURM's KillWait, 30 s, for that
    trap 'time_is_up=1; kill -USR1 $ranks' USR1
    while :; do # a trap ends `wait` with a code that is not srun's
        wait $ranks
        code=$?
        kill -0 $ranks 2>/dev/null || break
    done
    trap - USR1
    ((code == 0)) && exit 0
    # the ranks' own word is in the run folder; their exit codes may be those of srun, which ends all after the first
    if [[ -e $output/REFUSED ]]; then
        echo "$(date -Is) not started again, it would fail again: $(<"$output/REFUSED")" >&2
        exit 2
    fi
    if [[ -e $output/INTERRUPTED ]]; then
        [[ $(<"$output/INTERRUPTED") == *": STOP" ]] && exit 75 # somebody wants it to end, and later phases not to start
        requeue "time is up or the job was preempted"
    fi
    [[ -n $time_is_up ]] && requeue "time is up, and the ranks did not save in time"
    # the watchdog names the rank that is lost or wrong; srun the first task that ended
    local host
    host=$(cat "$logs/$SLURM_JOB_ID.$restarts".*.log | sed -nE 's/^error: (no sign of life from )?rank [0-9]+ \(([^,)]+).*/\2/p' | head -n 1)
    host=${host:-$(sed -nE 's/^srun: error: ([^:]+): tasks? .*/\1/p' "$logs/srun" | head -n 1)}
    failed "srun ended with $code, logs in $logs" $host
}

failed() { # WHY [HOSTS]: start again without the hosts, at most max_retries times on one checkpoint; ends this shell
    local why=$1 newest host
    shift
    newest=$(find "$output/checkpoints" -maxdepth 1 -name 'step_*[0-9]' -printf '%f\n' 2>/dev/null | sort -V | tail -n 1)
    echo "at ${newest:-none}" >>"$failures"
    if (($(grep -c "^at ${newest:-none}\$" "$failures") > max_retries)); then
        echo "$(date -Is) $why; not started again after $max_retries restarts without a new checkpoint (MAX_RETRIES)" >&2
        exit 1
    fi
    for host in "$@"; do
        if (($(hosts_left "$host") >= SLURM_JOB_NUM_NODES)); then
            echo "$host" >>"$left_out"
            why+="; without $host"
        fi
    done
    requeue "$why"
}

hosts_left() { # HOST: number of hosts that may run this job without it
    sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,alloc,mix,comp -o %N | sort -u |
        grep -vxc -f <(echo "$1"; cat "$left_out" 2>/dev/null)
}

requeue() { # WHY: this job starts again on its newest checkpoint; ends this shell
    echo "$(date -Is) $1; starting again" >&2
    trap '' TERM # SLURM's, which comes at once; the job must be pending before hosts can be left out
    scontrol requeue "$SLURM_JOB_ID" || exit 1
    if [[ -s $left_out ]]; then
        for _ in {1..50}; do
            scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(sort -u "$left_out" | paste -sd,)" && break
            sleep 0.1
        done
    fi
    exit 1
}
