"""The experiments of the SAM paper's section 4 and Appendix C, and a training script that others wrote."""

from __future__ import annotations

import math
from dataclasses import replace

from flatmin.train.recipes.cost import ONE_V100, V100, training_cost
from flatmin.train.recipes.recipe import Recipe, Result, results
from flatmin.train.recipes.table_1 import CIFAR, NUM_IMAGES, SETS

__all__ = ["ABLATIONS"]

# fmt: off
TABLE_11 = {  #   CIFAR-10   estimated sharpness   CIFAR-100   estimated sharpness
    1:          ("2.77±.03", "0.17",              "16.72±.08", "0.82"),
    2:          ("2.76±.03", "0.82",              "16.59±.08", "1.83"),
    3:          ("2.73±.04", "1.49",              "16.62±.09", "2.36"),
    5:          ("2.77±.03", "2.26",              "16.60±.06", "2.82"),
}
# fmt: on


def inner_steps_recipe(column: int) -> Recipe:
    """Return the recipe of Table 11 for CIFAR-10 (column 0) or CIFAR-100 (column 1)."""
    dataset, rho = SETS[column], (0.05, 0.1)[column]
    name, steps = f"{dataset}-inner-steps", ",".join(map(str, TABLE_11))
    num_passes = sum(number + 1 for number in TABLE_11)
    sharpness = ", ".join(cells[2 * column + 1] for cells in TABLE_11.values())
    return Recipe(
        name=name,
        summary=f"{dataset.upper().replace('R', 'R-')} with WRN-28-10: several ascent steps.",
        replicates=f"SAM paper, Appendix C.6, Table 11, {dataset.upper()}.",
        base=replace(CIFAR, dataset=dataset),
        radii={"sgd": 0.0, "sam": rho},
        expected={f"ascent_steps {number}": Result(cells[2 * column]) for number, cells in TABLE_11.items()},
        measure="test error, %; the spread is a standard deviation over 20 runs",
        remark=f"The estimated sharpness is {sharpness}: several steps find a larger loss, and do not generalise "
        "better. The paper prints no length of a step; here it is rho, projected back to the ball.",
        costs=training_cost("wrn-28-10", 32, 200 * NUM_IMAGES, V100, trainings=20 * num_passes / 2),
        commands=(f"flatmin sweep {name} --grid ascent_steps={steps} --each ascent_steps --seeds 20",),
    )


SECOND_ORDER = Recipe(
    name="cifar10-second-order",
    summary="CIFAR-10 with WRN-40-2: SAM with the term of second order that it drops.",
    replicates="SAM paper, Appendix C.4, Figures 4 and 5.",
    base=replace(CIFAR, model="wrn-40-2", micro_batch=None),
    own={"second_order": True},
    radii={"sam": 0.05},
    expected={},
    measure="the first order alone has the lower test error",
    remark="Train again with --no-second-order for the other curve. The term stands in the updates of each step, whose "
    "cosine with those of SAM is about 1 in the first half of training and falls later on; "
    "flatmin.optim.SecondOrderSAM has it in its diagnostics. One perturbation for the whole batch.",
    costs=training_cost("wrn-40-2", 32, 200 * NUM_IMAGES, ONE_V100, trainings=1 + 2.5),
    commands=("flatmin train cifar10-second-order", "flatmin train cifar10-second-order --no-second-order"),
)


def p_norm_recipe(name: str, options: dict[str, float | str], rho: float, what: str) -> Recipe:
    """Return the recipe of one kind of perturbation of Figure 6."""
    return Recipe(
        name=f"cifar10-{name}",
        summary=f"CIFAR-10 with WRN-28-10: {what}.",
        replicates="SAM paper, Appendix C.5, Figure 6.",
        base=CIFAR,
        own={"method_options": options},
        radii={"sam": rho},
        expected={},
        measure="p = 2 is better than p = inf, and both are better than a random direction",
        remark="The paper says a wide ResNet, and prints no radii. That of p = 2 is Table 6's; for p = inf every "
        "weight moves by rho, so it is smaller by about the root of their number, 6000.",
        costs=training_cost("wrn-28-10", 32, 200 * NUM_IMAGES, V100),
    )


