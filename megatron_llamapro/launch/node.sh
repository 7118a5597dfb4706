# What runs on every node, where the text of these functions is sent to; `setup` and `ranks` are above.
ON_NODES=(setup ranks say not_seen tell_ranks wait_for_torchrun let_others_speak num_nodes_with)

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID, life $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

# It cannot write the logs; the job reads what it prints.
not_seen() {
    say "$(hostname -s) does not see $LIFE_LOGS"
    exit 1
}

# Where processes are tracked by cgroups, SLURM's signals come to the node's shell alone. USR1 is for the ranks and not for
# torchrun: it would die, were it not started with USR1 ignored, as its ranks are until they have set a handler.
tell_ranks() {
    grep -ls "^PPid:[[:space:]]*$torchrun\$" /proc/[0-9]*/status | while IFS=/ read -r _ _ pid _; do
        kill -USR1 "$pid"
    done
}

wait_for_torchrun() {
    trap tell_ranks USR1
    trap 'told_to_end=1; kill -TERM "$torchrun"' TERM
    while kill -0 "$torchrun" 2>/dev/null; do
        sleep 1 &
        wait $! # which a signal interrupts at once
    done
    wait "$torchrun"
}

# srun ends all nodes with the first that fails. Before that they say what they saw: torchrun prints its report only when
# the other ranks of its node have ended, for which it gives them 30 seconds.
let_others_speak() {
    local second
    for ((second = 0; second < 45; second++)); do
        [ "$told_to_end" = 1 ] || [ "$(num_nodes_with ended)" -ge "$SLURM_JOB_NUM_NODES" ] && return
        sleep 1
    done
}

num_nodes_with() { find "$LIFE_LOGS" -maxdepth 1 -name "*.$1" | wc -l; }
