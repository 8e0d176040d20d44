"""What is easily got wrong is refused, by the name of what is wrong."""

import importlib
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optax_cl
import optax_cl.flax
from optax_cl import lora, penalties, replay

KEY = jax.random.key(0)
TASK = optax_cl.classification(
    lambda p, b: b[0] @ p["w"] + p["b"][None], lambda b: b[1]
)
X, Y = jnp.eye(4), jnp.array([0, 1, 2, 0])
BATCHES = [(X, Y)]


def make_params(fan_in=4):
    return {"w": jnp.full((fan_in, 3), 0.1), "b": jnp.zeros(3)}


def ewc():
    return optax_cl.chain(optax_cl.ewc(1.0), optax_cl.scale_by_decoupled_adam())


def protect(*links):
    links = links or (optax_cl.attenuate(0.5), optax_cl.scale_by_decoupled_adam())
    return optax_cl.protect(2, *links)


def collect(state, params, batches=BATCHES, **kwargs):
    return optax_cl.collect(
        state, params, batches, **{"task": TASK, "key": KEY, **kwargs}
    )


# --- Task boundaries -----------------------------------------------------------------

CALLS = {
    "collect": collect,
    "end_task": lambda state, params: optax_cl.end_task(
        state, params, optax_cl.Statistics(jnp.zeros([]), {})
    ),
    "begin_task": optax_cl.begin_task,
}


@pytest.mark.parametrize("call", CALLS)
def test_state_and_params_swapped_are_refused_not_ignored(call):
    params = make_params()
    state = ewc().init(params)
    with pytest.raises(ValueError, match="`params` holds an optimizer state, EwcState"):
        CALLS[call](params, state)


@pytest.mark.parametrize("call", CALLS)
def test_a_transformation_in_place_of_its_state_is_refused(call):
    with pytest.raises(TypeError, match=r"`opt_state` must be .*tx\.init"):
        CALLS[call](ewc(), make_params())


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_end_task_refuses_what_collect_did_not_return(moments):
    params = make_params()
    with pytest.raises(TypeError, match="`statistics` must be what `collect` returned"):
        optax_cl.end_task(ewc().init(params), params, None, moments=moments)


def test_a_loss_in_place_of_a_task_is_refused():
    params = make_params()
    with pytest.raises(TypeError, match=r"`task` must be an `optax_cl\.Task`"):
        collect(ewc().init(params), params, task=TASK.loss)


@pytest.mark.parametrize("key", [0, None, jnp.zeros(3)])
def test_a_seed_in_place_of_a_key_is_refused(key):
    params = make_params()
    with pytest.raises(TypeError, match=r"`key` must be a PRNG key.*jax\.random\.key"):
        collect(ewc().init(params), params, key=key)


def test_a_key_of_the_old_kind_is_taken():
    params = make_params()
    state = ewc().init(params)
    old = collect(state, params, key=jax.random.PRNGKey(0))
    assert old.num_examples == 4


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ((X, Y), r"batches\[0\].*\(4, 4\).*batches\[1\].*\(4,\).*`\[batch\]`"),
        ([X, Y], r"batches\[1\].*`\[batch\]`"),
        ([(X, Y), (X, Y, Y)], r"batches\[1\]"),
        ({"x": X, "y": Y}, r"got dict.*`\[batch\]`.*`stacked=True`"),
        (X, r"got ArrayImpl.*`\[batch\]`.*`stacked=True`"),
        (None, "got NoneType"),
    ],
)
def test_one_batch_in_place_of_a_list_of_batches_is_refused(batches, message):
    params = make_params()
    with pytest.raises((TypeError, ValueError), match=message):
        collect(ewc().init(params), params, batches)


@pytest.mark.parametrize("make", [ewc, protect])
def test_parameters_of_another_model_are_refused_as_such(make):
    state = make().init(make_params())
    with pytest.raises(ValueError, match=r"`params` must .*the optimizer state"):
        collect(state, {"w": jnp.ones((4, 3))})


@pytest.mark.parametrize("make", [ewc, protect])
def test_parameters_of_another_shape_are_refused_with_their_path(make):
    state, other = make().init(make_params()), make_params(5)
    batches = [(jnp.ones((4, 5)), Y)]
    with pytest.raises(ValueError, match=r"`w`.*\(5, 3\).*4"):
        optax_cl.end_task(state, other, collect(state, other, batches))


@pytest.mark.parametrize("name", ["loss", "log_prob"])
def test_a_mean_over_the_batch_is_refused_by_protect(name):
    # It would count the padding of a ragged last batch as examples.
    params = make_params()
    function = getattr(TASK, name)
    task = TASK._replace(**{name: lambda *args: function(*args).mean()})
    labels = {"loss": "empirical", "log_prob": "sampled"}[name]
    state = optax_cl.protect(2, optax_cl.project(), labels=labels).init(params)
    with pytest.raises(ValueError, match=rf"`task\.{name}` must keep the axis"):
        collect(state, params, task=task)