P_NORMS = (
    p_norm_recipe("p-2", {}, 0.05, "SAM in the ball of the Euclidean norm"),
    p_norm_recipe("p-inf", {"p": math.inf}, 1e-5, "SAM in the ball of the largest entry"),
    p_norm_recipe("random-direction", {"direction": "random"}, 0.05, "a random perturbation of fixed Euclidean length"),
)

M_SHARPNESS = Recipe(
    name="cifar10-m-sharpness",
    summary="CIFAR-10 with ResNet-20: one perturbation for each m images.",
    replicates="SAM paper, section 4.1, Figure 3 (middle).",
    base=replace(CIFAR, model="resnet-20"),
    radii={"sgd": 0.0, "sam": 0.05},
    expected={},
    measure="the smaller m, the lower the test error, and the larger the best rho",
    remark="The paper says a small ResNet and no more. Micro-batches have statistics of batch norm of their own, so m "
    "changes these too.",
    costs=training_cost("resnet-20", 32, 200 * NUM_IMAGES, ONE_V100, trainings=4 * 6),
    commands=(
        "flatmin sweep cifar10-m-sharpness --grid method=sam --grid micro_batch=4,16,64,256 --each micro_batch "
        "--grid rho=0.01,0.02,0.05,0.1,0.2,0.5",
    ),
)

HESSIAN = Recipe(
    name="cifar10-hessian",
    summary="CIFAR-10 with WRN-40-10 without batch norm: the spectrum of the Hessian.",
    replicates="SAM paper, section 4.2, Figure 3 (left).",
    base=replace(CIFAR, model="wrn-40-10", norm="none", epochs=300, micro_batch=32),
    radii={"sgd": 0.0, "sam": 0.05},
    expected=results(**{"SAM": "1.0", "SGD": "24", "SAM, over the fifth": "2.6", "SGD, over the fifth": "11.4"}),
    measure="the largest eigenvalue of the Hessian of the training loss, and its ratio to the fifth",
    remark="The text says 300 steps, and its figure shows epochs; the settings are those of WRN-28-10 and not printed.",
    costs=training_cost("wrn-40-10", 32, 300 * NUM_IMAGES, V100),
    commands=(
        "flatmin train cifar10-hessian",
        "flatmin train cifar10-hessian --method sgd",
        "flatmin sharpness runs/cifar10-hessian-sam-0 runs/cifar10-hessian-sgd-0 --measures eigenvalues",
    ),
)

SCRIPT = Recipe(
    name="cifar10-batch-128",
    summary="CIFAR-10 with WRN-28-10 in batches of 128: the settings of a script that wraps torch's SGD.",
    replicates="S-Sairam/sam-optimizer: python3 train.py --epochs 200 --lr 0.1 --batch_size 128 --rho 0.05.",
    base=replace(
        CIFAR,
        batch_size=128,
        micro_batch=None,
        weight_decay_in="base",
        gradient_clipping=0.0,
        nesterov=False,
        shortcut="conv",
        padding_mode="zeros",
    ),
    radii={"sgd": 0.0, "sam": 0.05, "asam": 0.5},
    expected=results(sam="3.26"),
    measure="test error, %, of one run as its README had it",
    remark="One perturbation and one set of statistics of batch norm for the whole batch, crops out of black, momentum "
    "without Nesterov, and decay in torch's SGD.",
    costs=training_cost("wrn-28-10", 32, 200 * NUM_IMAGES, V100),
)

ABLATIONS = (
    SECOND_ORDER,
    *P_NORMS,
    inner_steps_recipe(0),
    inner_steps_recipe(1),
    M_SHARPNESS,
    HESSIAN,
    SCRIPT,
)
