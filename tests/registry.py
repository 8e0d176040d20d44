"""Every public transformation, as an optimizer that the contract can be held to.

``ENTRIES`` maps a name to an ``Entry``; ``ewc[separate]`` is another setting of
``ewc``. A new transformation gets its row here, or ``tests/test_contract.py`` fails.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_cl
from optax_cl import isolation, lora, penalties, recipes, testing

Schedulable = optax.ScalarOrSchedule


def params() -> dict[str, Any]:
    """Parameters small enough that hundreds of compilations are quick."""
    return {
        "dense": {
            "bias": jnp.array([0.1, -0.2, 0.3]),
            "kernel": jnp.arange(12.0).reshape(4, 3) / 10 - 0.5,
        },
        "scale": jnp.array([0.5, -0.5]),
    }


class Entry(NamedTuple):
    """How the contract runs a transformation.

    Attributes:
      make: Makes an optimizer around the transformation. Its arguments are the
        hyper-parameters under their public names, with an example for default.
      links: Its links, without a capture; None for what captures by itself.
      extra_args: ``updates -> extra arguments``.
      agreeing: The same where memory should agree with the objective.
      needs_matrix: Whether it refuses parameters without a matrix.
      params: Makes the parameters, where it must find leaves of its own among them.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    links: Callable[..., tuple[optax.GradientTransformation, ...]] | None = None
    extra_args: Callable[[Any], dict[str, Any]] = testing.no_extra_args
    agreeing: Callable[[Any], dict[str, Any]] | None = None
    needs_matrix: bool = False
    params: Callable[[], dict[str, Any]] = params


def _reference(updates):
    return {"reference_updates": jax.tree.map(lambda g: 0.2 - 0.5 * g, updates)}


def _same_reference(updates):
    return {"reference_updates": updates}


def _memories(updates):
    """Two past tasks, one opposed, one not, and a slot that is empty."""
    against = jax.tree.map(lambda g: 0.2 - 0.5 * g, updates)
    along = jax.tree.map(lambda g: 0.1 + 0.3 * g, updates)
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b, a]), against, along)
    return {"memory_updates": stack, "memory_mask": jnp.arange(3) < 2}


def _same_memories(updates):
    stack = jax.tree.map(lambda g: jnp.stack([g]), updates)
    return {"memory_updates": stack, "memory_mask": jnp.ones(1, bool)}


def _replay(updates):
    return {"replay_updates": jax.tree.map(lambda g: 0.7 * g, updates)}


LR = 0.05


def _descend(*links):
    return (*links, optax_cl.scale_by_decoupled_adam(), optax.scale(-LR))


def _captured(links):
    """An optimizer whose arguments are those of its links."""

    def make(*args, **kwargs):
        return optax_cl.chain(*links(*args, **kwargs))

    # `inject_hyperparams` and the check of schedules read the signature.
    make.__wrapped__ = links
    return Entry(make, links)


