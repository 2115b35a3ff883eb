"""Operations on whole batches equal torchvision's on one image at a time, and their draws have the stated odds."""

import math

import pytest
import torch
from torchvision.transforms import AutoAugment as TorchvisionAutoAugment
from torchvision.transforms import AutoAugmentPolicy
from torchvision.transforms.v2 import functional as v2

from flatmin.train.data.autoaugment import AutoAugment, PolicyTable, RandAugment, large_magnitude, small_magnitude
from flatmin.train.data.operations import KINDS, OPERATIONS, Operations, transformed
from flatmin.train.data.policies import POLICIES, Step
from flatmin.train.data.warps import FILL, WARPS, inverse_map

SIDES = [(32, 32), (17, 24)]


def pictures(count: int, side: tuple[int, int] = (32, 32), channels: int = 3) -> torch.Tensor:
    """Smooth random images with full and with narrow ranges of values; the first is flat."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic")
    widths, lowest = torch.rand(2, count, channels, 1, 1, generator=generator)
    values = (smooth * widths * 300 + lowest * 120 + 8 * torch.rand(smooth.shape, generator=generator)).clamp(0, 255)
    values[0] = 93
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def affine(image: torch.Tensor, *, shear: tuple[float, float] = (0, 0), move: tuple[int, int] = (0, 0)):
    degrees = [math.degrees(math.atan(tangent)) for tangent in shear]
    center = [0, 0] if any(shear) else None
    return v2.affine(image, angle=0, translate=list(move), scale=1, shear=degrees, fill=float(FILL), center=center)


def cutout(image: torch.Tensor, length: int, centre: list[int]) -> torch.Tensor:
    top, left = (at - length // 2 for at in centre)
    height, width = (min(start + length, 32) - max(start, 0) for start in (top, left))
    return v2.erase(image, max(top, 0), max(left, 0), height, width, v=torch.tensor(FILL, dtype=torch.uint8))


ORACLES = {
    "Identity": lambda image, _: image,
    "ShearX": lambda image, m: affine(image, shear=(m, 0)),
    "ShearY": lambda image, m: affine(image, shear=(0, m)),
    "TranslateX": lambda image, m: affine(image, move=(int(m), 0)),
    "TranslateY": lambda image, m: affine(image, move=(0, int(m))),
    "Rotate": lambda image, m: v2.rotate(image, m, fill=float(FILL)),
    "Brightness": v2.adjust_brightness,
    "Color": v2.adjust_saturation,
    "Contrast": v2.adjust_contrast,
    "Sharpness": v2.adjust_sharpness,
    "Posterize": lambda image, m: v2.posterize(image, int(m)),
    "Solarize": lambda image, m: v2.solarize(image, m) if m < 256 else image,
    "SolarizeAdd": lambda image, m: torch.where(image < 128, (image.int() + int(m)).clamp(0, 255), image).byte(),
    "Invert": lambda image, _: v2.invert(image),
    "AutoContrast": lambda image, _: v2.autocontrast(image),
    "Equalize": lambda image, _: v2.equalize(image),
}

MAGNITUDES = {
    "ShearX": [-0.3, -0.13, 0.0, 0.07, 0.27],
    "ShearY": [-0.3, -0.13, 0.0, 0.07, 0.27],
    "TranslateX": [-40.0, -9.0, 0.0, 3.0, 23.0],
    "TranslateY": [-40.0, -9.0, 0.0, 3.0, 16.0],
    "Rotate": [-30.0, -12.0, 0.0, 1.0, 27.0],
    "Posterize": [0.0, 1.0, 3.0, 7.0, 8.0],
    "Solarize": [0.0, 76.0, 128.0, 255.0, 256.0],
    "SolarizeAdd": [0.0, 11.0, 60.0, 110.0],
} | {key: [0.1, 0.46, 1.0, 1.33, 1.9] for key in ("Brightness", "Color", "Contrast", "Sharpness")}


def only(name: str, magnitude: float, count: int) -> Operations:
    kinds, magnitudes = torch.full((count, 1), KINDS[name]), torch.full((count, 1), magnitude)
    return Operations(kinds, magnitudes, torch.zeros(count, 1, 2, dtype=torch.int64))


def near_a_tie(name: str, magnitude: float, side: tuple[int, int]) -> torch.Tensor:
    """Pixels of the new image whose place in the old one is half-way between two pixels, where rounding may differ."""
    height, width = side
    (a, b, c), (d, e, f) = inverse_map(name, magnitude, side)
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    places = (a * x + b * y + c + (width - 1) / 2, d * x + e * y + f + (height - 1) / 2)
    return torch.stack([((place % 1) - 0.5).abs() < 1e-4 for place in places]).any(dim=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ORACLES)
def test_operation_equals_torchvisions_on_each_image(name, side, channels):
    images = pictures(24, side, channels)
    for magnitude in MAGNITUDES.get(name, [0.0]):
        expected = torch.stack([ORACLES[name](image, magnitude) for image in images.permute(0, 3, 1, 2)])
        result = transformed(images, only(name, magnitude, len(images))).permute(0, 3, 1, 2)
        assert result.dtype == torch.uint8
        differing = (result.int() - expected.int()).abs()
        if name in WARPS:
            ties = near_a_tie(name, magnitude, side)
            assert ties.double().mean() < 0.05
            assert torch.equal(result[..., ~ties], expected[..., ~ties]), (magnitude, differing.max())
        else:  # one level, where the fraction that is cut off is 0 but for rounding
            assert differing.max() <= 1, magnitude
            limit = 0.03 if name == "Color" else 1e-3  # 0.1 v + 0.9 grey is whole for one pixel in ten
            assert (differing > 0).double().mean() < limit, magnitude


@pytest.mark.parametrize("name", [name for name in MAGNITUDES if name != "SolarizeAdd"])
def test_another_magnitude_is_told_apart(name):
    """Control of the test above, which would pass if operations did nothing or ignored their magnitude."""
    images = pictures(24)
    first, *_, last = MAGNITUDES[name]
    expected = torch.stack([ORACLES[name](image, first) for image in images.permute(0, 3, 1, 2)])
    result = transformed(images, only(name, last, len(images))).permute(0, 3, 1, 2)
    assert ((result.int() - expected.int()).abs() > 1).double().mean() > 0.1


@pytest.mark.parametrize("side", [(1, 1), (2, 5), (5, 2)])
def test_an_image_that_is_all_border_is_as_sharp_as_it_was(side):
    images = pictures(6, side)
    assert torch.equal(transformed(images, only("Sharpness", 1.9, 6)), images)


@pytest.mark.parametrize("length", [0, 4, 20, 80])
def test_cutouts_are_grey_squares_clipped_at_the_border(length):
    images = pictures(30)
    centres = torch.randint(32, (30, 1, 2), generator=torch.Generator().manual_seed(0))
    operations = Operations(torch.full((30, 1), KINDS["Cutout"]), torch.full((30, 1), float(length)), centres)
    expected = [
        cutout(image, length, centre) if length else image
        for image, centre in zip(images.permute(0, 3, 1, 2), centres[:, 0].tolist(), strict=True)
    ]
    assert torch.equal(transformed(images, operations).permute(0, 3, 1, 2), torch.stack(expected))


def test_contrast_of_the_release_blends_with_the_number_of_pixels():
    images = pictures(10)
    result = transformed(images, only("ReleaseContrast", 0.46, 10))
    torch.testing.assert_close(result.double(), images.double() * 0.46 + 0.54 * 32 * 32 / 256, atol=1, rtol=0)
    flat = transformed(images, only("Contrast", 0.46, 10))
    assert (flat.int() - result.int()).abs().double().mean() > 10


def test_each_image_gets_its_own_operations_in_their_order():
    images = pictures(len(OPERATIONS) * 40)
    generator = torch.Generator().manual_seed(1)
    operations = RandAugment(num_ops=3, level=5).draw(len(images), (32, 32), generator)
    together = transformed(images, operations)
    alone = [transformed(images[n : n + 1], operations[n : n + 1]) for n in range(len(images))]
    assert torch.equal(together, torch.cat(alone))
    in_turn = images
    for layer in range(3):
        parts = (operations.kinds, operations.magnitudes, operations.centres)
        in_turn = transformed(in_turn, Operations(*(part[:, layer : layer + 1] for part in parts)))
    assert torch.equal(together, in_turn)
    assert len(operations.kinds.unique()) == 16


def test_images_are_left_as_they_were():
    images = pictures(200)
    before = images.clone()
    result = transformed(images, AutoAugment().draw(200, (32, 32), torch.Generator().manual_seed(0)))
    assert torch.equal(images, before)
    assert not torch.equal(result, before)


def torchvision_table(policy: AutoAugmentPolicy) -> tuple[PolicyTable, TorchvisionAutoAugment]:
    """Torchvision's policy and magnitudes in our form."""
    theirs = TorchvisionAutoAugment(policy, fill=[float(FILL)] * 3)
    space = theirs._augmentation_space(10, (32, 32))

    def magnitude(name: str, level: float) -> float:
        values, _signed = space[name]
        value = values[int(level)].item() if values.ndim else 0.0
        return 1 + value if name in ("Brightness", "Color", "Contrast", "Sharpness") else value

    policy_steps = [tuple(Step(name, odds, level or 0) for name, odds, level in pair) for pair in theirs.policies]
    return PolicyTable.of(policy_steps, magnitude), theirs


