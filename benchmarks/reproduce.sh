#!/usr/bin/env bash
# The paper's evaluations, end to end: docs/reproduce.md says what to expect. Needs a GPU and the data sets named below;
# what was finished is not done again. RUN, IMAGENET, ADE20K, VOC, COCO, SAM, SAM_WEIGHTS (a file, where it cannot be
# downloaded), LLAVA, OUT, TEACHERS and BATCH (of the timings) come from the environment.
#
# RADIO_SMALL=1 tries the whole way in minutes on a CPU, offline: with stand-ins for the data sets, made of PHOTOS (a folder of
# photos; those in scikit-image unless told), random weights of CLIP and SAM, and a student of a few steps. No figure means anything.
set -euo pipefail

OUT=${OUT:-results}
mkdir -p "$OUT"

knobs=() # of the segmentations
few=()
if [ -n "${RADIO_SMALL:-}" ]; then
    made="$OUT/small"
    [ -e "$made/done" ] || python "$(dirname "$0")/small_data.py" "$made" ${PHOTOS:+--photos "$PHOTOS"}
    IMAGENET="$made/imagenet" ADE20K="$made/ADEChallengeData2016" VOC="$made/VOCdevkit/VOC2012" COCO="$made/coco"
    SAM=sam-vit-b SAM_WEIGHTS="$made/sam_vit_b.pth" TEACHERS="teacher:efficientnet-lite0" BATCH=4 RUN="$made/run"
    if [ ! -e "$RUN/student.json" ]; then
        radio-cache build --images "$IMAGENET/train" --limit 12 --shuffle-seed 0 --teacher efficientnet-lite0 \
            --teacher openclip-vit-h-14 --weights "openclip-vit-h-14=$made/clip.pt" --teacher sam-vit-b --weights "sam-vit-b=$SAM_WEIGHTS" \
            --codec half --out "$made/cache.zarr"
        radio-train --cache "$made/cache.zarr" --student e-radio-tiny --image-size 96 --batch-size 4 --steps 20 --out "$RUN"
    fi
    knobs=(--crop 96 --steps 60)
    few=(--repeats 2)
fi

TEACHERS=${TEACHERS:-"teacher:clip teacher:dinov2 teacher:openai-clip-vit-l-14-336"}
student=()
[ -n "${RUN:-}" ] && student=(--run "$RUN")
models=()
for teacher in $TEACHERS; do models+=(--model "$teacher"); done
clips=()
for teacher in $TEACHERS; do case $teacher in *clip*) clips+=(--model "$teacher") ;; esac; done

failed=()
once() {  # once NAME COMMAND...: unless its record is there; the others go on where one fails
    local record="$OUT/$1.json"
    shift
    if [ -e "$record" ]; then echo "$record is there"; return; fi
    echo "$*"
    "$@" --json "$record" | tee "${record%.json}.txt" || failed+=("$record")
}

if [ -n "${IMAGENET:-}" ]; then
    once zero-shot radio-eval zero-shot --images "$IMAGENET/val" "${student[@]}" "${clips[@]}"
    once knn radio-eval knn --bank "$IMAGENET/train" --queries "$IMAGENET/val" "${student[@]}" "${models[@]}"
else
    echo "IMAGENET is not set: no zero-shot, no k-NN"
fi
if [ -n "${ADE20K:-}" ]; then
    once ade20k radio-eval segment --ade20k "$ADE20K" "${student[@]}" "${models[@]}" "${knobs[@]}" --pictures "$OUT/ade20k.png"
else
    echo "ADE20K is not set: no segmentation of it"
fi
if [ -n "${VOC:-}" ]; then
    once voc radio-eval segment --voc "$VOC" "${student[@]}" "${models[@]}" "${knobs[@]}" --pictures "$OUT/voc.png"
else
    echo "VOC is not set: no segmentation of it"
fi
if [ -n "${COCO:-}" ]; then
    once sam radio-eval sam --annotations "$COCO/annotations/instances_val2017.json" --images "$COCO/val2017" \
        --sam "${SAM:-sam}" ${SAM_WEIGHTS:+--weights "$SAM_WEIGHTS"} "${student[@]}" --pictures "$OUT/sam.png"
else
    echo "COCO is not set: no masks in SAM's place"
fi
if [ -n "${RUN:-}" ]; then
    once vlm-wiring radio-eval vlm --check --run "$RUN"
fi
if [ -n "${LLAVA:-}" ]; then
    once vlm radio-eval vlm --llava "$LLAVA" --out "$OUT/lmms-eval"
else
    echo "LLAVA is not set: no questions about pictures"
fi
timed=(--batch-size "${BATCH:-128}" --mode eager --mode channels-last --mode compiled --dtype float32 --dtype bfloat16 "${few[@]}")
quality=()
[ -e "$OUT/knn.json" ] && quality=(--quality "$OUT/knn.json" --plot "$OUT/pareto.svg")
once throughput radio-eval throughput "${student[@]}" "${models[@]}" "${timed[@]}" "${quality[@]}"
[ ${#failed[@]} = 0 ] || { echo "not made: ${failed[*]}" >&2; exit 1; }
