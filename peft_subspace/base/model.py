"""The tuner: puts adapters on a model, and answers for them to PEFT."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils import get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..task_vectors.blueprint import reads_tie
from .active import chosen_adapter
from .batch_norm import BatchNormLayer, wrap_batch_norms
from .config import lowered_text
from .ddp import note_graph, running_ddp, send_frozen
from .ddp_names import keep_from_ddp
from .delta import Delta
from .geometry import Geometry, quantization_backend, read_weight
from .holders import Holder, find_holder, has_children
from .kinds import ParamWrapper, make_layer
from .layer import SubspaceLayer
from .loading import check_saved_modules, check_state_dict, complete_adapter, remove_adapter
from .mixed_batch import adapter_names_passed_on
from .sharding import is_empty_share, refuse_sharded_targets
from .targets import check_patterns, find_targets, resolve_targets
from .weighted import add_weighted_adapter

logger = logging.getLogger(__name__)


class SubspaceModel(BaseTuner):
    """Base of all tuners. A method states its `prefix` and its `delta_cls`; nothing else is required.

    `get_peft_model` makes it; its public methods can be called on the PeftModel.
    """

    delta_cls: ClassVar[type[Delta]]
    peft_config: dict[str, Any]
    tuner_layer_cls = SubspaceLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # empty: `resolve_targets` knows the defaults

    # Injection -------------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model; on any error the model stays as it was."""
        config = self.peft_config[adapter_name]
        try:
            self._check_adapter_name(adapter_name)
            if any(other is config for name, other in self.peft_config.items() if name != adapter_name):
                config.awaits_weights = None  # of an adapter that is there (a copy is to be made of it): no file is to come
            if "trainable_before" not in self.__dict__:
                self.__dict__["trainable_before"] = [p for p in model.parameters() if p.requires_grad]
            with warnings.catch_warnings():
                # PEFT looks for patterns among module names only, and would call those of parameters unmatched
                warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning, module=r"peft\.")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            if config.awaits_weights:
                check_saved_modules(model, config.awaits_weights, adapter_name, self.prefix.rstrip("_"))
            if config.adapt_batch_norm:
                for layer in wrap_batch_norms(model, self.prefix, adapter_name):
                    layer.set_adapter(self.active_adapters)
            self._record_decisions(adapter_name)
            self._note_lowered_ranks(adapter_name)
            if config.lowered_ranks and not config.is_from_file:
                logger.warning(
                    f"{config.title}: a number as rank is an upper bound, lowered to fit {lowered_text(config.lowered_ranks)}. "
                    f"All of them are in the config's `lowered_ranks`; `rank_pattern` sets the rank of one layer."
                )
            keep_from_ddp(model)
        except Exception:
            remove_adapter(self, adapter_name)
            raise

    def _record_decisions(self, adapter_name: str) -> None:
        """Write what the weights decided (ranks by energy) into the config. Last: the names must not match other layers."""
        config = self.peft_config[adapter_name]
        for key, layer in self.named_subspace_layers():
            for container, delta in layer.deltas(adapter_name).items():
                exact = key if len(layer.geometries) == 1 else f"{key}.{layer.geometries[container][0]}"
                for pattern, name in config.patterns.items():
                    if name in delta.decided():
                        getattr(config, pattern)[exact] = delta.decided()[name]

    def _note_lowered_ranks(self, adapter_name: str) -> None:
        """Write into the config, for its reader and the model card, which weights are smaller than the rank of the config."""
        self.peft_config[adapter_name].lowered_ranks = {
            key if len(layer.geometries) == 1 else f"{key}.{layer.geometries[container][0]}": rank
            for key, layer in self.named_subspace_layers()
            for container, delta in layer.deltas(adapter_name).items()
            if (rank := delta.lowered()) is not None
        }

    def _check_adapter_name(self, adapter_name: str) -> None:
        if adapter_name in self.prefix:
            raise ValueError(
                f"The adapter name {adapter_name!r} is contained in the prefix {self.prefix!r} of the method, so its tensors "
                f"could not be told from others. Choose another name."
            )

        if hasattr(nn.ModuleDict, adapter_name):
            raise ValueError(
                f"The adapter name {adapter_name!r} is an attribute of every module (`nn.Module`). Choose another name."
            )

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config  # targets need the model: see `_prepare_model`

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        resolve_targets(peft_config, model)
        every = self.delta_cls.composes_weight
        targets = find_targets(model, peft_config, self._check_target_module_exists, every_parameter=every)
        refuse_sharded_targets(model, targets, peft_config.title)
        self._prepare_targets(peft_config, model, targets)
        check_patterns(peft_config, targets)
        for name, geometries in targets.items():
            for weight, geometry in geometries.items():
                try:
                    self.delta_cls.check(geometry, peft_config.for_layer(name, weight))
                except ValueError as error:
                    where = name if weight == "weight" or name.endswith(weight) else f"{name}.{weight}"
                    raise ValueError(f"{where}: {error}") from error

    def _prepare_targets(self, config: Any, model: nn.Module, targets: dict[str, dict[str, Geometry]]) -> None:
        """A method may decide per-layer settings here (ranks by energy). Nothing of the model is changed yet."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            self._refuse_other_kind(find_holder(target, parameter_name) or target, current_key)
        beside = self.delta_cls.composes_weight and parameter_name is not None and has_children(target)
        if beside and not isinstance(target, BaseTunerLayer):
            self._hold(peft_config, adapter_name, target, current_key, parameter_name)
            return
        known = (
            isinstance(target, SubspaceLayer)
            and target.method == self.prefix.rstrip("_")  # transformers takes several kinds on one model, one around the other
            and getattr(target, "parameter_name", None) == parameter_name
        )
        layer: Any = target if known else self._wrap(target, parameter_name)
        layer.update_layer(adapter_name, peft_config, current_key, inference_mode=peft_config.inference_mode)
        if not known:
            layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
            setattr(parent, target_name, layer)

    def _refuse_other_kind(self, module: nn.Module, key: str) -> None:
        """A wrapper of a parameter is found again by the parameter's name alone, whatever its kind."""
        while isinstance(module, BaseTunerLayer):
            if getattr(module, "method", None) != self.prefix.rstrip("_"):
                raise ValueError(
                    f"{key}: the adapters {sorted(module._get_available_adapters())} on this module are of another kind "
                    f"({module._get_name()}). Delete them first, or leave the parameter out of target_parameters."
                )
            module = module.base_layer  # type: ignore[assignment]

    def _hold(self, config: Any, adapter_name: str, owner: nn.Module, key: str, parameter_name: Any) -> None:
        holder = known = find_holder(owner, parameter_name)
        if holder is None:
            holder = Holder(owner, self.prefix, self.delta_cls, parameter_name)
            holder.train(owner.training)
            owner.add_module(f"{parameter_name}_holder", holder)
        holder.update_layer(adapter_name, config, key, inference_mode=config.inference_mode)
        if known is None:
            holder.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _wrap(self, target: nn.Module, parameter_name: str | None) -> SubspaceLayer:
        layer = make_layer(target, self.prefix, self.delta_cls, parameter_name, **get_quantization_kwargs(self.model))
        layer.train(target.training)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, Holder):
            child.take_off()
            return
        inner: Any = getattr(child, "base_layer", None)
        merged: Any = getattr(child, "merged_adapters", None)
        if isinstance(inner, BatchNormLayer) and merged and not inner.merged_adapters:  # PEFT merges the outer layer
            inner.merge(adapter_names=merged)
        setattr(parent, child_name, new_module)  # deltas move to their layer's device by themselves

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Mamba's fused kernels read the weights of `out_proj` and `conv1d` and pass by an adapter."""
        mamba = {"falcon_h1", "mamba", "mamba2", "falcon_mamba"}
        if target_name in ("out_proj", "conv1d") and getattr(getattr(model, "config", None), "model_type", None) in mamba:
            raise ValueError(f"{target_name!r} of a Mamba block is read by a fused kernel and cannot be adapted; exclude it.")

    # State -----------------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter(s)."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for layer in self._batch_norms():
            if layer.merged_adapters:
                layer.unmerge()
            layer.set_adapter(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base's weights, in all layers or, if one refuses, in none."""
        layers: list[Any] = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except Exception:
            for layer, merged in zip(layers, before, strict=True):
                if layer.merged_adapters != merged:
                    layer.unmerge()
                    if merged:
                        layer.merge(adapter_names=merged)
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its BatchNorm statistics."""
        super().delete_adapter(adapter_name)
        for layer in self._batch_norms():
            layer.delete_adapter(adapter_name)
        keep_from_ddp(self.model)

    def _batch_norms(self) -> list[BatchNormLayer]:
        return [module for module in self.model.modules() if isinstance(module, BatchNormLayer)]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are float32. With `autocast_adapter_dtype=False` they take the dtype of their base weight."""
        if autocast_adapter_dtype:
            return
        for _, layer in self.named_subspace_layers():
            for container, delta in layer.deltas(adapter_name).items():
                owner, name = layer._locate(container)
                dtype = getattr(owner, name).dtype
                for parameter in delta.parameters():  # what is frozen keeps the dtype that its method chose
                    parameter.data = parameter.data.to(dtype if dtype.is_floating_point else torch.float32)

    def named_subspace_layers(self) -> Iterator[tuple[str, SubspaceLayer]]:
        """All wrapped layers by the name under which a config's patterns know them."""
        for name, module in self.model.named_modules():
            if isinstance(module, SubspaceLayer):
                name = name.replace(".base_layer", "")  # a wrapper inside another one
                if isinstance(module, Holder):
                    name = name.rpartition(".")[0]
                yield (f"{name}.{module.parameter_name}" if isinstance(module, (ParamWrapper, Holder)) else name), module

    def config_of(self, adapter_name: str) -> Any:
        """The config of an adapter.

        Raises:
            ValueError: there is none of that name; says which there are.
        """
        return self.peft_config[chosen_adapter(self, adapter_name)]

    def chosen_adapter(self, adapter_name: str | None = None) -> str:
        """The name of the adapter that is meant, the active one where it is None; see `base.active`."""
        return chosen_adapter(self, adapter_name)

    @staticmethod
    def base_weight(model: nn.Module, name: str, weight: str) -> Tensor:
        """The float weight of a layer that is to be adapted, in the module's layout, dequantised if need be."""
        module: Any = model.get_submodule(name.removesuffix(f".{weight}"))
        while hasattr(module, "base_layer"):
            module = module.base_layer
        backend = quantization_backend(module, **get_quantization_kwargs(model))
        return module.get_parameter(weight).data if backend is None else read_weight(module, backend, name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self.training and (ddp := running_ddp()) is not None:
            note_graph()
            now = (id(ddp), *self.peft_config)
            if self.__dict__.get("sent_to") != now:
                send_frozen(self.model, ddp)
                self.__dict__["sent_to"] = now
        with adapter_names_passed_on(self, kwargs.pop("adapter_names", None), kwargs.get("num_beams")):
            yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT notes in the config that tied embeddings have parted. Where `forward` computes by that note, it stays as it was:
        UMT5 would no longer scale its outputs.
        """
        config: Any = getattr(self.model, "config", None)
        tied = getattr(config, "tie_word_embeddings", None)
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        keep_from_ddp(model)
        if tied and not config.tie_word_embeddings and reads_tie(model):
            config.tie_word_embeddings = tied
        return model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` applies: every layer is additive and no statistics are left behind."""
        return all(m.supports_lora_conversion(adapter_name) for m in self.modules() if isinstance(m, BaseTunerLayer))

    # Files -----------------------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        own = _filter_state_dict_by_key_prefixes(
            model.state_dict(), _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        )
        expected = {cls._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in own.items()}
        try:
            check_state_dict(expected, state_dict, set(model.state_dict()), adapter_name, cls.prefix.rstrip("_"))
            complete_adapter(model, state_dict, adapter_name)
        except ValueError:
            if config.awaits_weights is not None:
                remove_adapter(model, adapter_name)
            raise
        config.awaits_weights = None
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def check_saved_whole(self) -> None:
        """See that a `save_pretrained` without a `state_dict` has whole tensors to save.

        Raises:
            ValueError: FSDP2 has sharded the adapter; says what to call.
        """
        shares = [name for name, tensor in self.model.named_parameters() if self.prefix in name and isinstance(tensor, DTensor)]
        if shares:
            raise ValueError(
                f"{shares[0]} and {len(shares) - 1} more tensors of the adapter cannot be saved: this process has a share of "
                f"each only (FSDP2). Gather them in all processes and save in one: `state = accelerator.get_state_dict(model)` "
                f"or torch's `get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`; then "
                f"`model.save_pretrained(folder, state_dict=state)`."
            )

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The adapter's tensors for its file.

        Raises:
            ValueError: this process has a share only, which ZeRO-3 leaves empty: the file would have no values.
        """
        found: dict[str, Tensor] = super()._get_adapter_state_dict(model, *args, **kwargs)
        own: dict[str, Any] = dict(model.named_parameters())
        shares = [key for key, tensor in found.items() if is_empty_share(tensor, own.get(key))]
        if shares:
            raise ValueError(
                f"{shares[0]} and {len(shares) - 1} more tensors of the adapter cannot be saved: this process has a "
                f"share of it only (ZeRO-3). Gather them in all processes and pass them on: `model.save_pretrained(folder, "
                f"is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(engine))`. The Trainer "
                f"does so with `stage3_gather_16bit_weights_on_model_save`."
            )
        return found

    @classmethod
    def _get_learnable_bias_state_dict(cls, model: nn.Module, state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Biases that `bias` trains. Those of whole trained modules are saved with their modules."""
        names = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        whole = tuple(f"{name.replace('_fsdp_wrapped_module.', '')}." for name in names)  # keys of FSDP's states are without
        found = super()._get_learnable_bias_state_dict(model, state_dict, config)
        return {key: value for key, value in found.items() if not key.startswith(whole)}

    # Combination -----------------------------------------------------------------------------------------------------

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the adapter whose update is exactly sum_i weights[i] dW_i. It is not activated.

        Args:
            adapters: names of loaded adapters.
            weights: any real numbers, one per adapter; an adapter of weight 0 adds nothing.
            adapter_name: name of the new adapter. Its ranks are those of the parts added up.
            combination_type: only "linear", the exact sum.

        Raises:
            ValueError: names that are not loaded or already taken, lengths that differ, another combination type.
        """
        self._check_adapter_name(adapter_name)
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)
