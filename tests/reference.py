"""The published boxes, transcribed line by line in float64 for plain functions of a list of tensors.

Slow, and free of any code of the package. ``gradient(w)`` returns the batch gradient at w as a list shaped like w.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Weights = list[Tensor]
Gradient = Callable[[Weights], Weights]


def perturbation(g: Weights, rhos: Sequence[float], p: float, scaling: Weights) -> Weights:
    """Foret et al., Eq. 2, in the variables u = T g of Kwon et al.: one vector over all tensors."""
    u = [t * x for t, x in zip(scaling, g, strict=True)]
    flat = torch.cat([x.flatten() for x in u])
    if not flat.any():
        return [torch.zeros_like(x) for x in g]
    if p == 1:
        dual = torch.zeros_like(flat)
        best = int(flat.abs().argmax())
        dual[best] = math.copysign(1.0, float(flat[best]))
    elif math.isinf(p):
        dual = flat.sign()
    else:
        q = p / (p - 1)
        dual = flat.sign() * flat.abs() ** (q - 1) / (flat.abs() ** q).sum() ** (1 / p)
    parts = dual.split([x.numel() for x in g])
    return [rho * t * part.view_as(x) for rho, t, part, x in zip(rhos, scaling, parts, g, strict=True)]


def projected(eps: Weights, rhos: Sequence[float], p: float, scaling: Weights) -> Weights:
    """Back to the ball ``||T^-1 eps / rho||_p <= 1``, for p = 2 and infinity."""
    relative = [e / (t * rho) for e, t, rho in zip(eps, scaling, rhos, strict=True)]
    if math.isinf(p):
        relative = [r.clamp(-1, 1) for r in relative]
    else:
        length = torch.cat([r.flatten() for r in relative]).norm()
        relative = [r / max(1.0, float(length)) for r in relative]
    return [r * t * rho for r, t, rho in zip(relative, scaling, rhos, strict=True)]


def sam_gradient(
    w: Weights,
    gradient: Gradient,
    rhos: Sequence[float],
    *,
    p: float = 2.0,
    scale: Callable[[int, Tensor], Tensor] = lambda index, tensor: torch.ones_like(tensor),
    ascent_steps: int = 1,
) -> Weights:
    """Algorithm 1 of Foret et al. (of Kwon et al. with a scaling): the gradient at w + eps, K ascents."""
    scaling = [scale(index, tensor) for index, tensor in enumerate(w)]
    eps = [torch.zeros_like(x) for x in w]
    for step in range(ascent_steps):
        g = gradient([x + e for x, e in zip(w, eps, strict=True)])
        onward = perturbation(g, rhos, p, scaling)
        eps = [e + o for e, o in zip(eps, onward, strict=True)]
        if step > 0:
            eps = projected(eps, rhos, p, scaling)
    return gradient([x + e for x, e in zip(w, eps, strict=True)])


def momentum_sgd(
    w: Weights, g: Weights, velocity: Weights | None, lr: float, momentum: float
) -> tuple[Weights, Weights]:
    """Polyak's heavy ball as in torch: v = mu v + g, w = w - lr v."""
    velocity = (
        [x.clone() for x in g] if velocity is None else [momentum * v + x for v, x in zip(velocity, g, strict=True)]
    )
    return [x - lr * v for x, v in zip(w, velocity, strict=True)], velocity


# The other methods. Each takes w, the gradient function, rho of each tensor and a dict that it may keep values in, and
# returns the gradient that the base optimizer follows.


def norm(x: Weights) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in x]).norm()


def dot(x: Weights, y: Weights) -> Tensor:
    return torch.cat([a.flatten() for a in x]) @ torch.cat([b.flatten() for b in y])


def add(x: Weights, factor: float | Tensor, y: Weights) -> Weights:
    return [a + factor * b for a, b in zip(x, y, strict=True)]


def to_sphere(w: Weights, d: Weights, rhos: Sequence[float]) -> Weights:
    length = norm(d)
    return [a + rho * b / length for a, b, rho in zip(w, d, rhos, strict=True)]


