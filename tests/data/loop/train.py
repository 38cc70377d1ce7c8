"""Editable: the model and how it is trained. Prints a summary with the metric after `---`."""

import os
import time

import numpy as np
from prepare import STEPS, WIDTH, batches, evaluate_bpb

LR = 0.01
MOMENTUM = 0.0
SEED = int(os.environ.get("SEED", "42"))

started = time.time()
weights = 0.1 * np.random.default_rng(SEED).standard_normal(WIDTH)
speed = np.zeros(WIDTH)
data = batches("train", SEED)


def predict(x):
    """The model."""
    return x @ weights


for _ in range(STEPS):
    x, y = next(data)
    gradient = 2 * x.T @ (predict(x) - y) / len(y)
    speed = MOMENTUM * speed - LR * gradient
    weights += speed

np.save("weights.npy", weights)
print("---")
print(f"val_bpb:          {evaluate_bpb(predict):.6f}")
print(f"training_seconds: {time.time() - started:.1f}")
print(f"num_steps:        {STEPS}")
