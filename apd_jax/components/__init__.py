"""How weights are parametrised: components by number, sites that hold pieces of them.

`factors` what a component pytree is, `initial` where components come from, `draws` of many arrays
at once, `algebra` their sums, norms, ranks and numbers, `layout` which axes of a weight are inputs
and which outputs, `tables` which leaves are looked up or added.
"""

from apd_jax.components.algebra import (
    aligned,
    chosen,
    compact,
    effective_ranks,
    leaf_total,
    materialize,
    merge,
    normalize_U,
    norms,
    project_U_gradient,
    relabel,
    relative_parameter_error,
    remainders,
    singular_values,
    split,
    squared_norms,
    svd_of_product,
    total,
    weighted_sum,
)
from apd_jax.components.draws import normals
from apd_jax.components.factors import (
    Components,
    Factors,
    decomposed_leaves,
    is_slot,
    map_sites,
    named_leaves,
    replace_leaves,
    split_over,
    without_arrays,
)
from apd_jax.components.initial import (
    Select,
    as_select,
    from_materialized,
    from_raw,
    full_name,
    grown,
    init,
    matches,
    selected_paths,
    short_name,
)
from apd_jax.components.layout import Layout, path_name
from apd_jax.components.tables import find as tables_of

__all__ = [
    "Components",
    "Factors",
    "Layout",
    "Select",
    "aligned",
    "as_select",
    "chosen",
    "compact",
    "decomposed_leaves",
    "effective_ranks",
    "from_materialized",
    "from_raw",
    "full_name",
    "grown",
    "init",
    "is_slot",
    "leaf_total",
    "map_sites",
    "matches",
    "materialize",
    "merge",
    "named_leaves",
    "normalize_U",
    "normals",
    "norms",
    "path_name",
    "project_U_gradient",
    "relabel",
    "relative_parameter_error",
    "remainders",
    "replace_leaves",
    "selected_paths",
    "short_name",
    "singular_values",
    "split",
    "split_over",
    "squared_norms",
    "svd_of_product",
    "tables_of",
    "total",
    "weighted_sum",
    "without_arrays",
]
