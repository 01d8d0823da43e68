"""A training run that says what it does, for a test that kills it anywhere.

Usage: train_killed.py CONFIG RUN AUDIT. Prints "step N" before each step and "save N" before each
checkpoint; AUDIT gets a line of JSON, [step, samples], with every batch.
"""

import json
import sys
from pathlib import Path

from train.data.batch import Batch
from train.run import loop
from train.run.checkpoints import Checkpoints, Progress
from train.run.config import load_train_config
from train.run.splits import open_corpora


def say(what: str, step: int) -> None:
    print(what, step, flush=True)


def save(self: Checkpoints, state, progress: Progress, *args, **options) -> None:
    say("save", progress.step)
    _SAVE(self, state, progress, *args, **options)


_SAVE = Checkpoints.save


if __name__ == "__main__":
    config, run, audit = map(Path, sys.argv[1:])
    Checkpoints.save = save
    cfg = load_train_config(config)
    with audit.open("a") as file:

        def observe(step: int, batch: Batch) -> None:
            file.write(json.dumps([step, batch.sample.tolist()]) + "\n")
            file.flush()
            say("step", step)

        loop.train(cfg, open_corpora(cfg), run, observe=observe)
