"""What of PEFT's own test-suite our configs are run through; see peft_conformance.py for the format."""

import atexit
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from peft_subspace import AtlasConfig, ConcreteConfig, FloraConfig, PelaConfig, SvfitConfig

FLORA = {}  # the defaults: ranks are lowered where a layer is smaller, which is most of them here
# The suite trains with plain SGD at a learning rate of 0.5 on inputs up to 90 and the sum as loss. There the step grows
# with the square of the scale, and two adapted layers in a row (or a grouped conv) overflow at the default, which is made
# for Adam. PEFT has such exceptions in its own tests.
CALM = {"scale": 0.2}
COLD = {"scale": 1e-4}  # this model feeds itself inputs up to 57,600 and is compared at a tolerance of 1e-4
PELA = {"r": 3}
SVFIT = {"r": 8}  # lowered where a layer has fewer singular values; the default is "full"


# PEFT's models, whose task vectors a composed weight is made of. The suite makes a new model in every test, so the vectors fit
# by name and shape. It trains by SGD at 0.5 on inputs up to 90; small vectors keep that from overflowing.
LINEAR = {"lin0.weight": (20, 10), "lin0.bias": (20,), "lin1.weight": (2, 20), "lin1.bias": (2,)}
SHAPES = {
    "MLP": LINEAR,
    "EmbConv1D": {
        "emb.weight": (100, 5), "conv1d.weight": (5, 1), "conv1d.bias": (1,), "lin0.weight": (2, 10), "lin0.bias": (2,)
    },
    "Conv1d": {"conv1d.weight": (1, 1, 2), "conv1d.bias": (1,), "lin0.weight": (2, 9), "lin0.bias": (2,)},
    "Conv2d": {"conv2d.weight": (10, 5, 3, 3), "conv2d.bias": (10,), "lin0.weight": (2, 10), "lin0.bias": (2,)},
    "Conv3d": {"conv3d.weight": (10, 5, 3, 3, 3), "conv3d.bias": (10,), "lin0.weight": (2, 10), "lin0.bias": (2,)},
    "MHA": {
        "mha.in_proj_weight": (30, 10), "mha.in_proj_bias": (30,), "mha.out_proj.weight": (10, 10), "mha.out_proj.bias": (10,),
        "lin0.weight": (2, 10), "lin0.bias": (2,),
    },
}  # fmt: skip


