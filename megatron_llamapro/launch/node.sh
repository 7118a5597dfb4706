# Functions whose text the job sends to every node. `setup` and `ranks` are above.
ON_NODES=(setup ranks say not_seen tell_ranks wait_for_torchrun let_others_speak num_nodes_with)

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID, life $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

# A node that cannot write its log prints this line, which the job looks for in its own output.
not_seen() {
    say "$(hostname -s) does not see $LIFE_LOGS"
    exit 1
}

# If SLURM tracks processes by cgroups, its signals reach only the node's shell. USR1 is for the ranks: torchrun would
# die of it. So torchrun starts with USR1 ignored, and its ranks inherit that until they set a handler.
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
        wait $! # a signal interrupts wait at once
    done
    wait "$torchrun"
}

# srun ends all nodes when the first one fails. So a failed node waits until the others have reported: torchrun prints
# its report only after the other ranks of its node have ended, and gives them 30 seconds to do so.
let_others_speak() {
    local second
    for ((second = 0; second < 45; second++)); do
        [ "$told_to_end" = 1 ] || [ "$(num_nodes_with ended)" -ge "$SLURM_JOB_NUM_NODES" ] && return
        sleep 1
    done
}

num_nodes_with() { find "$LIFE_LOGS" -maxdepth 1 -name "*.$1" | wc -l; }
