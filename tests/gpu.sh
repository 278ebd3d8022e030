#!/usr/bin/env bash
# What tells most on a first GPU, in ten minutes: each step has its own time limit, a log, and one
# line in summary.txt. Run by hand; the figures belong in docs/benchmarks.md with card and date.
# The step `peers` needs accelerate (pip install accelerate).
#
#   tests/gpu.sh [OUT [STEP...]]                # logs in OUT (default: gpu_results); all steps
#   tests/gpu.sh --rehearse [OUT [STEP...]]     # the same steps with tiny sizes, on a CPU
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
rehearse=
if [[ ${1-} == --rehearse ]]; then
    rehearse=1
    shift
fi
out=$(realpath -m "${1:-gpu_results}")
shift $(($# > 0))
chosen=" $* "
mkdir -p "$out"
: >"$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }

# run NAME SECONDS COMMAND...: one line with the result, how long it took, and its last line
run() {
    local name=$1 limit=$2 begin=$SECONDS code=0
    shift 2
    [[ $chosen == "  " || $chosen == *" $name "* ]] || return 0
    [[ ! $rehearse ]] || limit=$((4 * limit)) # a CPU is slow
    timeout --kill-after 10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    say "$(printf '%-11s code %-3s %4s s | %s' "$name" "$code" "$((SECONDS - begin))" \
        "$(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c 1-160)")"
}

# a step's flags on a GPU, and in a rehearsal
if [[ $rehearse ]]; then
    where=cpu
    tests=(-n 2 tests/test_wavlm.py)
    layer=(--frames 50 --tokens 100 --runs 1)
    attention=("${layer[@]}") # a whole model takes minutes to compile
    peers=(--wavlm tiny --utterances 12 --steps 2 --runs 1 --batch_size 4 --contestants vatune)
    frozen=(--wavlm tiny --unfreeze top:2 --seconds 1 --batch_size 2 --runs 1)
    checkpoint=(--gb 0.01 --runs 1)
    demo=(--max_steps 2)
else
    where=cuda
    tests=(-n auto)
    layer=(--amp fp16 --tokens 9600)
    attention=(--model large --amps fp16 --seconds 5 --batch_sizes 16 --runs 5)
    peers=(--wavlm large --amp fp16 --utterances 700 --steps 40 --runs 1 --batch_size 16)
    frozen=(--wavlm large --unfreeze top:6 --amp fp16 --batch_size 16)
    checkpoint=()
    demo=()
fi

say "$(git rev-parse --short HEAD), $(date +%F), $(python -c 'import torch
print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")')"
run tests 240 env TEST_DEVICE="$where" python -m pytest -v -p no:cacheprovider "${tests[@]}" &
run memory 240 python tests/bench_memory.py --quick & # neither is timed
wait
run peers 160 python tests/bench_peers.py "${peers[@]}"
run layer 60 python tests/bench_attention.py "${layer[@]}"
run attention 150 python tests/bench_attention.py "${attention[@]}"
run calibrate 40 python memory.py --calibrate --device "$where" --cache_dir "$out/cache"
run frozen 60 python tests/bench_frozen.py "${frozen[@]}"
run checkpoint 60 python tests/bench_checkpoint.py "${checkpoint[@]}"
run demo 120 python train.py --preset demo --prosody none --device "$where" "${demo[@]}" \
    --out "$out" --name demo --overwrite --cache_dir "$out/cache"
! grep -qv ' code 0 ' <(tail -n +2 "$out/summary.txt")