def pools(count: int = 3, scale: float = 0.05) -> dict[str, dict[str, str]]:
    """Model -> a pool of random vectors, in files that go with the process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    generator, found = torch.Generator().manual_seed(0), {}
    for model, shapes in SHAPES.items():
        for t in range(count):
            path = folder / f"{model}-{t}.safetensors"
            tensors = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            save_file(tensors, path, metadata={"format": "pt", "peft_subspace": "task_vector"})
            found.setdefault(model, {})[f"v{t}"] = str(path)
    return found


POOLS = pools()
MLP = {"pool": POOLS["MLP"]}
COMPOSED = {
    "EmbConv1D": ["emb", "conv1d"],
    "Conv1d": ["conv1d"],
    "Conv2d": ["conv2d", "lin0"],
    "Conv3d": ["conv3d"],
    "MHA": ["mha", "lin0"],
}
# A test asks every parameter to move by 1e-4: these small vectors need a large factor, and a rescaled mask of one entry is 1.
MOVING = {"rescale": False, "coefficients": 3.0}

CASES = [
    ("FLoRA MLP 1", "MLP", FloraConfig, {**FLORA, "target_modules": "lin0"}),
    ("FLoRA MLP 2", "MLP", FloraConfig, {**FLORA, "target_modules": ["lin0"]}),
    ("FLoRA MLP 3", "MLP", FloraConfig, {**FLORA, "target_modules": ["lin1"]}),
    ("FLoRA MLP 4", "MLP", FloraConfig, {**FLORA, **CALM, "target_modules": ["lin0", "lin1"]}),
    ("FLoRA MLP 5", "MLP", FloraConfig, {**FLORA, "target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("FLoRA MLP 6", "MLP", FloraConfig, {**FLORA, "target_modules": ["lin0"], "dropout": 0.1}),
    ("FLoRA MLP 7", "MLP", FloraConfig, {"r": [5, 3], "scale": 2.0, "target_modules": ["lin0"]}),
    ("FLoRA MLP 8", "MLP", FloraConfig, {**FLORA, "init_weights": "orthogonal", "target_modules": ["lin0"]}),
    ("FLoRA MLP 9", "MLP", FloraConfig, {**FLORA, "energy": 0.9, "target_modules": ["lin0"]}),
    ("FLoRA Embedding + Conv1D 1", "EmbConv1D", FloraConfig, {**FLORA, "target_modules": ["conv1d"]}),
    ("FLoRA Embedding + Conv1D 2", "EmbConv1D", FloraConfig, {**FLORA, "target_modules": ["emb"]}),
    ("FLoRA Embedding + Conv1D 3", "EmbConv1D", FloraConfig, {**FLORA, "target_modules": ["emb", "conv1d"]}),
    ("FLoRA Conv1d", "Conv1d", FloraConfig, {**FLORA, "target_modules": ["conv1d"]}),
    ("FLoRA Conv1d bigger", "Conv1dBigger", FloraConfig, {**FLORA, "target_modules": ["conv1d"]}),
    ("FLoRA Conv1d groups", "Conv1dGroups", FloraConfig, {**FLORA, "target_modules": ["conv1d"]}),
    ("FLoRA Conv2d 1", "Conv2d", FloraConfig, {**FLORA, "target_modules": ["conv2d"]}),
    ("FLoRA Conv2d 2", "Conv2d", FloraConfig, {**FLORA, **CALM, "target_modules": ["conv2d", "lin0"]}),
    ("FLoRA Conv2d 3", "Conv2d", FloraConfig, {**FLORA, "r_spatial": 3, "target_modules": ["conv2d"]}),
    ("FLoRA Conv2d 1x1", "Conv2d1x1", FloraConfig, {**FLORA, "target_modules": ["conv2d"]}),
    ("FLoRA Conv2d wide", "Conv2d2", FloraConfig, {**FLORA, "target_modules": ["conv2d", "lin0"]}),
    ("FLoRA Conv2d groups 1", "Conv2dGroups", FloraConfig, {**FLORA, "target_modules": ["conv2d"]}),
    ("FLoRA Conv2d groups 2", "Conv2dGroups2", FloraConfig, {**FLORA, **COLD, "target_modules": ["conv2d"]}),
    ("FLoRA Conv3d 1", "Conv3d", FloraConfig, {**FLORA, "target_modules": ["conv3d"]}),
    ("FLoRA Conv3d 2", "Conv3d", FloraConfig, {**FLORA, **CALM, "target_modules": ["conv3d", "lin0"]}),
    ("FLoRA MHA 1", "MHA", FloraConfig, {**FLORA, "target_modules": ["mha"]}),
    ("FLoRA MHA 2", "MHA", FloraConfig, {**FLORA, "target_modules": ["mha", "lin0"]}),
    ("FLoRA parameters 1", "MlpUsingParameters", FloraConfig, {**FLORA, "target_parameters": ["lin0.weight"]}),
    ("FLoRA", "decoder", FloraConfig, {**FLORA, "target_modules": None, "dropout": 0.05}),
    ("FLoRA", "seq2seq", FloraConfig, {**FLORA, "target_modules": None, "dropout": 0.05}),
    ("FLoRA", "feature", FloraConfig, {**FLORA, "target_modules": None, "dropout": 0.05}),
    ("FLoRA", "seq_cls", FloraConfig, {**FLORA, "target_modules": None, "dropout": 0.05}),
    ("FLoRA", "token_cls", FloraConfig, {**FLORA, "target_modules": None}),
    ("FLoRA", "qa", FloraConfig, {**FLORA, "target_modules": None}),
    (
        "FLoRA experts",
        "target_parameters:trl-internal-testing/tiny-Llama4ForCausalLM",
        FloraConfig,
        {**FLORA, "target_modules": [], "target_parameters": ["feed_forward.experts.down_proj"]},
    ),
    (
        "FLoRA two stacks",
        "target_parameters:trl-internal-testing/tiny-Llama4ForCausalLM",
        FloraConfig,
        {
            **FLORA,
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["feed_forward.experts.down_proj", "feed_forward.experts.gate_up_proj"],
        },
    ),
    ("aTLAS MLP 1", "MLP", AtlasConfig, {**MLP, "target_modules": "lin0"}),
    ("aTLAS MLP 2", "MLP", AtlasConfig, {**MLP, "target_modules": ["lin0"], "granularity": "row"}),
    ("aTLAS MLP 3", "MLP", AtlasConfig, {**MLP, "target_modules": ["lin1"], "granularity": "column"}),
    ("aTLAS MLP 4", "MLP", AtlasConfig, {**MLP, "target_modules": ["lin0", "lin1"]}),
    ("aTLAS MLP 5", "MLP", AtlasConfig, {**MLP, "target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("aTLAS MLP 6", "MLP", AtlasConfig, {**MLP, "target_modules": ["lin0"], "granularity": "partition", "partition": 4}),
    *(
        (f"aTLAS {model}", model, AtlasConfig, {"pool": POOLS[model], "target_modules": targets})
        for model, targets in COMPOSED.items()
    ),
    ("Concrete MLP 1", "MLP", ConcreteConfig, {**MLP, "target_modules": "lin0"}),
    ("Concrete MLP 2", "MLP", ConcreteConfig, {**MLP, "target_modules": ["lin0"], "granularity": "row"}),
    ("Concrete MLP 3", "MLP", ConcreteConfig, {**MLP, "target_modules": ["lin1"], "learn_coefficients": "layer"}),
    ("Concrete MLP 4", "MLP", ConcreteConfig, {**MLP, "target_modules": ["lin0", "lin1"], "granularity": "column"}),
    ("Concrete MLP 5", "MLP", ConcreteConfig, {**MLP, "target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (
        "Concrete MLP 6",
        "MLP",
        ConcreteConfig,
        {**MLP, "target_modules": ["lin0"], "eval_mask": "sample", "rescale": False},
    ),
    *(
        (
            f"Concrete {model}",
            model,
            ConcreteConfig,
            {**MOVING, "pool": POOLS[model], "target_modules": targets},
        )
        for model, targets in COMPOSED.items()
    ),
    ("PELA MLP 1", "MLP", PelaConfig, {**PELA, "target_modules": "lin0"}),
    ("PELA MLP 2", "MLP", PelaConfig, {**PELA, "target_modules": ["lin0"]}),
    ("PELA MLP 3", "MLP", PelaConfig, {"r": 1, "target_modules": ["lin1"]}),
    ("PELA MLP 4", "MLP", PelaConfig, {"compression": 2.0, "min_features": 2, "target_modules": ["lin0", "lin1"]}),
    ("PELA MLP 5", "MLP", PelaConfig, {**PELA, "target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("PELA MLP 6", "MLP", PelaConfig, {**PELA, "target_modules": ["lin0"], "dropout": 0.1}),
    ("PELA MLP 7", "MLP", PelaConfig, {"energy": 0.6, "target_modules": ["lin0"]}),
    ("PELA MLP 8", "MLP", PelaConfig, {"compression": 2.0, "allocation": "global", "target_modules": ["lin0"]}),
    ("PELA MLP 9", "MLP", PelaConfig, {**PELA, "svd": "lowrank", "target_modules": ["lin0"], "train_bias": False}),
    ("PELA Embedding", "EmbConv1D", PelaConfig, {**PELA, "target_modules": ["emb"]}),
    ("PELA Conv1d bigger", "Conv1dBigger", PelaConfig, {**PELA, "target_modules": ["conv1d"]}),
    ("PELA Conv2d 1", "Conv2d", PelaConfig, {**PELA, "target_modules": ["conv2d"]}),
    ("PELA Conv2d 2", "Conv2d", PelaConfig, {**PELA, "target_modules": ["conv2d", "lin0"]}),
    ("PELA Conv3d 1", "Conv3d", PelaConfig, {**PELA, "target_modules": ["conv3d"]}),
    ("PELA MHA 1", "MHA", PelaConfig, {**PELA, "target_modules": ["mha"]}),
    ("PELA parameters 1", "MlpUsingParameters", PelaConfig, {**PELA, "target_parameters": ["lin0.weight"]}),
    *(
        ("PELA", group, PelaConfig, {"r": 4, "target_modules": None, "dropout": 0.05})
        for group in ("decoder", "seq2seq", "seq_cls", "token_cls", "qa")
    ),
    # the loss of these tests does not see a pooler, which a compressed model would train
    ("PELA", "feature", PelaConfig, {"r": 4, "target_modules": None, "dropout": 0.05, "exclude_modules": ["pooler.dense"]}),
    ("SVFit MLP 1", "MLP", SvfitConfig, {**SVFIT, "target_modules": "lin0"}),
    ("SVFit MLP 2", "MLP", SvfitConfig, {**SVFIT, "target_modules": ["lin0"]}),
    ("SVFit MLP 3", "MLP", SvfitConfig, {**SVFIT, "target_modules": ["lin1"]}),
    ("SVFit MLP 4", "MLP", SvfitConfig, {**SVFIT, "target_modules": ["lin0", "lin1"]}),
    ("SVFit MLP 5", "MLP", SvfitConfig, {**SVFIT, "target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("SVFit MLP 6", "MLP", SvfitConfig, {**SVFIT, "target_modules": ["lin0"], "dropout": 0.1}),
    ("SVFit MLP 7", "MLP", SvfitConfig, {"r": "full", "target_modules": ["lin0"]}),
    ("SVFit MLP 8", "MLP", SvfitConfig, {"energy": 0.9, "target_modules": ["lin0"], "scale": "relative"}),
    ("SVFit MLP 9", "MLP", SvfitConfig, {**SVFIT, "save_basis": False, "target_modules": ["lin0"]}),
    ("SVFit MLP 10", "MLP", SvfitConfig, {**SVFIT, "svd": "lowrank", "target_modules": ["lin0"]}),
    ("SVFit MLP 11", "MLP", SvfitConfig, {**SVFIT, "svd": "full", "target_modules": ["lin0"]}),
    ("SVFit Embedding + Conv1D 1", "EmbConv1D", SvfitConfig, {**SVFIT, "target_modules": ["conv1d"]}),
    ("SVFit Embedding + Conv1D 2", "EmbConv1D", SvfitConfig, {**SVFIT, "target_modules": ["emb"]}),
    ("SVFit Embedding + Conv1D 3", "EmbConv1D", SvfitConfig, {**SVFIT, "target_modules": ["emb", "conv1d"]}),
    ("SVFit Conv1d", "Conv1d", SvfitConfig, {**SVFIT, "target_modules": ["conv1d"]}),
    ("SVFit Conv1d bigger", "Conv1dBigger", SvfitConfig, {**SVFIT, "target_modules": ["conv1d"]}),
    ("SVFit Conv1d groups", "Conv1dGroups", SvfitConfig, {**SVFIT, "target_modules": ["conv1d"]}),
    ("SVFit Conv2d 1", "Conv2d", SvfitConfig, {**SVFIT, "target_modules": ["conv2d"]}),
    ("SVFit Conv2d 2", "Conv2d", SvfitConfig, {**SVFIT, "target_modules": ["conv2d", "lin0"]}),
    ("SVFit Conv2d 1x1", "Conv2d1x1", SvfitConfig, {**SVFIT, "target_modules": ["conv2d"]}),
    ("SVFit Conv2d wide", "Conv2d2", SvfitConfig, {**SVFIT, "target_modules": ["conv2d", "lin0"]}),
    ("SVFit Conv2d groups 1", "Conv2dGroups", SvfitConfig, {**SVFIT, "target_modules": ["conv2d"]}),
    ("SVFit Conv2d groups 2", "Conv2dGroups2", SvfitConfig, {**SVFIT, "target_modules": ["conv2d"]}),
    ("SVFit Conv3d 1", "Conv3d", SvfitConfig, {**SVFIT, "target_modules": ["conv3d"]}),
    ("SVFit Conv3d 2", "Conv3d", SvfitConfig, {**SVFIT, "target_modules": ["conv3d", "lin0"]}),
    ("SVFit MHA 1", "MHA", SvfitConfig, {**SVFIT, "target_modules": ["mha"]}),
    ("SVFit MHA 2", "MHA", SvfitConfig, {**SVFIT, "target_modules": ["mha", "lin0"]}),
    ("SVFit parameters 1", "MlpUsingParameters", SvfitConfig, {**SVFIT, "target_parameters": ["lin0.weight"]}),
    *(
        ("SVFit", group, SvfitConfig, {**SVFIT, "target_modules": None, "dropout": 0.05})
        for group in ("decoder", "seq2seq", "feature", "seq_cls", "token_cls", "qa")
    ),
    (
        "SVFit experts",
        "target_parameters:trl-internal-testing/tiny-Llama4ForCausalLM",
        SvfitConfig,
        {**SVFIT, "target_modules": [], "target_parameters": ["feed_forward.experts.down_proj"]},
    ),
    (
        "SVFit two stacks",
        "target_parameters:trl-internal-testing/tiny-Llama4ForCausalLM",
        SvfitConfig,
        {
            **SVFIT,
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["feed_forward.experts.down_proj", "feed_forward.experts.gate_up_proj"],
        },
    ),
]
MIXED_BATCH_CASES = [
    (
        "SVFit mixed",
        SvfitConfig(r=2, target_modules=["lin0"], init_weights=False),
        SvfitConfig(r=4, target_modules=["lin0"], init_weights=False),
    ),
    (
        "FLoRA mixed",
        FloraConfig(r=2, target_modules=["lin0"], init_weights=False),
        FloraConfig(r=4, target_modules=["lin0"], init_weights=False),
    ),
]
CAPABILITIES = {
    ConcreteConfig: {"conv1d": True, "merge": True},
    AtlasConfig: {"conv1d": True, "merge": True},
    PelaConfig: {"conv1d": True, "merge": True},
    FloraConfig: {"conv1d": True, "merge": True},
    SvfitConfig: {"conv1d": True, "merge": True},
}
SKIP = [
    (
        r"test_disable_adapters(_with_merging)?\[(PELA|Concrete)",
        "the test asserts that a new adapter computes what the base does. A compressed layer is an approximation, and Concrete "
        "starts as task arithmetic. "
        "tests/contract covers disabling a merged adapter.",
    ),
    (
        r"TestMultipleActiveAdapters.*PELA",
        "two adapters that each stand in for the base cannot be active at once; tests/contract asserts that they are refused.",
    ),
    (
        r"test_merge_layers_multi\[PelaConfig",
        "merges two adapters that each stand in for the base's weights, which is refused (tests/contract).",
    ),
    (
        r"test_safe_merge\[(FLoRA|SVFit) Conv2d groups 2",
        "this model feeds itself inputs up to 57,600, and its outputs of several hundred are compared at a relative 1e-6, "
        "what float32 leaves of a sum (measured 1e-7 to 1e-5, LoHa 1.2e-6); PEFT relaxes it to 1e-3 for its own methods, by "
        "class name. tests/contract compares merged grouped convolutions in float64.",
    ),
    (
        r"TestRequiresGrad::test_loading_model.*SvfitConfig",
        "the test loads the adapter onto another model with other random weights. A default SVFit adapter has no basis in its "
        "file and refuses a base that is not its own. tests/adapters/test_svfit.py loads trainable and frozen ones onto it.",
    ),
    (
        r"test_custom_models.py.*(non_overlapping_modules\w*|active_adapters_with_\w+|set_requires_grad|requires_grad_set_correctly)"
        r"\[(\w+-)?(AtlasConfig|ConcreteConfig)\]",
        "the test makes a config from the class and target_modules alone, and these adapters need a pool of task vectors "
        "that fit the model. tests/contract has adapters on different layers, modules_to_save and frozen loading with a pool.",
    ),
]