def test_a_mean_over_the_batch_is_refused_by_a_memory_of_gradients():
    targets = lora.targets(make_params(), {"w": 1}, alpha=1.0)
    s = jnp.array(-0.5, jnp.float32)
    adapters = {"w": lora.Spectral(s, u=jnp.eye(3, 1), v=jnp.eye(4, 1))}
    tx = lora.eblora(optax.adam(0.1), targets=targets, memory_rank=2)

    def mean_loss(both, batch):
        return TASK.loss(lora.merge(targets, both[1], both[0]), batch).mean()

    with pytest.raises(ValueError, match=r"`task\.loss` must keep the axis"):
        collect(
            tx.init(adapters),
            adapters,
            task=optax_cl.Task(loss=mean_loss),
            frozen=make_params(),
        )


# --- Building a chain ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: optax_cl.chain([optax.scale(1.0), ewc()]), r"chain\(\*links\)"),
        (lambda: protect(optax_cl.ratchet()), r"`attenuate\(rule\)`"),
        (lambda: optax_cl.attenuate(optax_cl.ratchet), r"`ratchet\(\)`"),
        (lambda: optax_cl.chain(optax_cl.agem), "not called"),
    ],
)
def test_what_is_no_link_is_refused_with_what_to_write(build, message):
    with pytest.raises(TypeError, match=message):
        build()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.chain(optax.clip(1.0), optax.amsgrad(1e-3)),
        protect(),
    ],
)
def test_an_optimizer_in_place_of_a_modifier_is_refused(optimizer):
    # Its steps of 1e-3 downhill would be taken for a gradient: uphill, renormalised.
    tx = optax_cl.decoupled_adamw(1e-3, modifiers=[optimizer])
    with pytest.raises(ValueError, match=r"`modifiers\[0\]`.*second moment"):
        tx.init(make_params())


def test_averages_of_gradients_are_modifiers():
    modifiers = [optax.ema(0.9), optax.trace(0.5), optax_cl.agem(decay=0.5)]
    optax_cl.decoupled_adamw(1e-3, modifiers=modifiers).init(make_params())


@pytest.mark.parametrize("k", [0, -1, 2.0, None])
def test_multi_steps_refuses_a_number_that_never_steps(k):
    with pytest.raises((TypeError, ValueError), match="`every_k_schedule`"):
        optax_cl.multi_steps(optax_cl.decoupled_adamw(0.1), k)


# --- Flax ----------------------------------------------------------------------------


def nnx_pair():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    return nnx.Optimizer(model, ewc(), wrt=nnx.Param), model


def test_without_flax_its_face_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "optax_cl.flax")
    with pytest.raises(ImportError, match=r"pip install 'optax-cl\[flax\]'"):
        importlib.import_module("optax_cl.flax")


def test_nnx_optimizer_and_model_swapped_are_refused():
    optimizer, model = nnx_pair()
    with pytest.raises(TypeError, match=r"`optimizer` must be an nnx\.Optimizer"):
        optax_cl.flax.begin_task(model, optimizer)


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_state_of_an_nnx_optimizer_is_sent_to_its_own_functions(call, pure):
    optimizer, model = nnx_pair()
    params = nnx.state(model, nnx.Param)
    params = nnx.as_pure(params) if pure else params
    with pytest.raises(ValueError, match=rf"nnx\.Optimizer.*`optax_cl\.flax\.{call}`"):
        CALLS[call](optimizer.opt_state, params)


def test_parameters_held_in_variables_are_fine_without_an_nnx_optimizer():
    params = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    state = ewc().init(params)
    task = optax_cl.classification(lambda p, b: b[0] @ p["kernel"][...], lambda b: b[1])
    stats = collect(state, params, task=task)
    state = optax_cl.begin_task(optax_cl.end_task(state, params, stats), params)
    assert optax_cl.describe(state)[0].tasks == 1


def nnx_collect(task, batches=BATCHES):
    optimizer, model = nnx_pair()
    return optax_cl.flax.collect(optimizer, model, batches, task=task, key=KEY)


def test_a_task_of_functions_of_params_is_told_from_one_of_the_nnx_pair():
    def logits(params, batch):
        return batch[0] @ params["kernel"]

    task = optax_cl.classification(logits, lambda b: b[1])
    with pytest.raises(
        TypeError, match=r"`task` has .* `\(params, rest\)`.*flax\.class"
    ):
        nnx_collect(task)
    pair = optax_cl.classification(lambda p, b: logits(p[0], b), lambda b: b[1])
    assert nnx_collect(pair).num_examples == 4