def fisher_sam(w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, eta: float) -> Weights:
    """Kim et al. 2022, Algorithm 1: eps = rho F^-1 g / sqrt(g F^-1 g)."""
    g = gradient(w)
    inverse = [x / (x**2 + eta) for x in g]
    length = dot(g, inverse).sqrt()
    return gradient([a + rho * b / length for a, b, rho in zip(w, inverse, rhos, strict=True)])


def layer_sam(w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict) -> Weights:
    """Liu et al. 2022, Eq. 8: eps_l = rho ||w_l|| g_l / ||g_l||."""
    g = gradient(w)
    return gradient([a + rho * a.norm() * b / b.norm() for a, b, rho in zip(w, g, rhos, strict=True)])


def unified_sam(w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, share: float | None) -> Weights:
    """Oikonomou and Loizou 2025: eps = rho (1 - lambda + lambda / ||g||) g, lambda_t = 1 - 1/t."""
    memory["t"] = memory.get("t", 0) + 1
    weight = 1 - 1 / memory["t"] if share is None else share
    g = gradient(w)
    return gradient([a + rho * (1 - weight + weight / norm(g)) * b for a, b, rho in zip(w, g, rhos, strict=True)])


def le_sam(
    w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, sigma: float, num_steps: int | None = None,
    decay_start: float = 0.0,
) -> Weights:  # fmt: skip
    """LE-SAM: radius min(sigma_t / ||g||, rho); from decay_start on sigma_t falls to 0 along half a cosine."""
    t = memory["t"] = memory.get("t", -1) + 1
    first = 0 if num_steps is None else decay_start * num_steps
    if num_steps is not None and t > first:
        sigma = sigma * math.cos(math.pi / 2 * (t - first) / (num_steps - first)) ** 2
    g = gradient(w)
    radii = [min(sigma / float(norm(g)), rho) for rho in rhos]
    return gradient(to_sphere(w, g, radii))


def z_sharp(
    w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, quantile: float, joint_vectors: bool
) -> Weights:
    """Yun 2025: per layer, zero the entries whose |z| is at most its quantile; eps_l = rho f_l / ||f_l||.

    In the author's code rho g_l / ||g|| for vectors.
    """
    g, there = gradient(w), []
    for a, b, rho in zip(w, g, rhos, strict=True):
        f = b
        if b.dim() > 1:
            z = ((b - b.mean()) / b.std()).abs()
            f = torch.where(z > z.quantile(quantile, interpolation="lower"), b, 0.0)
        there.append(a + rho * f / (norm(g) if joint_vectors and b.dim() < 2 else f.norm()))
    return gradient(there)


def gsam(
    w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, alpha: float, minimised: str
) -> Weights:
    """Zhuang et al. 2022, Algorithm 1; the JAX release's minimize_fp=False."""
    g = gradient(w)
    g_p = gradient(to_sphere(w, g, rhos))
    if minimised == "perturbed":
        parallel = [dot(g, g_p) / norm(g_p) ** 2 * b for b in g_p]
        return add(g_p, -alpha, add(g, -1.0, parallel))
    return add(g, alpha, add(g_p, -dot(g_p, g) / norm(g) ** 2, g))


def gnp(
    w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, alpha: float, unit_clean: bool
) -> Weights:
    """Zhao et al. 2022, Algorithm 1; with ``norm_perturbations`` of their code, g / ||g|| in place of g."""
    g = gradient(w)
    g_p = gradient(to_sphere(w, g, rhos))
    length = norm(g) if unit_clean else 1.0
    return [(1 - alpha) * a / length + alpha * b for a, b in zip(g, g_p, strict=True)]


def wsam(
    w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, gamma: float, decouple: bool
) -> Weights:
    """Yue et al. 2023, Algorithm 2; what is followed after the base step goes to memory["after"]."""
    g = gradient(w)
    g_p = gradient(to_sphere(w, g, rhos))
    if decouple:
        memory["after"] = [gamma / (1 - gamma) * (b - a) for a, b in zip(g, g_p, strict=True)]
        return g
    return [(1 - 2 * gamma) / (1 - gamma) * a + gamma / (1 - gamma) * b for a, b in zip(g, g_p, strict=True)]


