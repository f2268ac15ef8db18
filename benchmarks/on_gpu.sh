#!/usr/bin/env bash
# Measure on a GPU what the documentation only counts. The calls, in order of worth:
#
#   bash benchmarks/on_gpu.sh speed       seconds per step of every phase: the reference's recipe beside ours
#   bash benchmarks/on_gpu.sh compiled    the same, compiled, phase by phase
#   bash benchmarks/on_gpu.sh limits      --memory balanced and low under 22, 14, 12 and 10 GB
#   bash benchmarks/on_gpu.sh scripts     the scripts themselves, random weights: alignment, anchors, two arcs
#   bash benchmarks/on_gpu.sh guided      ten guided steps of ten, composited, in place of thirty
#   bash benchmarks/on_gpu.sh rotary      diffusers' rotary positions in place of ours
#
# --dry_run does the same with networks of the tiny size, on any machine. Results are written as they come, to *.log
# and *.json in $OUT (default: gpu, for dry runs gpu/dry_run); weights, LoRAs and pictures, 60 GB, lie in gpu/full or
# gpu/tiny. A call that is given again measures again; scripts go on where they were.
#
# A machine without a network needs the tracked files without tests/golden (50 MB), and what it lacks as wheels:
#
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#       -d .wheels diffusers==0.42.1 peft==0.21.2 bitsandbytes==0.50.2 trimesh==5.2.0 mapbox_earcut==2.1.0
#
# (there: pip install --no-index --no-deps --find-links .wheels …; ffmpeg on the PATH serves for imageio-ffmpeg's).
set -uo pipefail
export PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
call=${1:?which call? speed, compiled, limits, scripts, guided, rotary}
weights=full steps=5 training=20 anchors=25 video=30 guided=10
case ${2:-} in
'') ;;
--dry_run) weights=tiny steps=1 training=1 anchors=2 video=2 guided=2 OUT=${OUT:-gpu/dry_run} ;;
*) echo "$2: only --dry_run can follow" >&2 && exit 2 ;;
esac
export OUT=${OUT:-gpu}
work=gpu/$weights random=gpu/$weights/random scene=assets/sampleA
mkdir -p "$OUT"

network() { # NAME FLAGS…: the networks alone
    name=$1 && shift
    "$PYTHON" -m benchmarks.full_size --weights $weights --steps $steps --json "$OUT/$name.json" "$@"
}

script() { # SCRIPT FLAGS…: a script and its peak
    "$PYTHON" -m benchmarks.peak "$@" --weights $weights
}

fill() { # NAME FLAGS…: the frames of both arcs between those anchors
    script ggi.py --output_dir "$work/$1" "${@:2}" --target "$work"/anchors/random_* --scene $scene --prompt '' \
        --cogvideox "$random/cogvideox" --model_path "$random"
}

flux=(--flux "$random/flux" --controlnet "$random/controlnet")

prepare() { # random weights, a LoRA and anchors to fill between
    "$PYTHON" -m benchmarks.random_weights --weights $weights --output "$random" &&
    script sag_distribution_alignment.py --path_image assets/references/boxtown.png --prompt '' --pfix random --edges lines \
        --max_train_steps $training --checkpointing_steps $training --report_to none --output_dir "$work/loras" "${flux[@]}" &&
    script sag_generate_anchor_view.py --target $scene --pfix random --epoch $training --loras "$work/loras" \
        --num_steps $anchors --num_replacement $((anchors / 2)) --seed 0 --output_dir "$work/anchors" "${flux[@]}"
}

measure() {
    case $call in
    speed) network speed ;;
    compiled) for phase in ggi anchors; do network compiled_$phase --phases $phase --compile --no_reference; done ;;
    limits)
        if [ $weights = tiny ]; then limit() { :; }; else limit() { echo --limit_gb "$1"; }; fi
        network balanced --memory balanced --no_reference $(limit 22)
        network low_alignment --phases alignment --memory low --no_reference $(limit 14)
        network low_anchors --phases anchors --memory low --no_reference $(limit 12)
        network low_ggi --phases ggi --memory low --no_reference $(limit 10) ;;
    scripts) prepare && fill paper --num_inference_steps $video ;;
    guided) prepare && fill guided --num_inference_steps $guided --num_replacement $guided --composite ;;
    rotary) network rotary --phases anchors,ggi --no_reference --diffusers_rotary ;;
    *) echo "error: no call $call: speed, compiled, limits, scripts, guided, rotary" >&2; return 2 ;;
    esac
}

measure 2>&1 | tee "$OUT/$call.log"
