#!/usr/bin/env bash
# From nothing to a pretrained motion model on embedded data, in about ten minutes of two CPU cores.
# A second run resumes what the first one left.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh

data=datasets/tabletop runs=runs/quickstart
if [ ! -d "$data" ]; then
  echo "1/3 Demonstrations of the embedded environment"
  python -m tools.datasets.build tabletop --out "$data" --episodes 400 --noise 0.1
fi
echo "2/3 Masked autoencoder: the frame encoder"
python -m experiments.pretrain --config configs/pretrain_mae.py:tiny --workdir "$runs/mae" --data "$data"
echo "3/3 CoMo: the motion model"
python -m experiments.pretrain --config configs/pretrain_como.py:tiny --workdir "$runs/como" --data "$data" \
  --config.encoder.init_from="$runs/mae"

cat <<END

Done.
  model        $PWD/$runs/como/checkpoints
  TensorBoard  pip install tensorboard && tensorboard --logdir $PWD/$runs
  predictions  $(ls "$PWD/$runs"/como/images/eval_val_*.png | tail -n 1)
               each row: current frame, predicted frame, true frame, error
END
