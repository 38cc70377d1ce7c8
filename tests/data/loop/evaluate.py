"""Fixed: scores saved weights without running anything that was changed."""

import json
import sys

import numpy as np
from prepare import evaluate_bpb

weights = np.load("weights.npy", allow_pickle=False)
loss = evaluate_bpb(lambda x: x @ weights, sys.argv[1])
with open("score.json", "w") as file:
    json.dump({"eval": {"bpb": loss}}, file)
