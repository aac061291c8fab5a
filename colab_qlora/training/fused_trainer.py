"""Where TRL's trainer leaves its own way for a fused model: the loss and the optimiser.

TRL computes entropy and token accuracy of every batch from the logits, or from a head of its own.
A fused model's loss needs neither: it comes out of the model as one number, and TRL's count of
tokens is kept. AdamW over LoRA weights alone runs on one flat buffer (`optimizer.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
import trl

from colab_qlora.models.fuse import causal_model, state_of
from colab_qlora.models.fused_head import is_fused_head
from colab_qlora.models.smart import free_recordings
from colab_qlora.training.embedding_rate import parameter_groups
from colab_qlora.training.metrics_by_row import (
    check_room_for_logits,
    hidden_states_kept,
    predictions_by_row,
)
from colab_qlora.training.micro_batch import with_less_memory
from colab_qlora.training.optimizer import FlatAdamW
from colab_qlora.training.optimizer_choice import flat_adamw_for


class FusedTrainer(trl.SFTTrainer):
    """A `trl.SFTTrainer` that lets a fused model compute its own loss, in a flat optimiser."""

    notes: list[str]
    _preprocess_of_a_row: Any = None

    def _say(self, line: str) -> None:
        self.notes.append(line)
        print(f"colab_qlora: {line}", flush=True)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss, and the model's outputs if they are asked for; arguments as in transformers."""
        if not self._model_computes_loss():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        training = self.model.training  # type: ignore[union-attr]
        loss_alone = inputs.pop("_prediction_loss_only", None) is True
        wants_logits = return_outputs and not training and not loss_alone
        inputs = {**inputs, "use_cache": False, "skip_logits": not wants_logits}
        found = transformers.Trainer.compute_loss(
            self,
            model,
            inputs,
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        if training:
            self._say_what_is_not_fused()
            self._total_train_tokens += _tokens(inputs)
        self._metrics["train" if training else "eval"]["num_tokens"] = [self._total_train_tokens]
        return found

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As transformers; out of memory, the micro-batch is planned for less and repeated."""
        tokens = self._total_train_tokens

        def step() -> Any:
            self._total_train_tokens = tokens
            return super(FusedTrainer, self).training_step(model, dict(inputs), *args, **kwargs)

        return with_less_memory(self.model, step, self._say)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> Any:
        """As transformers; the logits that a metric needs are made row by row."""
        labels = inputs.get("labels")
        if prediction_loss_only or labels is None or not self._model_computes_loss():
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with hidden_states_kept(self.model) as kept:
            loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        labels = labels.to(kept[-1].device)
        with self.compute_loss_context_manager():
            found = predictions_by_row(self.model, kept[-1], labels, self._preprocess_of_a_row)
        return loss, found, labels.cpu()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers; `preprocess_logits_for_metrics` gets a row at a time."""
        free_recordings(self.model, only_if_short=True)
        given = self.preprocess_logits_for_metrics
        if not self._model_computes_loss():
            return self._evaluate_by_batch(*args, **kwargs)
        if self.compute_metrics is not None and given is None and not self.args.batch_eval_metrics:
            loader = kwargs.get("dataloader", args[0] if args else None)
            joined = self.args.eval_batch_size if getattr(self, "padding_free", False) else 1
            check_room_for_logits(self.model, getattr(loader, "dataset", None), joined)
        self._preprocess_of_a_row, self.preprocess_logits_for_metrics = given, None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._preprocess_of_a_row, self.preprocess_logits_for_metrics = None, given

    def _evaluate_by_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The stock loop, where what a metric needs of a batch goes to host memory after it."""
        steps = self.args.eval_accumulation_steps
        self.args.eval_accumulation_steps = steps or (1 if self.compute_metrics else None)
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.eval_accumulation_steps = steps

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """As transformers, but `FlatAdamW` where `flat_adamw_for` says so."""
        ours = None if model is None else flat_adamw_for(args, model)
        return ours or trl.SFTTrainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As transformers, with a note if it is `FlatAdamW`; see also `embedding_rate.py`."""
        trained: Any = self.model if model is None else model
        rate = getattr(self.args, "embedding_learning_rate", None)
        if self.optimizer is None and rate is not None:
            decays = self.get_decay_parameter_names(trained)
            groups = parameter_groups(trained, rate, self.args.weight_decay, decays)
            chosen = self.optimizer_cls_and_kwargs
            kind, options = chosen or self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer_cls_and_kwargs = kind, {**options, "params": groups}
        optimizer = super().create_optimizer(model)
        note = "all LoRA matrices are updated together (FlatAdamW)"
        if isinstance(optimizer, FlatAdamW) and note not in self.notes:
            self._say(note)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if not isinstance(optimizer, FlatAdamW):
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return optimizer.clip_grad_norm_(self.args.max_grad_norm)

    def _say_what_is_not_fused(self) -> None:
        """Once: layers that were swapped, and took the model's own code all the same."""
        state = state_of(self.model)
        for reason in state.stock_passes if state else ():
            line = f"decoder layers run the model's own code: {reason}; see describe(model)"
            if line not in self.notes:
                self._say(line)

    def _model_computes_loss(self) -> bool:
        return (
            is_fused_head(causal_model(self.accelerator.unwrap_model(self.model)))
            and self.compute_loss_func is None
            and self.label_smoother is None
            and getattr(self.args, "loss_type", "nll") == "nll"
            and not getattr(self, "aux_loss_enabled", False)
        )


def _tokens(inputs: dict[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    return int(inputs["input_ids"].numel())
