r"""Part A: sequential linear regression with knobs for overlap and agreement.

Task k draws inputs :math:`x = \sqrt{2\rho}\, S z + \sqrt{2(1-\rho)}\, P_k z'` with
standard normal z, z' in R^8. S is a subspace that all tasks share, P_k one of task k
alone, drawn at random in the complement of S (six such subspaces of dimension 8 do not
fit into 32 dimensions, so they overlap by chance). The *overlap* rho is the share of
the inputs' energy inside S. Both bases are random, so neither is axis-aligned.

Targets are :math:`y = x^T w_k + \sigma\epsilon`. The part of :math:`w_k` in S is
:math:`\sqrt 8 (\sqrt\gamma q_0 + \sqrt{1-\gamma} q_k)` with orthonormal q: the
*agreement* gamma is the cosine between any two tasks' targets there. The part in P_k is
a task's own.

The loss that is reported is the population's excess over the noise,
:math:`\frac12 (w - w_k)^T H_k (w - w_k)` with :math:`H_k = E[x x^T]`.

Curvature comes from the library's estimator, with the log-likelihood
:math:`-\frac12 (y - x^T w)^2` of a unit Gaussian, labels drawn from it. Its Fisher is
:math:`E[x x^T] = H_k`, the exact Hessian of the mean loss, whatever sigma is; the
estimate from n batches has a relative standard error of about :math:`\sqrt{2/n}` for
each coefficient. Gradients of the observed labels would carry the residuals instead.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import optax_cl
from experiments.studies._regime_program import Benchmark

DIMENSION, SUBSPACE, TASKS = 40, 8, 6
NOISE = 0.5
OVERLAPS = (0.1, 0.5, 0.9)
AGREEMENTS = {"conflict": 0.0, "partial": 0.75, "agree": 1.0}
REGIMES = tuple(f"{name} {rho:g}" for name in AGREEMENTS for rho in OVERLAPS)


class Data(NamedTuple):
    """Problems of several seeds; x = z @ mixing."""

    mixing: chex.Array  # float32 [seeds, regimes, tasks, 2 * SUBSPACE, DIMENSION]
    target: chex.Array  # float32 [seeds, regimes, tasks, DIMENSION, 1]


def regression(predict, targets) -> optax_cl.Task:
    """A ``Task`` for one real output with a unit Gaussian likelihood.

    Args:
      predict: ``(params, batch) -> [B]``.
      targets: ``batch -> [B]``.

    Returns:
      A ``Task`` whose loss is half the squared error.
    """

    def log_prob(params, batch, labels):
        return -0.5 * jnp.square(labels - predict(params, batch))

    return optax_cl.Task(
        loss=lambda params, batch: -log_prob(params, batch, targets(batch)),
        outputs=predict,
        log_prob=log_prob,
        sample_label=lambda out, key: out + jax.random.normal(key, out.shape),
    )


def make_data(seeds: tuple[int, ...]) -> Data:
    """The problems of the seeds, in float64 until the end."""
    mixings, targets = zip(*(_problem(seed) for seed in seeds), strict=True)
    return Data(np.float32(np.stack(mixings)), np.float32(np.stack(targets)))


def _problem(seed):
    random = np.random.default_rng(seed)

    def orthonormal(rows, columns):
        return np.linalg.qr(random.normal(size=(rows, columns)))[0]

    whole = orthonormal(DIMENSION, DIMENSION)
    shared, rest = whole[:, :SUBSPACE], whole[:, SUBSPACE:]
    own = [rest @ orthonormal(rest.shape[1], SUBSPACE) for _ in range(TASKS)]
    directions = shared @ orthonormal(SUBSPACE, SUBSPACE)
    private = [p @ random.normal(size=SUBSPACE) for p in own]
    mixing, target = [], []
    for gamma in AGREEMENTS.values():
        common = np.sqrt(SUBSPACE * gamma) * directions[:, 0]
        single = np.sqrt(SUBSPACE * (1 - gamma)) * directions[:, 1 : TASKS + 1].T
        for rho in OVERLAPS:
            scale = np.sqrt(2 * rho), np.sqrt(2 * (1 - rho))
            mixing.append(
                [np.vstack([scale[0] * shared.T, scale[1] * p.T]) for p in own]
            )
            target.append((common + single + private)[..., None])
    return np.array(mixing), np.array(target)


def joint_optimum(data: Data) -> np.ndarray:
    """The least mean loss that any one w has, ``[seeds, regimes]``."""
    mixing, target = (np.asarray(x, np.float64) for x in data)
    hessian = np.swapaxes(mixing, -1, -2) @ mixing
    mean = hessian.mean(2)
    best = np.linalg.pinv(mean) @ (hessian @ target).mean(2)
    error = best[:, :, None] - target
    return 0.5 * (np.swapaxes(error, -1, -2) @ hessian @ error).mean(2)[..., 0, 0]


def _sample(data, problem, regime, task, key, count):
    inputs, noise = jax.random.split(key)
    z = jax.random.normal(inputs, [count, 2 * SUBSPACE])
    x = z @ data.mixing[problem, regime, task]
    y = (x @ data.target[problem, regime, task])[:, 0]
    return {"x": x, "y": y + NOISE * jax.random.normal(noise, [count])}


def _evaluate(data, problem, regime, params):
    error = params["w"][None] - data.target[problem, regime]
    distance = data.mixing[problem, regime] @ error
    return {"loss": 0.5 * jnp.sum(distance**2, axis=(-2, -1))}


_TASK = regression(lambda params, b: (b["x"] @ params["w"])[:, 0], lambda b: b["y"])

BENCHMARK = Benchmark(
    regimes=REGIMES,
    tasks=TASKS,
    batch=16,
    memory=64,
    init=lambda key: {"w": jnp.zeros([DIMENSION, 1])},
    sample=_sample,
    loss=lambda params, batch: _TASK.loss(params, batch).mean(),
    evaluate=_evaluate,
    task=_TASK,
)
