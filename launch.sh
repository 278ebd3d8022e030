#!/usr/bin/env bash
# Train folds in parallel: a queue over GPUs, or over CPU slots where there is no GPU.
#
#   ./launch.sh --folds 1-5 -- --preset demo                       on the CPU, two folds at a time
#   ./launch.sh --folds 1-5 --gpus 0,1,2,3 -- --data iemocap ...   one GPU per fold
#   ./launch.sh --folds 1,3-5 --gpus 0,1,2,3 --nproc_per_fold 2 -- ...   two GPUs per fold, torchrun
#   ./launch.sh status runs/demo                                   how far its folds are
#
#   --folds LIST          1-5, or 1,3,5, or a mix
#   --gpus LIST           default: CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists
#   --nproc_per_fold N    GPUs (on the CPU: processes) per fold; default 1
#   --jobs N              folds at a time on the CPU; default 2
#   --retries N           run a failed or stopped fold again, with --resume, up to N times; default 0
#   -- FLAGS              for train.py; all but --fold
#
# Each fold appends to OUT/NAME/fold<K>.log. A failed fold does not stop the others. At the end
# report.py prints the folds asked for. Environment: PYTHON (default python), OMP_NUM_THREADS
# (default cores / processes at a time). Ctrl-C gives folds 30 s to write last.pt, then kills.
# Exit code: 0 all folds done; 1 a fold failed; 2 wrong flags, nothing started; 75 none failed, but
# one was stopped by a signal, or the launcher by SIGUSR1; 130 Ctrl-C, 143 SIGTERM, 129 hang-up.
# Needs Linux and bash 5.

set -euo pipefail

say() { printf '%(%H:%M:%S)T %s\n' -1 "$*"; }
clock() { printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }
refuse() { printf 'launch.sh: error: %s\n' "$*" >&2; exit 2; }
whole() { [[ $2 =~ ^(0|[1-9][0-9]{0,3})$ && $2 -ge $3 ]] || refuse "$1 $2: a number from $3"; }

python=${PYTHON:-python}
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
[[ ${1-} != status ]] || exec "$python" "$here/report.py" --status "${@:2}"
folds_text='' gpus_text='' nproc=1 jobs='' retries=0
while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 == --help || $1 == -h ]]; then
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
    fi
    [[ $1 =~ ^--(folds|gpus|nproc_per_fold|jobs|retries)$ ]] ||
        refuse "no such flag: $1 (see --help; train.py's flags go behind --)"
    (($# > 1)) || refuse "$1 needs a value"
    case $1 in
        --folds) folds_text=$2 ;;
        --gpus) gpus_text=$2 ;;
        --nproc_per_fold) whole "$1" "$2" 1; nproc=$2 ;;
        --jobs) whole "$1" "$2" 1; jobs=$2 ;;
        --retries) whole "$1" "$2" 0; retries=$2 ;;
    esac
    shift 2
