# What runs on every node, where the text of these functions is sent to; `setup` and `ranks` are above.
ON_NODES=(setup ranks say not_seen tell_ranks wait_for_torchrun let_others_speak count_of)

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID, life $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

# It cannot write the logs; the job reads what it prints.
not_seen() {
    say "$(hostname -s) does not see $LIFE_LOGS"
    exit 1
}

# Where processes are tracked by cgroups, SLURM's signals come to the node's shell alone. torchrun would die of USR1;
# ranks ignore it until they have set a handler.
tell_ranks() {
    grep -ls "^PPid:[[:space:]]*$torchrun\$" /proc/[0-9]*/status | while IFS=/ read -r _ _ pid _; do
        kill -USR1 "$pid"
    done
}

wait_for_torchrun() {
    trap tell_ranks USR1
    trap 'ended=1; kill -TERM "$torchrun"' TERM
    while kill -0 "$torchrun" 2>/dev/null; do
        sleep 1 &
        wait $! # which a signal interrupts at once
    done
    wait "$torchrun"
}

# srun ends all nodes with the first that fails. Before that they say what they saw: torchrun does when the other ranks of
# its node have ended, for which it gives them 30 seconds.
let_others_speak() {
    local second
    touch "$LIFE_LOGS/$node.failed"
    for ((second = 0; second < 45; second++)); do
        [ "$ended" = 1 ] || [ "$(count_of failed)" -ge "$SLURM_JOB_NUM_NODES" ] && return
        sleep 1
    done
}

# Nodes that have written a file of this kind.
count_of() { find "$LIFE_LOGS" -maxdepth 1 -name "*.$1" | wc -l; }
