#!/bin/bash
# Runs under a real SLURM: munge, slurmctld and two slurmd on this machine, in a temporary folder.
#
#   apt-get install slurmctld slurmd munge slurm-client      (Debian's packages)
#   tests/slurm.sh [CASE ...]                                or: make test-slurm
#
# It takes some minutes, needs no root and no network, and leaves nothing running. PYTHON names an
# interpreter with the requirements (.venv/bin/python by default), KEEP=1 keeps the folder.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
folder=$(mktemp -d)
export SLURM_CONF=$folder/slurm.conf OMP_NUM_THREADS=1 PATH=$PATH:/usr/sbin:/sbin
failed=0

train="$python $root/train.py --config $root/configs/quickstart.yaml --run.report false --trainer.accelerator cpu
 --trainer.precision 32-true --data.batch_size 16 --model.queue_size 64 --model.width 0.125
 --optim.warmup_epochs 0 --run.knn_every 0 --trainer.log_every_n_steps 10"
train=${train//$'\n'/}
short="$train --trainer.max_steps 20"
long="$train --trainer.max_steps 200 --run.checkpoint_every 1"

# The cluster

start_cluster() {
    local host user
    host=$(hostname -s) user=$(id -un)
    mkdir "$folder/state" "$folder/spool"
    chmod 755 "$folder"
    head -c 1024 /dev/urandom > "$folder/munge.key"
    chmod 400 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.sock" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
        --seed-file="$folder/munge.seed" || exit 1
    cat > "$SLURM_CONF" <<END
ClusterName=moco
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17817
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock,cred_expire=5
SlurmUser=$user
SlurmdUser=$user
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
NodeName=one NodeHostname=$host NodeAddr=127.0.0.1 Port=17901 CPUs=2
NodeName=two NodeHostname=$host NodeAddr=127.0.0.1 Port=17902 CPUs=2
PartitionName=all Nodes=one,two Default=YES MaxTime=INFINITE State=UP
END
    slurmctld -f "$SLURM_CONF" && slurmd -f "$SLURM_CONF" -N one &&
        slurmd -f "$SLURM_CONF" -N two || exit 1
    export MASTER_ADDR=127.0.0.1  # the nodes' names are no hosts
    until sinfo -h -o %D -t idle 2> /dev/null | grep -qx 2; do
        kill -0 "$(cat "$folder/slurmctld.pid")" || exit 1
        sleep 0.2
    done
}

stop_cluster() {
    local pid pids
    scancel -u "$(id -un)" 2> /dev/null
    timeout 60 bash -c 'while [ "$(squeue -h 2> /dev/null)" ]; do sleep 0.2; done'
    pids=$(cat "$folder"/slurmd.*.pid "$folder/slurmctld.pid" "$folder/munged.pid" 2> /dev/null)
    # shellcheck disable=SC2086  # the ids are words
    kill $pids 2> /dev/null
    for pid in $pids; do
        timeout 20 tail --pid "$pid" -f /dev/null || kill -9 "$pid"
    done
    if [ "${KEEP:-}" ]; then echo "kept: $folder"; else rm -rf "$folder"; fi
}
trap stop_cluster EXIT
trap 'exit 1' INT TERM

# Jobs. A job's folder is where it runs; its output is in $out

submit() {  # NAME OPTIONS COMMANDS
    here=$folder/$1 out=$folder/$1/out
    mkdir -p "$here"
    printf '#!/bin/bash\n%s\n' "$3" > "$here/job.sh"
    # shellcheck disable=SC2086  # the options are words
    id=$(sbatch --parsable $2 --open-mode=append -o "$out" -D "$here" "$here/job.sh") || exit 1
}

fact() {  # NAME: a fact about the job, such as JobState
    scontrol show job -o "$id" | tr ' ' '\n' | sed -n "s/^$1=//p"
}

finish() {  # wait for the job's end; its exit code is in $code
    until fact JobState | grep -qE 'COMPLETED|FAILED|TIMEOUT|CANCELLED|NODE_FAIL'; do sleep 0.2; done
    code=$(fact ExitCode)
    code=${code%:*}
}

until_true() {  # COMMAND: wait for it, but not longer than the job
    until eval "$1"; do
        fact JobState | grep -qE 'RUNNING|PENDING|CONFIGURING' || return 1
        sleep 0.05
    done
}

warn() {  # send what `sbatch --signal=USR1@60` sends
    scancel --signal=USR1 "$id"
}

restarts() {  # the times that SLURM has started the job again
    fact Restarts
}

weights() {  # RUN: the SHA-256 of all that a run has learnt
    "$python" - "$1/checkpoints/last.ckpt" <<'END'
import hashlib, sys, torch
state = torch.load(sys.argv[1], weights_only=True)
digest = hashlib.sha256()
for name, tensor in sorted(state["state_dict"].items()):
    digest.update(name.encode() + tensor.numpy().tobytes())
print(state["global_step"], digest.hexdigest())
END
}

check() {  # WHAT COMMAND: say whether it holds
    if eval "$2"; then echo "  ok      $1"; else echo "  FAILED  $1"; failed=1 bad=1; fi
}

count() {  # PATTERN: lines of the output with it
    grep -cE -- "$1" "$out"
}

train_undisturbed() {  # once; its weights are $expected
    if [ "${expected:-}" ]; then return; fi
    submit undisturbed "-n 2" "srun $long --run.dir run"
    finish
    check "an undisturbed run: exit code 0" '[ "$code" = 0 ]'
    expected=$(weights "$here/run")
    echo "          $expected"
}

# Cases

case_two_tasks() {  # the number of devices is read, not asked for; one directory, chosen by rank 0
    submit two_tasks "-n 2" "srun $short"
    finish
    check "exit code 0" '[ "$code" = 0 ]'
    check "two devices" '[ "$(count "^2 cpu device")" = 1 ]'
    check "one directory" '[ "$(ls "$here/runs" | wc -l)" = 1 ]'
    check "one result line" '[ "$(count "^{")" = 1 ]'
}

case_two_nodes() {  # without --trainer.num_nodes
    submit two_nodes "-N 2 --ntasks-per-node 1" "srun $short"
    finish
    check "exit code 0" '[ "$code" = 0 ]'
    check "two devices" '[ "$(count "^2 cpu device")" = 1 ]'
    check "one directory" '[ "$(ls "$here/runs" | wc -l)" = 1 ]'
}

case_resume_auto() {  # all ranks are told which run goes on
    submit resume_auto "-n 2" "srun $short --resume auto && srun $short --resume auto"
    finish
    check "exit code 0" '[ "$code" = 0 ]'
    check "one directory" '[ "$(ls "$here/runs" | wc -l)" = 1 ]'
    check "the second finds the first's, and says so once" '[ "$(count "is finished after")" = 1 ]'
}

case_user_error() {
    submit user_error "-n 2" "srun $short --optim.lr -1"
    finish
    check "exit code 2" '[ "$code" = 2 ]'
    check "told once" '[ "$(count "^error: optim.lr")" = 1 ]'
    submit late_error "-n 2" "srun $short --data.batch_size 3"
    finish
    check "exit code 2" '[ "$code" = 2 ]'
    check "told once, where torch is needed" '[ "$(count "^error: ")" = 1 ]'
}

case_without_srun() {  # what was started is one process
    submit without_srun "--ntasks-per-node 2" "timeout 120 $short --run.dir run"
    finish
    check "exit code 0" '[ "$code" = 0 ]'
    check "one device" '[ "$(count "^1 cpu device")" = 1 ]'
    check "says what is missing" '[ "$(count "srun")" = 1 ]'
}

case_fewer_tasks() {  # one task of the two that were asked for
    submit fewer_tasks "--ntasks-per-node 2" "srun -n 1 $short --run.dir run"
    finish
    check "exit code 0" '[ "$code" = 0 ]'
    check "one device" '[ "$(count "^1 cpu device")" = 1 ]'
    check "no keys are shuffled" '[ "$(count "key BatchNorm: split")" = 1 ]'
}

case_shell() {  # an interactive shell of two tasks, in which one process is started
    here=$folder/shell out=$folder/shell/out
    mkdir -p "$here"
    printf '%s\n' "timeout 120 $short --run.dir run --trainer.devices 1" "echo \"code \$?\"" \
        > "$here/typed.sh"
    (cd "$here" && script -qc "srun --ntasks-per-node 2 -J bash --pty bash typed.sh" out \
        < /dev/null > /dev/null)
    check "exit code 0" 'grep -q "^code 0" "$out"'
    check "one device" '[ "$(count "^1 cpu device")" = 1 ]'
}

case_warned() {  # SIGUSR1 at second 2, in the middle: requeued, and the same bits
    train_undisturbed
    submit early "-n 2 --requeue" "srun $long --resume auto --run.dir run"
    until_true '[ "$(fact JobState)" = RUNNING ]'
    sleep 2
    warn
    finish
    check "second 2: exit code 0 in the end" '[ "$code" = 0 ]'
    check "second 2: requeued once" '[ "$(restarts)" = 1 ]'
    check "second 2: the same bits" '[ "$(weights "$here/run")" = "$expected" ]'

    submit middle "-n 2 --requeue" "srun $long --resume auto --run.dir run"
    until_true '[ -f "$here/run/checkpoints/last.ckpt" ]'
    warn
    finish
    check "middle: exit code 0 in the end" '[ "$code" = 0 ]'
    check "middle: requeued once" '[ "$(restarts)" = 1 ]'
    check "middle: the state was saved" '[ "$(count "stopped by signal 10")" = 1 ]'
    check "middle: one directory, the same bits" '[ "$(weights "$here/run")" = "$expected" ]'
}

case_shards() {  # on two nodes, each of which reads its share; requeued in the middle, the same bits
    local sharded="--data.dataset shards --data.root $folder/set/shards --data.num_workers 1"
    "$python" - "$folder/set" "$root" <<'END'
import sys
from pathlib import Path
from PIL import Image
from sklearn.datasets import load_digits
sys.path.insert(0, sys.argv[2])
from moco.images.packing import pack
folder = Path(sys.argv[1])
(folder / "files").mkdir(parents=True)
for number, digit in enumerate(load_digits().images[:400]):
    Image.fromarray((digit * 15).astype("uint8")).save(folder / f"files/{number:03d}.png")
pack(str(folder / "files"), str(folder / "shards"), 0.02)
END
    export MOCO_CACHE=$folder/cache
    submit shards_alone "-N 2 --ntasks-per-node 1" "srun $long $sharded --run.dir run"
    finish
    check "an undisturbed run: exit code 0" '[ "$code" = 0 ]'
    local alone
    alone=$(weights "$here/run")
    echo "          $alone"
    submit shards "-N 2 --ntasks-per-node 1 --requeue" \
        "srun $long $sharded --resume auto --run.dir run"
    until_true '[ -f "$here/run/checkpoints/last.ckpt" ]'
    warn
    finish
    check "exit code 0 in the end" '[ "$code" = 0 ]'
    check "requeued once" '[ "$(restarts)" = 1 ]'
    check "the state was saved" '[ "$(count "stopped by signal 10")" = 1 ]'
    check "the same bits" '[ "$(weights "$here/run")" = "$alone" ]'
}

case_after_the_result() {  # the process takes five seconds to end
    submit after "-n 2 --requeue" "srun $python -c '
import atexit, sys, time
sys.path.insert(0, \"$root\")
from moco.command import cli, train
atexit.register(time.sleep, 5)
cli.run_main(train.main)' ${short#*train.py} --run.dir run"
    until_true 'grep -q "^{" "$out" 2> /dev/null' && warn
    finish
    check "exit code 0" '[ "$code" = 0 ]'
    check "not requeued" '[ "$(restarts)" = 0 ]'
}

case_time_limit() {  # reached in the middle of a run that takes a minute on any machine
    train_undisturbed
    cat > "$folder/slow.py" <<END
import sys, time
sys.path.insert(0, "$root")
from moco import slurm
from moco.command import cli, train
def main(argv):
    slurm.restartable = True
    from moco.algorithm.pretrain import MoCo
    step = MoCo.training_step
    def slow(*arguments):
        time.sleep(0.3)
        return step(*arguments)
    MoCo.training_step = slow
    return train.main(argv)
cli.run_main(main)
END
    submit limited "-n 2 --requeue --signal USR1@60" \
        "srun $python $folder/slow.py ${long#*train.py} --resume auto --run.dir run"
    until_true '[ -f "$here/run/checkpoints/last.ckpt" ]'
    scontrol update "JobId=$id" TimeLimit=$(($(fact RunTime | cut -d: -f2 | sed 's/^0//') + 1))
    until_true '[ "$(restarts)" = 1 ]'
    until scontrol update "JobId=$id" TimeLimit=UNLIMITED 2> /dev/null; do sleep 0.2; done
    finish
    check "exit code 0 in the end" '[ "$code" = 0 ]'
    check "requeued once" '[ "$(restarts)" = 1 ]'
    check "the state was saved" '[ "$(count "stopped by signal 10")" = 1 ]'
    check "the same bits" '[ "$(weights "$here/run")" = "$expected" ]'
}

all="two_tasks two_nodes resume_auto user_error without_srun fewer_tasks shell warned
 shards after_the_result time_limit"
start_cluster
for name in ${*:-$all}; do
    bad=0
    echo "$name ($(date +%T))"
    "case_$name"
    if [ "$bad" = 1 ]; then sed 's/^/  | /' "$out" | tail -15; fi
done
exit "$failed"
