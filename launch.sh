#!/usr/bin/env bash
# Train folds in parallel: a queue over GPUs, or over CPU slots if there is no GPU.
#
#   ./launch.sh --folds 1-5 -- --preset demo                       on the CPU, two folds at a time
#   ./launch.sh --folds 1-5 --gpus 0,1,2,3 -- --data iemocap ...   one GPU per fold
#   ./launch.sh --folds 1,3-5 --gpus 0,1,2,3 --nproc_per_fold 2 -- ...   two GPUs per fold, torchrun
#   ./launch.sh --folds 1-5 --seeds 0-4 -- ...           25 runs, OUT/NAME/seed0/fold1 and so on
#
#   --folds LIST          1-5, or 1,3,5, or a mix
#   --seeds LIST          every fold with each of these; default: once, with train.py's --seed
#   --gpus LIST           default: CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists
#   --nproc_per_fold N    GPUs (on the CPU: processes) per fold; default 1
#   --jobs N              folds at a time on the CPU; default 2
#   --retries N           run a failed or stopped fold again, with --resume, up to N times; default 0
#   -- FLAGS              flags of train.py except --fold, and --seed beside --seeds
#
# Each fold appends to OUT/NAME/fold<K>.log, or OUT/NAME/seed<S>/fold<K>.log. A failed fold does not
# stop the others. At the end report.py prints the requested folds. Environment: PYTHON (default
# python), OMP_NUM_THREADS (default cores / processes at a time). Ctrl-C gives folds 30 s to write
# last.pt, then kills them.
# Exit code: 0 all folds done; 1 a fold failed; 2 wrong flags, nothing started; 75 none failed, but
# one was stopped by a signal, or the launcher by SIGUSR1; 130 Ctrl-C, 143 SIGTERM, 129 hang-up.
# Needs Linux and bash 5.

set -euo pipefail

say() { printf '%(%H:%M:%S)T %s\n' -1 "$*" || true; } 2>/dev/null
refuse() { printf 'launch.sh: error: %s\n' "$*" >&2; exit 2; }
distinct() { [[ -z $(printf '%s\n' "$@" | sort | uniq -d) ]]; }
since() { [[ $(date -r "$2" +%s 2>/dev/null || echo 0) -ge $1 ]]; } # TIME FILE: written since then?
join() { local IFS=,; echo "$*"; }