def stable_sam(w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict) -> Weights:
    """Tan et al. 2025: the perturbed gradient at the clean one's length."""
    g = gradient(w)
    g_p = gradient(to_sphere(w, g, rhos))
    return [norm(g) / norm(g_p) * b for b in g_p]


def vasso(w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, theta: float) -> Weights:
    """Li and Giannakis 2023, Algorithm 2: d = (1 - theta) d + theta g, d_0 = g_0."""
    g = gradient(w)
    memory["d"] = [(1 - theta) * d + theta * x for d, x in zip(memory.get("d", g), g, strict=True)]
    return gradient(to_sphere(w, memory["d"], rhos))


def friendly_sam(
    w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, sigma: float, lmbda: float
) -> Weights:
    """Li et al. 2024 as in their code: d = g - sigma m, then m = lmbda m + (1 - lmbda) g; first d = m = g."""
    g = gradient(w)
    if "m" not in memory:
        memory["m"], d = g, g
    else:
        d = add(g, -sigma, memory["m"])
        memory["m"] = [lmbda * m + (1 - lmbda) * x for m, x in zip(memory["m"], g, strict=True)]
    return gradient(to_sphere(w, d, rhos))


def look_sam(
    w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, interval: int, alpha: float
) -> Weights:
    """Liu et al. 2022, Algorithm 1, by the angle between the gradients."""
    t = memory["t"] = memory.get("t", -1) + 1
    g = gradient(w)
    if t % interval == 0:
        g_s = gradient(to_sphere(w, g, rhos))
        cosine = dot(g_s, g) / (norm(g_s) * norm(g))
        memory["g_v"] = add(g_s, -norm(g_s) * cosine / norm(g), g)
        return g_s
    return add(g, alpha * norm(g) / norm(memory["g_v"]), memory["g_v"])


def ae_sam(
    w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, num_steps: int, decay: float,
    c_start: float, c_end: float,
) -> Weights:  # fmt: skip
    """Jiang et al. 2023, Algorithm 1."""
    t = memory["t"] = memory.get("t", -1) + 1
    g = gradient(w)
    square = float(norm(g) ** 2)
    memory["mu"] = decay * memory.get("mu", 0.0) + (1 - decay) * square
    memory["var"] = decay * memory.get("var", 0.0) + (1 - decay) * (square - memory["mu"]) ** 2
    c = t / num_steps * c_end + (1 - t / num_steps) * c_start
    if square >= memory["mu"] + c * memory["var"] ** 0.5:
        memory["num_perturbed"] = memory.get("num_perturbed", 0) + 1
        return gradient(to_sphere(w, g, rhos))
    return g


def some_steps(
    w: Weights, gradient: Gradient, rhos: Sequence[float], memory: dict, *, perturbs: Callable[[int], bool]
) -> Weights:
    """SAM in the steps that a rule picks, plain steps elsewhere."""
    t = memory["t"] = memory.get("t", -1) + 1
    g = gradient(w)
    return gradient(to_sphere(w, g, rhos)) if perturbs(t) else g


def micro_batch_gradient(
    w: Weights, gradients: Sequence[Gradient], rhos: Sequence[float], *, shared: bool, total: bool, **how: Any
) -> Weights:
    """m-sharpness, Foret et al., sections 3.1 and 4.1: every micro-batch at its own worst point, or all at the batch's.

    ``gradients`` holds the gradient of each micro-batch's loss; the objective is their mean, or their sum.
    """
    weight = 1.0 if total else 1.0 / len(gradients)

    def of_the_batch(v: Weights) -> Weights:
        parts = [gradient(v) for gradient in gradients]
        return [weight * torch.stack([part[i] for part in parts]).sum(dim=0) for i in range(len(v))]

    if shared:
        return sam_gradient(w, of_the_batch, rhos, **how)
    each = [sam_gradient(w, gradient, rhos, **how) for gradient in gradients]
    return [weight * torch.stack([part[i] for part in each]).sum(dim=0) for i in range(len(w))]
