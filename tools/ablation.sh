#!/usr/bin/env bash
# The ablation of experiments/ABLATION.md: encoder, all rows of configs/ablation.py with three seeds, table and figure.
#   bash tools/ablation.sh [OUT [DATA]]
# DATA is a mixture, DIR[=WEIGHT],DIR; without it, demonstrations of the embedded environment are made, with moving
# distractors and camera shake. A second run resumes what the first one left.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh

out=${1:-runs/ablation} data=${2:-datasets/tabletop_moving}
if [ $# -lt 2 ] && [ ! -d "$data" ]; then
  python -m tools.datasets.build tabletop --out "$data" --episodes 400 --noise 0.1 --look moving
fi
python -m experiments.pretrain --config configs/ablation.py:encoder --workdir "$out/encoder" --data "$data"
python -m experiments.sweep --config configs/ablation.py --variants "${ROWS:-all}" --seeds "${SEEDS:-0,1,2}" \
  --data "$data" --out "$out" --set encoder.init_from="$out/encoder" --processes "${PROCESSES:-2}"
cat "$out/table.md"