python=${PYTHON:-python}
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
declare -A given=([folds]='' [gpus]='' [nproc_per_fold]=1 [jobs]='' [retries]=0)
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --folds | --seeds | --gpus | --nproc_per_fold | --jobs | --retries) ;;
        *) refuse "no such flag: $1 (see --help; train.py's flags go after --)" ;;
    esac
    (($# > 1)) || refuse "$1 needs a value"
    [[ $1 =~ ^--(folds|seeds|gpus)$ || $2 =~ ^[1-9][0-9]{0,3}$ || "$1 $2" == '--retries 0' ]] ||
        refuse "$1 $2: give a number"
    given[${1#--}]=$2
    shift 2
done
flags=("${@:2}") # without the --
for flag in "${flags[@]}"; do
    [[ $flag != --fold && $flag != --fold=* ]] || refuse "$flag: use --folds, before --"
    [[ ! -v given[seeds] || ($flag != --seed && $flag != --seed=*) ]] ||
        refuse "$flag: use --seeds alone, before --"
done
nproc=${given[nproc_per_fold]}

expand() { # WORD NUMBER EXAMPLE: sets `numbers` to those of the list that --WORDs gives
    local list=${given[$1s]} part
    [[ $list =~ ^$2(-$2)?(,$2(-$2)?)*$ ]] || refuse "--$1s '$list': give $3, or a mix"
    numbers=()
    for part in ${list//,/ }; do
        ((${part%-*} <= ${part#*-})) || refuse "--$1s $part: the first is above the last"
        mapfile -t -O ${#numbers[@]} numbers < <(seq "${part%-*}" "${part#*-}")
    done
    distinct "${numbers[@]}" || refuse "--$1s $list: a $1 is named twice"
}
expand fold '[1-9][0-9]{0,3}' '1-5, or 1,3,5'
folds=("${numbers[@]}") seeds=('') runs=()
if [[ -v given[seeds] ]]; then
    expand seed '(0|[1-9][0-9]{0,3})' '0-4, or 0,2,4'
    seeds=("${numbers[@]}")
fi
for seed in "${seeds[@]}"; do
    for fold in "${folds[@]}"; do runs+=("${seed:+seed$seed/}fold$fold"); done
done

# An interrupt, at any time, leaves no process behind. Folds run in process groups of their own, so
# the terminal's Ctrl-C does not reach them. SIGTERM goes to the leader (train.py or torchrun) and
# not to the group, since a loader worker that dies of it would keep train.py from saving.
launch_id=$$-$EPOCHREALTIME
helper='' # pid of the flag check or of the report: they run in the background, so traps run at once
declare -A pid_of=() slot_of=() began=() attempts=()
sweep() { # RUN: kill what is left of it; torchrun's ranks are in other sessions, so find the mark
    local pid
    kill -KILL -- "-${pid_of[$1]-none}" 2>/dev/null || true
    while IFS=/ read -r _ _ pid _; do
        kill -KILL "$pid" 2>/dev/null || true
    done <<<"$(grep -lsxzF "VATUNE_LAUNCH=$launch_id-$1" /proc/[0-9]*/environ)" # waits for grep
}
# shellcheck disable=SC2317,SC2329 # reached through the trap
stop_all() {
    local pid run deadline=$((SECONDS + 30))
    trap '' INT TERM HUP USR1
    [[ -z $helper ]] || { kill -TERM "$helper" && wait "$helper"; } 2>/dev/null || true
    [[ -n $(jobs -pr) ]] || return 0
    say "stopping: folds have 30 s to write their checkpoints"
    for pid in $(jobs -pr); do kill -TERM "$pid" 2>/dev/null || true; done
    while [[ -n $(jobs -pr) ]] && ((SECONDS < deadline)); do sleep 0.2; done
    for run in "${runs[@]}"; do sweep "$run"; done
    say "stopped: to continue, give the same command with --resume at its end, without --overwrite"
}
trap stop_all EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 75' USR1
trap '' PIPE # `./launch.sh ... | head`: the folds go on

# flags.py checks the flags and gives device, directory and name, on descriptor 3: it may print on
# stdout
ask='import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path.insert(0, sys.argv.pop(1))
sys.argv[0] = "train.py"
import flags, util.runs
args = flags.parse_args(world_size=int(sys.argv.pop(1)))
directory = util.runs.run_dir(args).parent
print(args.device, directory, args.name, sep="\n", file=open(3, "w"))'
exec {answers}< <(
    exec "$python" -c "$ask" "$here" "$nproc" "${flags[@]}" --fold "${folds[0]}" 3>&1 1>&2)
helper=$!
wait "$helper"
helper=''
{ IFS= read -r device && IFS= read -r experiment && IFS= read -r name; } <&"$answers" ||
    exit 0 # train.py --help
exec {answers}<&-

# Slots: each runs one fold at a time, on the GPUs named in it, or on the CPU if it is empty
gpus=() slots=()
if [[ -z ${given[gpus]} && $device != cpu ]]; then
    given[gpus]=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader \
        2>/dev/null | grep -x '[0-9]*' | paste -sd, || true)}
fi
if [[ -n ${given[gpus]} && ${given[gpus]} != -1 ]]; then
    gpu='[[:alnum:]/-]+' # a number, or the UUID of a card or of a MIG slice
    [[ ${given[gpus]} =~ ^$gpu(,$gpu)*$ ]] || refuse "--gpus '${given[gpus]}': give 0,1,2"
    IFS=, read -r -a gpus <<<"${given[gpus]}"
    distinct "${gpus[@]}" || refuse "--gpus ${given[gpus]}: a GPU is named twice"
    [[ -z ${given[jobs]} ]] || refuse "--jobs is for the CPU; on GPUs give --nproc_per_fold"
    for ((i = 0; i + nproc <= ${#gpus[@]}; i += nproc)); do
        slots+=("$(join "${gpus[@]:i:nproc}")")
    done
    ((${#slots[@]})) || refuse "--nproc_per_fold $nproc: only ${#gpus[@]} GPUs (${given[gpus]})"
else
    for ((i = 0; i < ${given[jobs]:-2}; i++)); do slots+=(''); done
fi
slots=("${slots[@]:0:${#runs[@]}}")
threads=$(($(nproc) / (${#slots[@]} * nproc)))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 # torchrun passes them on

start() { # RUN SLOT
    local run=$1 seed='' visible=${slots[$2]} log=$experiment/$1.log again=("${flags[@]}")
    local marks=("VATUNE_LAUNCH=$launch_id-$run") command=("$python")
    [[ -z $visible ]] || marks+=("CUDA_VISIBLE_DEVICES=$visible")
    ((nproc == 1)) || command+=(-m torch.distributed.run --standalone --nproc_per_node "$nproc")
    attempts[$run]=$((${attempts[$run]:-0} + 1))
    # --overwrite stays until this launch has written a checkpoint, or an older run would be resumed
    if ((attempts[$run] > 1)) && { [[ " ${flags[*]} " != *" --overwrite "* ]] ||
        since "$launched" "$experiment/$run/last.pt" ||
        since "$launched" "$experiment/$run/result.json"; }; then
        again=("${flags[@]/#--overwrite/--resume}" --resume)
    fi
    command+=("$here/train.py" "${again[@]}")
    if [[ $run == seed* ]]; then
        seed=${run%/*}
        command+=(--seed "${seed#seed}" --name "$name/$seed")
    fi
    command+=(--fold "${run##*fold}")
    mkdir -p -- "$experiment/$seed"
    printf '=== %(%F %T)T attempt %d: %s\n' -1 "${attempts[$run]}" "${command[*]@Q}" >>"$log"
    set -m # a process group of its own
    env "${marks[@]}" "${command[@]}" >>"$log" 2>&1 </dev/null &
    pid_of[$run]=$! slot_of[$run]=$2 began[$run]=$EPOCHSECONDS
    set +m
    say "${run/#fold/fold } started on ${visible:+GPU }${visible:-CPU}: $log"
}

ended() { # RUN CODE: frees its slot, then queues the run again or notes that it failed
    local run=$1 code=$2 status=$experiment/$1/status.json log=$experiment/$1.log how took
    local title=${1/#fold/fold }
    sweep "$run"
    if ((code)) && since "${began[$run]}" "$status"; then # torchrun turns every code into 1
        code=$(grep -oP '"exit_code": \K(2|75)(?=,)' "$status" || echo "$code")
    fi
    took=$((EPOCHSECONDS - began[$run]))
    took=$(printf '%d:%02d:%02d' $((took / 3600)) $((took / 60 % 60)) $((took % 60)))
    free+=("${slot_of[$run]}")
    unset "pid_of[$run]"
    how="failed with exit code $code"
    ((code != 75)) || how='was stopped by a signal'
    if ((code == 0)); then
        say "$title done in $took: $log"
    elif ((code != 2 && attempts[$run] <= given[retries])); then
        say "$title $how after $took, to be resumed: $log"
        queue+=("$run")
    else
        say "$title $how after $took: $log"
        failed+=("$run")
        ((code != 75)) || ((stopped += 1))
    fi
}

mkdir -p -- "$experiment"
launched=$EPOCHSECONDS
what="folds ${folds[*]}"
[[ ! -v given[seeds] ]] || what+=" with seeds ${seeds[*]}"
say "$experiment: $what, ${#slots[@]} at a time, $OMP_NUM_THREADS threads per process"
queue=("${runs[@]}") free=("${!slots[@]}") failed=() stopped=0
while ((${#queue[@]} + ${#pid_of[@]})); do
    while ((${#queue[@]} && ${#free[@]})); do
        start "${queue[0]}" "${free[0]}"
        queue=("${queue[@]:1}") free=("${free[@]:1}")
    done
    sleep 0.5 # and not wait -n, which misses a fold killed by a signal while another is started
    for run in "${!pid_of[@]}"; do
        ! kill -0 "${pid_of[$run]}" 2>/dev/null || continue
        code=0
        wait "${pid_of[$run]}" || code=$?
        ended "$run" "$code"
    done
done

status=0 report=("$here/report.py" --folds "$(join "${folds[@]}")")
[[ ! -v given[seeds] ]] || report+=(--seeds "$(join "${seeds[@]}")")
((${#failed[@]} == 0)) || report+=(--failed "$(join "${failed[@]#fold}")")
"$python" "${report[@]}" -- "$experiment" &
helper=$!
wait "$helper" || status=$?
((status != 141)) || status=0 # nobody reads the output any more
helper=''
for run in "${failed[@]}"; do
    printf '\n%s is missing; the end of %s:\n' "${run/#fold/fold }" "$experiment/$run.log"
    tail -n 8 -- "$experiment/$run.log" | sed 's/^/    /'
done
((${#failed[@]} == stopped)) || exit 1
((stopped == 0)) || exit 75
exit "$status"
