"""The built-in merge methods: names, knobs, and where their kernels are. Imports no torch; `docs/merge-methods.md` explains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_subspace.merging.methods import checks
from peft_subspace.merging.methods.registry import Kind, Method, Parameter, register

_HERE = "peft_subspace.merging.methods"

WEIGHT = Parameter("weight", 1.0, "model", help="factor of the model", demanded=True)
STATISTICS = Parameter("statistics", "", "model", help="safetensors file with a statistic for each tensor")
DENSITY = Parameter("density", 1.0, "model", 0.0, 1.0, help="share of the entries of a delta that is kept")
LAMBDA = Parameter("lambda", 1.0, help="factor of the merged delta")
INT8 = Parameter("int8_mask", False, help="accepted for mergekit's recipes; masks are never held whole, so it does nothing")
SIGNS = Parameter(
    "majority_sign_method", "total", choices=("total", "frequency"), help="signs are elected by sums, or by heads"
)


def _normalize(default: bool, what: str = "divide by the sum of the weights that take part") -> Parameter:
    return Parameter("normalize", default, help=what)


def _sparse(normalize: bool, rescale: bool, *more: Parameter) -> tuple[Parameter, ...]:
    """Knobs of the methods that make deltas sparse, then add them."""
    keep_norm = Parameter("rescale", rescale, help="scale what is kept up to what the delta was")
    return WEIGHT, DENSITY, _normalize(normalize), keep_norm, LAMBDA, INT8, *more


_GAMMA = Parameter("gamma", 0.01, "model", 0.0, 1.0, help="share of the entries, the largest, that is dropped")
_EPSILON = Parameter("epsilon", 0.15, "model", 0.0, 1.0, help="half the span of the chances to be kept")


def _nuslerp_kind(options: Mapping[str, Any]) -> Kind:
    if options["nuslerp_flatten"]:
        return "elementwise"
    return "matrix" if options["nuslerp_row_wise"] else "rows"  # vectors along the first axis are not contiguous


def _model_stock_kind(options: Mapping[str, Any]) -> Kind:
    return "rows" if options["filter_wise"] else "elementwise"


_TA = "Editing Models with Task Arithmetic, arXiv:2212.04089"
_TIES = "TIES-Merging, arXiv:2306.01708"
_DARE = "DARE, arXiv:2311.03099"
_DELLA = "DELLA-Merging, arXiv:2406.11617"
_CRUMBS = "Model Breadcrumbs, arXiv:2312.06795"
_ATLAS = "aTLAS, arXiv:2407.02880"
_CONCRETE = "Concrete subspace learning, arXiv:2312.06173"
_ONE_D = "weighted mean of the deltas for tensors that are not matrices"

for _method in (
    Method(
        "linear", "elementwise", "model", f"{_HERE}.task_arithmetic:linear", (WEIGHT, _normalize(True)), base="ignored",
        check=checks.weights_do_not_cancel, reference="Model soups, arXiv:2203.05482", aliases=("average",),
    ),
    Method(
        "task_arithmetic", "elementwise", "delta", f"{_HERE}.task_arithmetic:task_arithmetic", _sparse(False, False),
        reference=_TA,
    ),
    Method(
        "magnitude_prune", "elementwise", "delta", f"{_HERE}.ties:magnitude_prune", _sparse(False, False),
        f"{_HERE}.ties:passes", reference="PEFT's merge_utils.magnitude_prune",
    ),
    Method(
        "ties", "elementwise", "delta", f"{_HERE}.ties:ties", _sparse(True, False, SIGNS),
        f"{_HERE}.ties:passes", reference=_TIES, whole_model=("paper",),
    ),
    Method(
        "dare_linear", "elementwise", "delta", f"{_HERE}.dare:dare_linear", _sparse(False, True), f"{_HERE}.dare:passes",
        reference=_DARE,
    ),
    Method(
        "dare_ties", "elementwise", "delta", f"{_HERE}.dare:dare_ties", _sparse(False, True, SIGNS),
        f"{_HERE}.dare:passes", reference=_DARE,
    ),
    Method(
        "breadcrumbs", "elementwise", "delta", f"{_HERE}.breadcrumbs:breadcrumbs", _sparse(False, False, _GAMMA),
        f"{_HERE}.breadcrumbs:passes", reference=_CRUMBS,
    ),
    Method(
        "breadcrumbs_ties", "elementwise", "delta", f"{_HERE}.breadcrumbs:breadcrumbs_ties",
        _sparse(False, False, _GAMMA, SIGNS), f"{_HERE}.breadcrumbs:passes", reference=_CRUMBS,
    ),
    Method(
        "della", "rows", "delta", f"{_HERE}.della:della", _sparse(True, True, _EPSILON, SIGNS),
        f"{_HERE}.della:passes", check=checks.chances_inside_0_1, reference=_DELLA, second_axis=("mergekit",),
    ),
    Method(
        "della_linear", "rows", "delta", f"{_HERE}.della:della_linear", _sparse(False, True, _EPSILON),
        f"{_HERE}.della:passes", check=checks.chances_inside_0_1, reference=_DELLA, second_axis=("mergekit",),
    ),
    Method(
        "slerp", "elementwise", "model", f"{_HERE}.spherical:slerp", 
        (Parameter("t", 0.5, help="0: the base, 1: the other", demanded=True),),
        f"{_HERE}.spherical:slerp_passes", maximum=1, reference="Shoemake 1985, Animating rotation with quaternion curves",
    ),
    Method(
        "nuslerp", _nuslerp_kind, "delta", f"{_HERE}.spherical:nuslerp",
        (
            WEIGHT,
            Parameter("nuslerp_flatten", True, help="the tensor is one vector"),
            Parameter("nuslerp_row_wise", False, help="vectors along the first axis instead of the last, if not flat"),
        ),
        f"{_HERE}.spherical:nuslerp_passes", base="optional", minimum=2, maximum=2, reference="mergekit's nuslerp",
        divides="sum",
    ),
    Method(
        "multislerp", "elementwise", "delta", f"{_HERE}.spherical:multislerp",
        (WEIGHT, Parameter("normalize_weights", True), Parameter("eps", 1e-8, minimum=0.0)),
        f"{_HERE}.spherical:passes", check=checks.weights_do_not_cancel, base="optional", reference="mergekit's multislerp",
    ),
    Method(
        "karcher", "elementwise", "model", f"{_HERE}.spherical:karcher",
        (WEIGHT, Parameter("max_iter", 10, minimum=0), Parameter("tol", 1e-5, minimum=0.0)),
        f"{_HERE}.spherical:passes", check=checks.weights_do_not_cancel, base="ignored",
        reference="Karcher mean on the sphere, arXiv:2603.04972", divides="sum",
    ),
    Method(
        "model_stock", _model_stock_kind, "delta", f"{_HERE}.model_stock:merge",
        (Parameter("filter_wise", False, help="one angle for each vector along the last axis"),),
        f"{_HERE}.model_stock:passes", minimum=2, reference="Model Stock, arXiv:2403.19522",
    ),
    Method(
        "sce", "elementwise", "delta", f"{_HERE}.sce:merge",
        (Parameter("select_topk", 1.0, minimum=0.0, maximum=1.0, help="share of the varying entries that is merged"), INT8),
        f"{_HERE}.sce:passes", reference="FuseChat, SCE, arXiv:2408.07990",
    ),
    Method(
        "emr", "elementwise", "delta", f"{_HERE}.emr:merge", (LAMBDA,), reference="EMR-Merging, arXiv:2405.17461",
    ),
    Method(
        "tsv_m", "matrix", "delta", f"{_HERE}.singular:tsv_m", (WEIGHT, LAMBDA), reference="TSV-Merge, arXiv:2412.00081",
        fallback=_ONE_D,
    ),
    Method(
        "iso_c", "matrix", "delta", f"{_HERE}.singular:iso_c", (WEIGHT, LAMBDA),
        reference="Isotropic merging in the common subspace, arXiv:2502.04959", fallback=_ONE_D,
    ),
    Method(
        "iso_cts", "matrix", "delta", f"{_HERE}.singular:iso_cts",
        (
            WEIGHT, LAMBDA,
            Parameter("common_space_fraction", 0.8, minimum=0.0, maximum=1.0, help="share of the rank that is common"),
        ),
        reference="Isotropic merging in common and task-specific subspaces, arXiv:2502.04959", fallback=_ONE_D,
    ),
    Method(
        "knots", "matrix", "delta", f"{_HERE}.knots:merge",
        (
            WEIGHT, DENSITY, _normalize(True), LAMBDA, SIGNS,
            Parameter("inner", "ties", choices=("ties", "task_arithmetic"), help="how the aligned blocks are merged"),
        ),
        reference="KnOTS, arXiv:2410.19735", fallback="the inner method on the deltas",
    ),
    Method(
        "atlas", "elementwise", "delta", f"{_HERE}.atlas:merge", (LAMBDA,), reference=_ATLAS,
        learned=f"{_HERE}.atlas:saved_coefficients",
    ),
    Method(
        "concrete", "elementwise", "delta", f"{_HERE}.concrete:merge", (LAMBDA,), reference=_CONCRETE,
        learned=f"{_HERE}.concrete:saved_mask",
    ),
    Method(
        "regmean", "matrix", "model", f"{_HERE}.data:regmean",
        (WEIGHT, STATISTICS, Parameter("reduction", 0.9, minimum=0.0, maximum=1.0, help="factor of off-diagonal entries")),
        base="ignored", statistics="the Gram matrix [in, in] of each layer's inputs",
        statistics_shape=lambda shape: (shape[1], shape[1]) if len(shape) == 2 else None,
        reference="RegMean, arXiv:2212.09849", fallback="weighted mean for tensors without a Gram matrix", divides="sum",
    ),
    Method(
        "fisher", "elementwise", "model", f"{_HERE}.data:fisher",
        (WEIGHT, STATISTICS, Parameter("floor", 1e-6, minimum=0.0, help="least Fisher information of an entry")),
        base="ignored", statistics="the diagonal Fisher information of each tensor",
        reference="Fisher-weighted averaging, arXiv:2111.09832", fallback="weighted mean for tensors without it",
        divides="entry",
    ),
):  # fmt: skip
    register(_method)