def _adam(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    adam = optax_cl.scale_by_decoupled_adam(b1, b2, eps, eps_root)
    return optax.scale(0.5), adam, optax.scale(-LR)


def _adam_raw(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    adam = optax_cl.scale_by_decoupled_adam(
        b1, b2, eps, eps_root, nesterov=True, first_moment="raw", second_moment="raw"
    )
    return optax.scale(0.5), adam, optax.scale(-LR)


def _amsgrad(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    amsgrad = optax_cl.scale_by_decoupled_amsgrad(b1, b2, eps, eps_root)
    return optax.scale(0.5), amsgrad, optax.scale(-10 * LR)


def _factored(decay_rate=0.8, epsilon=1e-30):
    rms = optax_cl.scale_by_decoupled_factored_rms(
        decay_rate, epsilon, min_dim_size_to_factor=3
    )
    # Steps of a constant length never settle.
    decreasing = optax.linear_schedule(-LR, 0.0, 3000)
    return optax.scale(0.5), rms, optax.ema(0.9), optax.scale_by_schedule(decreasing)


def _ewc(strength: Schedulable = 3.0):
    return _descend(optax_cl.ewc(strength))


def _ewc_separate(strength: Schedulable = 3.0, decay=0.7):
    ewc = optax_cl.ewc(
        strength, anchors="separate", capacity=3, accumulate="decay", decay=decay
    )
    return _descend(ewc)


def _ewc_proximal(learning_rate: Schedulable = LR, strength: Schedulable = 3.0):
    adam = optax_cl.scale_by_decoupled_adam()
    descend = optax.scale_by_learning_rate(learning_rate)
    return adam, descend, penalties.ewc_proximal(learning_rate, strength)


def _rescale(strength: Schedulable = 0.5):
    return _descend(penalties.rescale_by_importance(strength))


def _kronecker_laplace(strength: Schedulable = 3.0):
    return _descend(penalties.kronecker_laplace(strength))


def _kronecker_laplace_separate(strength: Schedulable = 3.0):
    return _descend(
        penalties.kronecker_laplace(
            strength, accumulate="separate", capacity=2, overflow="merge"
        )
    )


def _mas(strength: Schedulable = 3.0):
    return _descend(optax_cl.mas(strength))


def _mas_separate(strength: Schedulable = 3.0, decay=0.7):
    mas = optax_cl.mas(
        strength,
        anchors="separate",
        capacity=2,
        overflow="merge",
        accumulate="decay",
        decay=decay,
    )
    return _descend(mas)


def _si(strength: Schedulable = 3.0, damping=0.1):
    return _descend(optax_cl.si(strength, damping=damping))


def _si_cumulative(strength: Schedulable = 3.0, damping=0.1):
    return _descend(optax_cl.si(strength, damping=damping, clamp="cumulative"))


def _agem():
    return _descend(optax_cl.agem())


def _agem_decay(decay=0.2):
    return _descend(optax_cl.agem(decay=decay, granularity="leaf"))


def _gem(margin=0.0):
    return _descend(optax_cl.gem(margin=margin))


def _gem_margin(margin=0.5):
    return _descend(optax_cl.gem(margin=margin))


def _pcgrad():
    return _descend(optax_cl.pcgrad())


def _ogd():
    # Of four numbers at least two stay free.
    ogd = optax_cl.ogd(1, samples=2, overflow="drop")
    return optax_cl.scale_by_decoupled_adam(), ogd, optax.scale(-LR)


def _packnet():
    adam = optax_cl.scale_by_decoupled_adam()
    return adam, optax.scale(-LR), isolation.packnet()


def _progressive():
    adam = optax_cl.scale_by_decoupled_adam()
    return adam, optax.scale(-LR), isolation.progressive(1, inputs="")


def _mix_replay(rho: Schedulable = 0.25):
    return _descend(optax_cl.mix_replay(rho))


def _protect_links(threshold=0.9, mean_decay=0.8):
    links = (optax_cl.attenuate(0.5), optax_cl.scale_by_decoupled_adam())
    return (
        optax_cl.protect(2, *links, threshold=threshold, mean_decay=mean_decay),
        optax.scale(-LR),
    )


def _attenuate(strength: Schedulable = 0.5):
    rule = optax_cl.constant(strength)
    inside = optax_cl.attenuate(rule, weighted=True), optax_cl.scale_by_decoupled_adam()
    return optax_cl.protect(2, *inside), optax.scale(-LR)


def _attenuate_with(rule):
    adam = optax_cl.scale_by_decoupled_adam()
    return optax_cl.protect(2, optax_cl.attenuate(rule), adam), optax.scale(-LR)


def _balance(kappa=2.0):
    return _attenuate_with(optax_cl.balance(kappa))


def _spring(kappa=2.0):
    return _attenuate_with(optax_cl.spring(kappa))


def _ratchet(strength=0.75):
    return _attenuate_with(optax_cl.ratchet(strength))


def _one_minus(a_max=0.5, decay=0.9):
    return _attenuate_with(optax_cl.one_minus(a_max, decay, per_leaf=True, debias=True))


def _proportional(a_max=0.5, decay=0.9):
    return _attenuate_with(optax_cl.proportional(a_max, decay))


def _project():
    inside = optax_cl.scale_by_decoupled_adam(), optax_cl.project()
    return optax_cl.protect(1, *inside), optax.scale(-LR)


def _measure():
    inside = (
        optax_cl.measure("overlap"),
        optax_cl.attenuate(0.5, weighted=True),
        optax_cl.measure("strength"),
        optax_cl.measure_gain(optax_cl.scale_by_decoupled_adam()),
        optax_cl.measure("cosine"),
        optax_cl.measure("leak"),
        optax_cl.project(),
    )
    return optax_cl.protect(1, *inside), optax.scale(-LR)


def _measure_gain(b2=0.999, eps=1e-8, eps_root=0.0):
    adam = optax_cl.scale_by_decoupled_adam(b2=b2, eps=eps, eps_root=eps_root)
    gain = optax_cl.measure_gain(adam, eps=eps, eps_root=eps_root)
    return optax_cl.protect(1, optax_cl.attenuate(0.5), gain), optax.scale(-LR)


def _decoupled_adamw(
    learning_rate: Schedulable = LR,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    weight_decay=1e-4,
):
    return optax_cl.decoupled_adamw(
        learning_rate,
        modifiers=[optax_cl.ewc(3.0)],
        post=[optax.scale(0.9)],
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        weight_decay=weight_decay,
    )


def _recipes() -> dict[str, "Entry"]:
    """The ready-made optimizers."""

    def replay_adamw(learning_rate: Schedulable = LR, rho: Schedulable = 0.3, b1=0.9):
        return recipes.replay_adamw(learning_rate, rho, b1=b1)

    def agem_adamw(learning_rate: Schedulable = LR, b1=0.9):
        return recipes.agem_adamw(learning_rate, b1=b1)

    def ewc_adamw(learning_rate: Schedulable = LR, strength: Schedulable = 3.0):
        return recipes.ewc_adamw(learning_rate, strength)

    def protected_adamw(
        learning_rate: Schedulable = LR, strength: Schedulable = 0.5, b1=0.9
    ):
        return recipes.protected_adamw(learning_rate, 1, strength, b1=b1)

    def projected_adamw(learning_rate: Schedulable = LR, threshold=0.9, b1=0.9):
        return recipes.projected_adamw(learning_rate, 1, threshold=threshold, b1=b1)

    return {
        "agem_adamw": Entry(
            agem_adamw, extra_args=_reference, agreeing=_same_reference
        ),
        "ewc_adamw": Entry(ewc_adamw),
        "projected_adamw": Entry(projected_adamw, needs_matrix=True),
        "protected_adamw": Entry(protected_adamw, needs_matrix=True),
        "replay_adamw": Entry(replay_adamw, extra_args=_replay),
    }


def _capture_raw(b1=0.9):
    return optax_cl.capture_raw(optax.chain(*_adam(b1)))


def _multi_steps(b1=0.9):
    return optax_cl.multi_steps(optax_cl.chain(*_adam(b1)), 1)


# Every matrix of the contract's parameters serves as the factor of an adapter.
FACTORS = "kernel|matrix|<root>"


def _olora(strength: Schedulable = 0.5):
    return _descend(
        lora.olora(strength, capacity=3, overflow="oldest", factors=FACTORS)
    )


def _olora_fro(strength: Schedulable = 0.5):
    return _descend(
        lora.olora(
            strength, capacity=1, penalty="fro", overflow="oldest", factors=FACTORS
        )
    )


EBLORA = lora.targets({"kernel": jnp.zeros((4, 3))}, {"kernel": 2}, alpha=1.0)


def balanced_params():
    """A balanced adapter, and a leaf that goes through, as a head would."""
    s = jnp.array(-0.5, jnp.float32)
    adapter = lora.Spectral(s, u=jnp.eye(3, 2), v=jnp.eye(4, 2))
    return {"kernel": adapter, "scale": params()["scale"]}


def _eblora(threshold=0.9, step_multiplier=1.0):
    # Without a memory: `begin_task` refuses a `v` beside one that is not orthonormal,
    # as the seeds of `check_vmap` are. `tests/lora` holds it to the other checks.
    eblora = lora.eblora(
        optax.chain(optax_cl.scale_by_decoupled_adam(), optax.scale(-LR)),
        targets=EBLORA,
        memory_rank=None,
        threshold=threshold,
        step_multiplier=step_multiplier,
    )
    # So does `init`, where it sees values.
    return (eblora._replace(init=jax.jit(eblora.init)),)


def _frozen_a():
    # What is held fixed converges to nothing, and the objectives have no kernel.
    def only_kernels(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in str(path), tree
        )

    hold = optax.masked(lora.frozen_a(factors="kernel"), only_kernels)
    return optax_cl.scale_by_decoupled_adam(), hold, optax.scale(-LR)


def _olora_project():
    project = lora.olora_project(capacity=3, overflow="oldest", factors=FACTORS)
    return optax_cl.scale_by_decoupled_adam(), project, optax.scale(-LR)


# Entries of further settings, and of ready-made chains of what stands here already,
# that only the slow tests hold to the whole contract.
SLOW = (
    *_recipes(),
    # `measure` has them all in one chain.
    "attenuate",
    "measure_gain",
    "project",
    # Built of `optax_cl.chain`, as the rows of single links are: `mix_replay` has the
    # same chain, `scale_by_decoupled_adam` the same capture around its own.
    "capture_raw",
    "chain",
    "multi_steps",  # around `scale_by_decoupled_adam`, as `check_multi_steps` has all
    "agem[decay]",
    "attenuate[balance]",
    "attenuate[one_minus]",
    "attenuate[proportional]",
    "attenuate[ratchet]",
    "attenuate[spring]",
    "ewc[separate]",
    "gem[margin]",
    # Their own tests try them inside other transformations.
    "eblora",
    "gem",
    "ogd",
    "packnet",
    "pcgrad",  # takes what `gem` takes
    "progressive",  # of one column, which is all that fits any parameters: no mask
    "kronecker_laplace[separate]",
    "mas[separate]",
    "olora[fro]",
    "scale_by_decoupled_adam[raw]",
    "si[cumulative]",
)

ENTRIES: dict[str, Entry] = {
    "agem": _captured(_agem)._replace(extra_args=_reference, agreeing=_same_reference),
    "agem[decay]": _captured(_agem_decay)._replace(
        extra_args=_reference, agreeing=_same_reference
    ),
    "attenuate": _captured(_attenuate)._replace(needs_matrix=True),
    "attenuate[balance]": _captured(_balance)._replace(needs_matrix=True),
    "attenuate[one_minus]": _captured(_one_minus)._replace(needs_matrix=True),
    "attenuate[proportional]": _captured(_proportional)._replace(needs_matrix=True),
    "attenuate[ratchet]": _captured(_ratchet)._replace(needs_matrix=True),
    "attenuate[spring]": _captured(_spring)._replace(needs_matrix=True),
    "capture_raw": Entry(_capture_raw),
    "chain": _captured(_mix_replay)._replace(extra_args=_replay),
    "decoupled_adamw": Entry(_decoupled_adamw),
    "eblora": _captured(_eblora)._replace(params=balanced_params),
    "ewc": _captured(_ewc),
    "ewc[separate]": _captured(_ewc_separate),
    "ewc_proximal": _captured(_ewc_proximal),
    "frozen_a": _captured(_frozen_a),
    "kronecker_laplace": _captured(_kronecker_laplace),
    "kronecker_laplace[separate]": _captured(_kronecker_laplace_separate),
    "mas": _captured(_mas),
    "mas[separate]": _captured(_mas_separate),
    "gem": _captured(_gem)._replace(extra_args=_memories, agreeing=_same_memories),
    "gem[margin]": _captured(_gem_margin)._replace(
        extra_args=_memories, agreeing=_same_memories
    ),
    "measure": _captured(_measure)._replace(
        extra_args=_reference, agreeing=_same_reference, needs_matrix=True
    ),
    "measure_gain": _captured(_measure_gain)._replace(needs_matrix=True),
    "mix_replay": _captured(_mix_replay)._replace(extra_args=_replay),
    "multi_steps": Entry(_multi_steps),
    "ogd": _captured(_ogd),
    "olora": _captured(_olora)._replace(needs_matrix=True),
    "olora[fro]": _captured(_olora_fro)._replace(needs_matrix=True),
    "packnet": _captured(_packnet),
    "olora_project": _captured(_olora_project)._replace(needs_matrix=True),
    "pcgrad": _captured(_pcgrad)._replace(
        extra_args=_memories, agreeing=_same_memories
    ),
    "progressive": _captured(_progressive),
    "project": _captured(_project)._replace(needs_matrix=True),
    "protect": _captured(_protect_links)._replace(needs_matrix=True),
    **_recipes(),
    "rescale_by_importance": _captured(_rescale),
    "scale_by_decoupled_adam": _captured(_adam),
    "scale_by_decoupled_adam[raw]": _captured(_adam_raw),
    "scale_by_decoupled_amsgrad": _captured(_amsgrad),
    "scale_by_decoupled_factored_rms": _captured(_factored),
    "si": _captured(_si),
    "si[cumulative]": _captured(_si_cumulative),
}
