"""Recipes for a CPU: a first look at what sharpness-aware minimisation does."""

from __future__ import annotations

from flatmin.train.config import TrainConfig
from flatmin.train.recipes.recipe import Recipe, results

__all__ = ["FIRST_STEPS"]

FIRST_STEPS = (
    Recipe(
        name="digits",
        summary="Handwritten digits with wrong labels, a data set that ships with scikit-learn.",
        replicates="The label-noise experiment of the SAM paper, Table 4, in small: two labels in five are wrong in "
        "training and none in the test.",
        base=TrainConfig(
            dataset="digits", model="small-cnn", label_noise=0.4, epochs=40, batch_size=64, lr=0.1, method="sgd"
        ),
        radii={"sgd": 0.0, "sam": 0.8, "asam": 5.0},
        expected=results(sgd="31.8±7.8", sam="2.0±.9", asam="3.5±.6"),
        measure="test error, %, measured with 3 seeds",
        remark="SGD learns the wrong labels by heart. The radii are those with the lowest mean error on the "
        "validation split over five seeds. Its labels are right, two in five of those trained on are wrong, and the "
        "test images were not looked at. SAM with the paper's radii, 0.2 and less, is no better than SGD here; with "
        "SAM at 1 or ASAM at 8 training begins to fail. All values are in benchmarks/results/digits_radius.json, "
        "written by benchmarks/choose_digits_radius.py.",
        costs="Nothing to download; ten seconds on one CPU core, the whole comparison about a minute on two.",
    ),
    Recipe(
        name="fashion-mnist",
        summary="Fashion-MNIST with a small network: a first look at real images.",
        replicates="The data set of the SAM paper's Table 5, with a network that a CPU can train.",
        base=TrainConfig(dataset="fashion-mnist", model="small-cnn", epochs=3, batch_size=64, lr=0.1, method="sgd"),
        radii={"sgd": 0.0, "sam": 0.05, "asam": 0.5},
        expected=results(sam="12.9"),
        measure="test error, %, measured after one epoch, --epochs 1, with seed 0",
        remark="The paper's networks reach 3.6 to 4.0 % with SAM.",
        costs="3 epochs of about a minute each on two CPU cores.",
    ),
)