done
(($# == 0)) || shift # the --
flags=("$@")
for flag in "${flags[@]}"; do
    [[ $flag != --fold && $flag != --fold=* ]] || refuse "$flag: use --folds, before --"
done

# Folds: 1-3,5 is 1 2 3 5
item='[1-9][0-9]{0,3}(-[1-9][0-9]{0,3})?'
[[ $folds_text =~ ^$item(,$item)*$ ]] ||
    refuse "--folds '$folds_text': give 1-5, or 1,3,5, or a mix"
folds=()
IFS=, read -r -a items <<<"$folds_text"
for item in "${items[@]}"; do
    ((${item%-*} <= ${item#*-})) || refuse "--folds $item: the first is above the last"
    for ((fold = ${item%-*}; fold <= ${item#*-}; fold++)); do
        [[ " ${folds[*]} " != *" $fold "* ]] || refuse "--folds $folds_text: fold $fold twice"
        folds+=("$fold")
    done
done

# Interrupted in any phase, nothing stays behind. Folds run in process groups of their own, out of
# reach of the terminal's Ctrl-C. SIGTERM goes to the leader (train.py or torchrun) and not to the
# group: a loader worker that dies of it takes the checkpoint with it.
launch_id=$$-$EPOCHREALTIME
helper='' # the flag check or the report, waited for in the background: traps run at once
declare -A pid_of=() slot_of=() began=() attempts=()
sweep() { # FOLD: kill what is left of it; torchrun's ranks are in sessions of their own, so by mark
    local pid
    kill -KILL -- "-${pid_of[$1]-none}" 2>/dev/null || true
    while IFS=/ read -r _ _ pid _; do
        kill -KILL "$pid" 2>/dev/null || true
    done < <(grep -lsxzF "VATUNE_LAUNCH=$launch_id-$1" /proc/[0-9]*/environ)
}
# shellcheck disable=SC2317,SC2329 # reached through the trap
stop_all() {
    local pid fold deadline=$((SECONDS + 30))
    trap '' INT TERM HUP USR1
    [[ -z $helper ]] || { kill -TERM "$helper" && wait "$helper"; } 2>/dev/null || true
    [[ -n $(jobs -pr) ]] || return 0
    say "stopping: folds have 30 s to write their checkpoints"
    for pid in $(jobs -pr); do kill -TERM "$pid" 2>/dev/null || true; done
    while [[ -n $(jobs -pr) ]] && ((SECONDS < deadline)); do sleep 0.2; done
    for fold in "${folds[@]}"; do sweep "$fold"; done
    say "stopped: go on with the same command and --resume at its end (--overwrite taken out)"
}
trap stop_all EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 75' USR1

# train.py checks its flags and names the run directory (on descriptor 3: stdout is train.py's own)
ask='import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path.insert(0, sys.argv.pop(1))
sys.argv[0] = "train.py"
import train
args = train.parse_args()
print(args.device, train.run_dir(args).parent, sep="\n", file=open(3, "w"))'
exec {answers}< <(
    WORLD_SIZE=$nproc exec "$python" -c "$ask" "$here" "${flags[@]}" --fold "${folds[0]}" 3>&1 1>&2)
helper=$!
wait "$helper"
helper='' answer=$(cat <&"$answers")
exec {answers}<&-
[[ -n $answer ]] || exit 0 # train.py --help
device=${answer%%$'\n'*}
experiment=${answer#*$'\n'}

# Slots: the CUDA_VISIBLE_DEVICES of one fold each, or "" on the CPU
if [[ -z $gpus_text && $device != cpu ]]; then
    gpus_text=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader \
        2>/dev/null | grep -x '[0-9]*' | paste -sd, || true)}
fi
gpus=() slots=()
if [[ -n $gpus_text && $gpus_text != -1 ]]; then
    item='[[:alnum:]/-]+' # a number, or the UUID of a card or of a MIG slice
    [[ $gpus_text =~ ^$item(,$item)*$ ]] || refuse "--gpus '$gpus_text': give 0,1,2"
    IFS=, read -r -a gpus <<<"$gpus_text"
    [[ -z $(printf '%s\n' "${gpus[@]}" | sort | uniq -d) ]] || refuse "--gpus $gpus_text: one twice"
    [[ -z $jobs ]] || refuse "--jobs is for the CPU; on GPUs --nproc_per_fold divides ${#gpus[@]}"
    for ((i = 0; i + nproc <= ${#gpus[@]}; i += nproc)); do
        slots+=("$(IFS=,; echo "${gpus[*]:i:nproc}")")
    done
    ((${#slots[@]})) || refuse "--nproc_per_fold $nproc: only ${#gpus[@]} GPUs ($gpus_text)"
else
    for ((i = 0; i < ${jobs:-2}; i++)); do slots+=(''); done
fi
slots=("${slots[@]:0:${#folds[@]}}")
threads=$(($(nproc) / (${#slots[@]} * nproc)))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 # torchrun passes them on

start() { # FOLD SLOT
    local fold=$1 visible=${slots[$2]} log=$experiment/fold$1.log last=$experiment/fold$1/last.pt
    local marks=("VATUNE_LAUNCH=$launch_id-$fold") command=("$python") again=("${flags[@]}")
    [[ -z $visible ]] || marks+=("CUDA_VISIBLE_DEVICES=$visible")
    ((nproc == 1)) || command+=(-m torch.distributed.run --standalone --nproc_per_node "$nproc")
    attempts[$fold]=$((${attempts[$fold]:-0} + 1))
    # --overwrite stays until this launch has written a checkpoint, or an older run would be resumed
    if ((attempts[$fold] > 1)) && { [[ " ${flags[*]} " != *" --overwrite "* ]] ||
        [[ $(date -r "$last" +%s 2>/dev/null || echo 0) -ge $launched ]]; }; then
        again=("${flags[@]/#--overwrite/--resume}" --resume)
    fi
    command+=("$here/train.py" "${again[@]}" --fold "$fold")
    printf '=== %(%F %T)T attempt %d: %s\n' -1 "${attempts[$fold]}" "${command[*]@Q}" >>"$log"
    set -m # a process group of its own
    env "${marks[@]}" "${command[@]}" >>"$log" 2>&1 </dev/null &
    pid_of[$fold]=$! slot_of[$fold]=$2 began[$fold]=$SECONDS
    set +m
    say "fold $fold started on ${visible:+GPU }${visible:-CPU}: $log"
}

ending() { # FOLD CODE: its exit code; torchrun turns all into 1, then status.json has the true one
    local file=$experiment/fold$1/status.json told=''
    if [[ -f $file && $(date -r "$file" +%s) -ge $((EPOCHSECONDS - SECONDS + began[$1])) ]]; then
        told=$(grep -oP '"exit_code": \K(2|75)(?=,)' "$file" || true)
    fi
    echo "${told:-$2}"
}

mkdir -p -- "$experiment"
launched=$EPOCHSECONDS
say "$experiment: folds ${folds[*]}, ${#slots[@]} at a time, $OMP_NUM_THREADS threads per process"
queue=("${folds[@]}") free=("${!slots[@]}") failed=() stopped=0
while ((${#queue[@]} + ${#pid_of[@]})); do
    while ((${#queue[@]} && ${#free[@]})); do
        start "${queue[0]}" "${free[0]}"
        queue=("${queue[@]:1}") free=("${free[@]:1}")
    done
    sleep 0.5 # and not wait -n, which misses a fold killed by a signal while another is started
    for fold in "${!pid_of[@]}"; do
        ! kill -0 "${pid_of[$fold]}" 2>/dev/null || continue
        code=0
        wait "${pid_of[$fold]}" || code=$?
        sweep "$fold"
        took=$(clock $((SECONDS - began[$fold]))) log=$experiment/fold$fold.log
        free+=("${slot_of[$fold]}")
        unset "pid_of[$fold]"
        ((code == 0)) || code=$(ending "$fold" "$code")
        how="failed with exit code $code"
        ((code != 75)) || how='was stopped by a signal'
        if ((code == 0)); then
            say "fold $fold done in $took: $log"
        elif ((code != 2 && attempts[$fold] <= retries)); then
            say "fold $fold $how after $took, to be resumed: $log"
            queue+=("$fold")
        else
            say "fold $fold $how after $took: $log"
            failed+=("$fold")
            ((code != 75)) || ((stopped += 1))
        fi
    done
done

status=0 asked=(--folds "$(IFS=,; echo "${folds[*]}")")
((${#failed[@]} == 0)) || asked+=(--failed "$(IFS=,; echo "${failed[*]}")")
"$python" "$here/report.py" "${asked[@]}" -- "$experiment" &
helper=$!
wait "$helper" || status=$?
helper=''
for fold in "${failed[@]}"; do
    printf '\nfold %s is missing; the end of %s:\n' "$fold" "$experiment/fold$fold.log"
    tail -n 8 -- "$experiment/fold$fold.log" | sed 's/^/    /'
done
((${#failed[@]} == stopped)) || exit 1
((stopped == 0)) || exit 75
exit "$status"
