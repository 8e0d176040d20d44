"""What a run of tasks amounts to: numbers read off matrices and curves.

Pure functions on arrays. NumPy arrays and lists are computed in NumPy and float64; JAX
arrays and tracers in JAX, under ``jit``, ``vmap`` or eagerly. Leading dimensions are
batch dimensions, of seeds for instance. Input that is not finite raises an error where
a metric reads it; under ``jit``, where values are not known, NaN gives NaN.

Losses are told by ``higher_is_better=False``. Levels keep the unit they came in and do
not change sign; a difference is positive when its name comes true (transfer: a task
gained, forgetting: it lost), for accuracies and losses alike.

Off the matrix ``[..., T + 1, T]``, row 0 at random initialisation: `average_accuracy`,
`average_incremental_accuracy`, `learning_accuracy`, `backward_transfer`,
`negated_backward_transfer`, `chaudhry_forgetting`, `forward_transfer`,
`gain_over_independent`, `intransigence`; `learning_curve_area`; `summary` for all.

Off curves ``[..., T, N]``, evaluated during training: `min_accuracy`,
`worst_case_accuracy`, `windowed_forgetting`, `windowed_plasticity`, `stability_gap`;
`curve_summary` for all; the masks `since_started`, `since_learned`, `old_task_pairs`.

Off probes ``[..., S + 1, J]``, row 0 the model as it came: `ability_tax`.

Over orders: `order_sensitivity`, `by_task`. Over seeds: `mean_and_error`,
`paired_difference`.
"""

from optax_cl.metrics._ability_tax import AbilityTax, ability_tax
from optax_cl.metrics._accuracy_matrix import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    chaudhry_forgetting,
    forward_transfer,
    gain_over_independent,
    intransigence,
    learning_accuracy,
    negated_backward_transfer,
)
from optax_cl.metrics._boundaries import (
    old_task_pairs,
    since_learned,
    since_started,
)
from optax_cl.metrics._learning_curves import learning_curve_area
from optax_cl.metrics._orders import OrderSensitivity, by_task, order_sensitivity
from optax_cl.metrics._seeds import MeanAndError, mean_and_error, paired_difference
from optax_cl.metrics._stability_gap import (
    StabilityGap,
    min_accuracy,
    stability_gap,
    worst_case_accuracy,
)
from optax_cl.metrics._summary import (
    CurveSummary,
    Summary,
    curve_summary,
    summary,
)
from optax_cl.metrics._windows import windowed_forgetting, windowed_plasticity

__all__ = [
    "AbilityTax",
    "CurveSummary",
    "MeanAndError",
    "OrderSensitivity",
    "StabilityGap",
    "Summary",
    "ability_tax",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "by_task",
    "chaudhry_forgetting",
    "curve_summary",
    "forward_transfer",
    "gain_over_independent",
    "intransigence",
    "learning_accuracy",
    "learning_curve_area",
    "mean_and_error",
    "min_accuracy",
    "negated_backward_transfer",
    "old_task_pairs",
    "order_sensitivity",
    "paired_difference",
    "since_learned",
    "since_started",
    "stability_gap",
    "summary",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
]