class Draw:
    """Feeds torchvision's AutoAugment the draws that ours got."""

    def __init__(self) -> None:
        self.values = (0, torch.zeros(2), torch.zeros(2, dtype=torch.int64))

    def __call__(self, num_policies: int):
        return self.values


@pytest.mark.parametrize("policy", list(AutoAugmentPolicy))
def test_sub_policies_equal_torchvisions_for_the_same_draws(policy):
    """Their enhancements go either way, ours as published do not: those images get the upward one."""
    table, theirs = torchvision_table(policy)
    theirs.get_params = draw = Draw()
    images = pictures(400)
    chosen = torch.randint(len(table.kinds), (400,), generator=torch.Generator().manual_seed(0))
    drawn = torch.rand(400, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = table.drawn(chosen, drawn, (32, 32), torch.Generator().manual_seed(2))
    result = transformed(images, ours).permute(0, 3, 1, 2)
    num_equal = 0
    for n, image in enumerate(images.permute(0, 3, 1, 2)):
        signs = (ours.magnitudes[n] >= 0).long()
        draw.values = (int(chosen[n]), drawn[n], signs)
        differing = (theirs(image).int() - result[n].int()).abs()
        num_equal += int((differing > 1).double().mean() < 0.05)  # a level may be amplified, a tie may round otherwise
    assert num_equal >= 396
    shuffled = result[torch.randperm(400, generator=torch.Generator().manual_seed(3))]  # the control
    assert (shuffled == result).flatten(1).all(dim=1).sum() < 20


def test_images_are_distributed_as_torchvisions():
    """Sum, sum of squares and pixels of one image, augmented many times by either; two-sample Kolmogorov-Smirnov."""
    table, theirs = torchvision_table(AutoAugmentPolicy.SVHN)  # its one enhancement is the rare Contrast
    image, count = pictures(5)[3], 3000
    ours = transformed(
        image.expand(count, -1, -1, -1).contiguous(), table.draw(count, (32, 32), torch.Generator().manual_seed(0))
    )
    torch.manual_seed(0)
    others = torch.stack([theirs(image.permute(2, 0, 1)) for _ in range(count)]).permute(0, 2, 3, 1)
    limit = 1.95 * math.sqrt(2 / count)  # of probability 0.001
    for statistic in STATISTICS:
        assert distance(statistic(ours), statistic(others)) < limit
    none = image.expand(count, -1, -1, -1)
    half = torch.cat((none[: count // 10], ours[count // 10 :]))  # the control: a tenth is not augmented
    assert max(distance(statistic(half), statistic(others)) for statistic in STATISTICS) > limit


STATISTICS = (
    lambda images: images.long().sum(dim=(1, 2, 3)).double(),  # exact: many images are equal
    lambda images: (images.long() ** 2).sum(dim=(1, 2, 3)).double(),
    lambda images: images[:, 5, 20, 0].double(),
    lambda images: images[:, 25, 4, 2].double(),
)


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    places = torch.cat((first, second)).unique()
    shares = [torch.searchsorted(sample.sort().values, places, right=True) / len(sample) for sample in (first, second)]
    return (shares[0] - shares[1]).abs().max().item()


@pytest.mark.parametrize(
    ("name", "num_sub_policies", "first", "last"),
    [
        ("cifar", 95, ("Invert 0.1 7", "Contrast 0.2 6"), ("Equalize 0.6 9", "Equalize 0.4 4")),
        ("svhn", 25, ("ShearX 0.9 4", "Invert 0.2 3"), ("ShearX 0.7 2", "Invert 0.1 5")),
        ("imagenet", 25, ("Equalize 0.8 1", "ShearY 0.8 4"), ("Color 0.8 6", "Rotate 0.4 5")),
    ],
)
def test_policies_have_the_published_sub_policies(name, num_sub_policies, first, last):
    policy = POLICIES[name]
    assert len(policy) == num_sub_policies
    assert {len(sub_policy) for sub_policy in policy} == {2}
    for sub_policy, words in ((policy[0], first), (policy[-1], last)):
        assert tuple(f"{step.name} {step.probability} {step.level}" for step in sub_policy) == words
    for step in (step for sub_policy in policy for step in sub_policy):
        assert step.name in OPERATIONS
        assert 0 <= step.probability <= 1
        assert 0 <= step.level <= 10


@pytest.mark.parametrize(("name", "policy", "num_shared"), [("cifar", "CIFAR10", 20), ("svhn", "SVHN", 25)])
def test_policies_share_sub_policies_with_torchvisions(name, policy, num_shared):
    """Torchvision has 25 each, the authors' code of CIFAR 95 others in part; without levels where these do nothing."""
    levelless = {"AutoContrast", "Equalize", "Invert"}

    def key(step):
        return step[0], step[1], None if step[0] in levelless else step[2]

    ours = {tuple(map(key, sub_policy)) for sub_policy in POLICIES[name]}
    theirs = [tuple(map(key, pair)) for pair in TorchvisionAutoAugment(AutoAugmentPolicy[policy]).policies]
    assert sum(pair in ours for pair in theirs) == num_shared


@pytest.mark.parametrize("augment", [AutoAugment("cifar"), AutoAugment("svhn", "release"), AutoAugment("imagenet")])
def test_sub_policies_are_uniform_and_their_operations_as_probable_as_stated(augment):
    count = 100_000
    operations = augment.draw(count, (32, 32), torch.Generator().manual_seed(0))
    policy = POLICIES[augment.policy]
    for layer in range(2):
        applied = {name: 0.0 for name in OPERATIONS}
        for sub_policy in policy:
            applied[sub_policy[layer].name] += sub_policy[layer].probability / len(policy)
        if augment.scale == "release":
            applied["ReleaseContrast"], applied["Contrast"] = applied["Contrast"], 0.0
        applied["Identity"] = 1 - sum(applied.values())
        shares = operations.kinds[:, layer].bincount(minlength=len(OPERATIONS)).double() / count
        for name, share in zip(OPERATIONS, shares.tolist(), strict=True):
            assert abs(share - applied[name]) <= 5 * math.sqrt(applied[name] * (1 - applied[name]) / count), name
    signed = torch.isin(operations.kinds, torch.tensor([KINDS[name] for name in WARPS])) & (operations.magnitudes != 0)
    assert signed.sum() > 1000
    assert abs((operations.magnitudes[signed] > 0).double().mean() - 0.5) < 5 * math.sqrt(0.25 / signed.sum())
    assert (operations.magnitudes[~signed] >= 0).all()


def test_randaugment_draws_its_sixteen_operations_uniformly_and_always_applies_them():
    operations = RandAugment(num_ops=2, level=9).draw(40_000, (224, 224), torch.Generator().manual_seed(0))
    shares = operations.kinds.flatten().bincount(minlength=len(OPERATIONS)).double() / 80_000
    drawn = {name for name, share in zip(OPERATIONS, shares.tolist(), strict=True) if share > 0}
    assert drawn == set(OPERATIONS) - {"Identity", "ReleaseContrast"}
    assert ((shares[shares > 0] - 1 / 16).abs() < 5 * math.sqrt(1 / 16 / 80_000)).all()
    sizes = {
        OPERATIONS[kind]: abs(size)
        for kind, size in zip(operations.kinds[:, 0].tolist(), operations.magnitudes[:, 0].tolist(), strict=False)
    }
    assert (sizes["TranslateX"], sizes["Cutout"], sizes["Posterize"], sizes["Solarize"]) == (90, 72, 3, 230)
    for side in ((32, 32), (32, 80), (80, 32)):  # the shorter one counts
        smaller = RandAugment().draw(4000, side, torch.Generator().manual_seed(0))
        assert smaller.magnitudes[smaller.kinds == KINDS["Cutout"]].unique().tolist() == [10]


@pytest.mark.parametrize(
    ("name", "level", "small", "large"),
    [
        ("TranslateX", 9, 9, 225),
        ("Rotate", 7, 21, 21),
        ("Posterize", 7, 2, 2),
        ("Posterize", 3, 3, 1),
        ("Solarize", 3, 180, 76),
        ("Solarize", 9, 26, 230),
        ("Cutout", 3, 6, 60),
        ("Color", 9, 1.72, 1.72),
        ("ShearY", 8, 0.24, 0.24),
        ("SolarizeAdd", 3, 33, 33),
        ("Invert", 9, 0, 0),
    ],
)
def test_levels_mean_what_the_published_codes_say(name, level, small, large):
    assert small_magnitude(name, level) == pytest.approx(small)
    assert large_magnitude(name, level, (250, 100)) == pytest.approx(large)


@pytest.mark.parametrize(
    ("policy", "scale", "bits"),
    [
        ("imagenet", "original", lambda level: int(level * 4 / 10)),
        ("cifar", "original", lambda level: 4 - int(level * 4 / 10)),
        ("cifar", "release", lambda level: int(level * 4 / 10)),
    ],
)
def test_each_policy_has_the_scale_of_its_authors_unless_the_releases_is_asked_for(policy, scale, bits):
    operations = AutoAugment(policy, scale).draw(20_000, (32, 32), torch.Generator().manual_seed(0))
    found = set(operations.magnitudes[operations.kinds == KINDS["Posterize"]].tolist())
    steps = [step for sub_policy in POLICIES[policy] for step in sub_policy if step.probability > 0]
    assert found == {bits(step.level) for step in steps if step.name == "Posterize"}


@pytest.mark.parametrize("name", ["TranslateX", "Cutout"])
def test_scales_of_a_policy_differ(name):
    """The control: what the release has, images of 32 pixels cannot have."""
    found = []
    for scale in ("original", "release"):
        operations = AutoAugment("cifar", scale).draw(20_000, (32, 32), torch.Generator().manual_seed(0))
        found.append(operations.magnitudes[operations.kinds == KINDS[name]].abs().max().item())
    assert found[0] < 32 < found[1]


def blanking(step: Step, side: int) -> float:
    """Probability that a step of the release's scale leaves nothing of an image, if it is applied."""
    if step.name.startswith("Translate"):
        return float(25 * step.level >= side)
    if step.name == "Cutout":
        covered = [at - 10 * step.level <= 0 and at + 10 * step.level >= side for at in range(side)]
        return (sum(covered) / side) ** 2
    return 0.0


@pytest.mark.parametrize(("policy", "expected"), [("cifar", 0.1218), ("svhn", 0.1160)])
def test_the_scale_of_the_release_blanks_an_eighth_of_small_images(policy, expected):
    odds = [[step.probability * blanking(step, 32) for step in sub_policy] for sub_policy in POLICIES[policy]]
    exact = sum(1 - (1 - first) * (1 - second) for first, second in odds) / len(odds)
    assert exact == pytest.approx(expected, abs=5e-5)
    count = 10_000
    images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shares = {}
    for scale in ("original", "release"):
        operations = AutoAugment(policy, scale).draw(count, (32, 32), torch.Generator().manual_seed(1))
        pixels = transformed(images, operations).flatten(1)
        shares[scale] = (pixels == pixels[:, :1]).all(dim=1).double().mean()
    assert abs(shares["release"] - exact) < 4 * math.sqrt(exact * (1 - exact) / count)
    assert shares["original"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoAugment("cifar10"), "policy must be one of cifar, svhn, imagenet, got 'cifar10'"),
        (lambda: AutoAugment("cifar", "new"), "scale must be one of original, release, got 'new'"),
        (lambda: RandAugment(num_ops=-1), "num_ops must be >= 0, got -1"),
        (lambda: RandAugment(level=math.nan), "level must be >= 0, got nan"),
        (lambda: RandAugment(scale="x"), "scale must be one of original, release, got 'x'"),
    ],
)
def test_values_outside_their_domain_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