@pytest.mark.parametrize("task", [TASK, "batch"])
def test_what_a_function_of_an_nnx_task_raises_stays_and_says_what_it_got(task):
    if task == "batch":  # a mistake about the batch, not about the pair
        model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        task = optax_cl.flax.classification(
            model, lambda m, b: m(b["x"]), lambda b: b[1]
        )
    with pytest.raises(TypeError, match="tuple indices") as info:
        nnx_collect(task)
    assert any("get the pair `(params, rest)`" in note for note in info.value.__notes__)


@pytest.mark.parametrize("make", [ewc, protect])
def test_what_a_function_of_a_task_raises_says_which_it_was_and_what_it_got(make):
    params = make_params()
    with pytest.raises(TypeError, match="dot_general") as info:
        collect(make().init(params), params, [(jnp.ones((4, 5)), Y)])
    note = next(n for n in info.value.__notes__ if "raised this" in n)
    for part in ("`task.outputs`", "`params`", "w: (4, 3)", "0: (4, 5)", "1: (4,)"):
        assert part in note


# --- Parameters of odd kinds ---------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        optax_cl.ewc(1.0),
        optax_cl.ewc_proximal(0.1, 1.0, anchors="separate", capacity=2),
        optax_cl.rescale_by_importance(0.5),
        optax_cl.mas(1.0),
        optax_cl.si(1.0),
        optax_cl.protect(2, optax_cl.attenuate(0.5)),
    ],
)
def test_complex_parameters_are_refused_by_their_path(tx):
    # The square of a complex score is no importance, and may be negative.
    params = make_params() | {"phase": {"kernel": jnp.ones((4, 3), jnp.complex64)}}
    with pytest.raises(TypeError, match=r"real parameters only; at `phase/kernel`"):
        tx.init(params)
    masked = optax.masked(tx, {"w": True, "b": True, "phase": False})
    assert optax_cl.describe(masked.init(params))


def test_a_fisher_of_complex_parameters_is_refused():
    params = {"w": jnp.ones((4, 3), jnp.complex64)}
    task = optax_cl.classification(lambda p, b: (b[0] @ p["w"]).real, lambda b: b[1])
    with pytest.raises(TypeError, match="a diagonal Fisher is of real parameters only"):
        penalties.fisher_diagonal(params, BATCHES, task=task, key=KEY)


@pytest.mark.parametrize("make", [ewc, protect])
def test_a_python_number_among_the_parameters_is_a_scalar_leaf(make):
    params = make_params() | {"b": 0.5}
    task = optax_cl.classification(lambda p, b: b[0] @ p["w"] * p["b"], lambda b: b[1])
    tx = make()
    state = tx.init(params)
    stats = collect(state, params, task=task)
    state = optax_cl.end_task(state, params, stats)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, state, params)
    assert updates["b"].shape == ()


# --- Adapters ------------------------------------------------------------------------

TARGETS = lora.targets(make_params(), {"w": 2}, alpha=4.0)
GRADIENTS = {"w": jnp.eye(4, 3)}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda: lora.lora_init(TARGETS, make_params(), KEY).adapters, "LoRA at `w`"),
        (make_params, "at `w` there is the kernel itself"),
    ],
)
def test_eblora_refuses_what_it_would_not_act_on(params, message):
    tx = lora.eblora(optax.adam(0.1), targets=TARGETS, memory_rank=1)
    with pytest.raises(ValueError, match=message):
        tx.init(params())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lora.lora_init(TARGETS, make_params(), 0), TypeError, "`key`"),
        (lambda: lora.lora_init(make_params(), TARGETS, KEY), TypeError, "`targets`"),
        (
            lambda: lora.eblora_init(
                TARGETS,
                GRADIENTS,
                lora.eblora(optax.adam(0.1), targets=TARGETS, memory_rank=1).init({}),
            ),
            TypeError,
            r"`memory`.*lora\.memory\(opt_state\)",
        ),
        (
            lambda: lora.merge(
                TARGETS, make_params(), lora.lora_init(TARGETS, make_params(), KEY)
            ),
            ValueError,
            "Start, whose field `adapters` has them",
        ),
        (
            lambda: lora.mean_gradients(TARGETS, TASK.loss, make_params(), (X, Y)),
            ValueError,
            r"`\[batch\]`",
        ),
        (
            lambda: lora.input_covariances(
                TARGETS, lambda p, b: {"w": b[0]}, make_params(), {"x": X}
            ),
            TypeError,
            "`batches` must be a list",
        ),
    ],
)
def test_what_is_given_in_place_of_an_adapters_argument_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- Replay --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda buffer: replay.reservoir_add(buffer, X[:, :2], 0),
        lambda buffer: replay.reservoir_sample(buffer, 0, 2),
    ],
)
def test_a_reservoir_refuses_a_seed_in_place_of_a_key(call):
    with pytest.raises(TypeError, match="`key` must be a PRNG key"):
        call(replay.reservoir_init(3, jnp.zeros(2)))
