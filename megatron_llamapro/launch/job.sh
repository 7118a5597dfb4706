# One life of the job. It resumes from the last complete checkpoint, whatever ended the previous life.

saved_step() {
    local step
    step=$(cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null) || step=0
    echo "${step:-0}"
}

is_finished() { [ "$(saved_step)" -ge "$TRAIN_ITERS" ]; }

# A restart would not help. Cancels the waiting jobs of an array too, since each would be a restart.
give_up() {
    say "giving up: $*"
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
    exit 1
}

# Prints why SLURM is ending the job: `cancelled`, `requeued` (by SLURM itself), or nothing (out of time, or warned).
fate_of_job() {
    local job
    job=" $(scontrol show job "$SLURM_JOB_ID" --oneliner) "
    [[ $job == *" JobState=COMPLETING "* && $job != *" Reason=TimeLimit "* ]] || return
    [[ $job == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] && echo cancelled || echo requeued
}

# USR1 warns that the nodes will be taken away. TERM does too, if the job still runs.
stopping=0 # 1: warned; 2: warned, and the log says so
fate=
trap 'stopping=1' USR1
trap 'fate=$(fate_of_job); stopping=1' TERM

# Ends this life if SLURM is ending the job for any reason but the time limit.
end_if_ended() {
    case $fate in
    cancelled) say "was cancelled: it is not requeued" ;;
    requeued) say "requeued by SLURM" ;;
    *) return ;;
    esac
    exit 1
}

# Whether a node has printed that it cannot see the logs. The job's --output holds everything that was printed.
was_not_seen() { grep -Fqs "does not see $LIFE_LOGS" "$LOG_DIR/$SLURM_JOB_NAME-$SLURM_JOB_ID.out"; }

# On USR1 the ranks save and stop after their step. It is sent repeatedly, because a rank that still imports torch
# ignores it. It is not sent before every node has its log: a shell that has just started would die of it.
run_ranks() {
    local srun_pid text
    text=$(declare -p HEAD_NODE PORT LIFE LIFE_LOGS && declare -f "${ON_NODES[@]}")
    srun --kill-on-bad-exit=1 "${CONTAINER[@]}" bash -c "$text; ranks" &
    srun_pid=$!
    while kill -0 "$srun_pid" 2>/dev/null; do
        if [ "$stopping" = 1 ]; then
            say "told to stop: every rank saves after its step"
            stopping=2
        fi
        [ "$stopping" = 2 ] && [ "$(num_nodes_with log)" -ge "$SLURM_JOB_NUM_NODES" ] && scancel --signal=USR1 "$SLURM_JOB_ID"
        sleep 2 &
        wait $!
    done
    wait "$srun_pid"
}

if is_finished; then
    say "nothing is left to do: step $(saved_step) of $TRAIN_ITERS is saved"
    exit 0
fi
started_at=$(saved_step)
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
LIFE="$SLURM_JOB_ID-$((${SLURM_RESTART_COUNT:-0} + 1))"
LIFE_LOGS="$LOG_DIR/$LIFE"
LIVES="$LOG_DIR/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}.lives_without_progress"
mkdir -p "$LIFE_LOGS"
say "starts from step $started_at of $TRAIN_ITERS on $SLURM_JOB_NODELIST; logs of every rank are in $LIFE_LOGS"

run_ranks
code=$?
say "ended with code $code at step $(saved_step) of $TRAIN_ITERS"
is_finished && exit 0

end_if_ended

was_not_seen && give_up "log_dir, checkpoint and data must be in folders that all nodes see"

verdict=0
if [ "$code" != 0 ]; then # in another shell: setup must not be able to end this one
    where=()
    [ "${#CONTAINER[@]}" = 0 ] || where=(srun --nodes=1 --ntasks=1 --nodelist="$HEAD_NODE" "${CONTAINER[@]}")
    "${where[@]}" bash -c "$(declare -f setup); setup; python3 -m megatron_llamapro.launch.postmortem \"\$0\"" \
        "$LIFE_LOGS" || verdict=$?
fi

lives=0
if [ "$(saved_step)" -le "$started_at" ]; then
    [ "$verdict" = 2 ] && give_up "a restart would be refused for the same reason: correct the input first"
    [ "$verdict" = 65 ] && give_up "the same steps would diverge again: change the run's configuration first"
    lives=$(($(cat "$LIVES" 2>/dev/null || echo 0) + 1))
fi
echo "$lives" >"$LIVES"
[ "$lives" -ge "$MAX_LIVES_WITHOUT_PROGRESS" ] && give_up "$lives lives in a row saved nothing new"
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] && exit "$code" # the array's next job resumes

end_if_ended # SLURM may have ended the job during the post-mortem
say "requeued"
trap - USR1 TERM # SLURM ends this life now; if it ended by itself, the job would count as failed
scontrol requeue "$SLURM_JOB_ID" ||
    give_up "SLURM did not requeue it; if requeueing is not allowed, set slurm.max_lives to submit a job array"
sleep 300
exit 1
