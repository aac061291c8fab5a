"""`FastLanguageModel`: the face that tutorials know, over plain transformers and PEFT models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colab_qlora.decoding import free_decoding
from colab_qlora.errors import UserError
from colab_qlora.export.methods import bind_methods
from colab_qlora.models.adapters import (
    DEFAULT_TARGETS,
    attach_lora,
    disable_checkpointing,
    set_gradient_checkpointing,
)
from colab_qlora.models.dynamic_loading import DEFAULT_BUDGET
from colab_qlora.models.loading import load_model_and_tokenizer
from colab_qlora.models.peer_arguments import unknown_arguments_named
from colab_qlora.models.peer_options import adapter_options, loading_options
from colab_qlora.models.saved_adapter import is_adapter_folder, load_adapter_folder
from colab_qlora.models.settings import settings_of
from colab_qlora.models.smart import bring_embedding_back, free_recordings
from colab_qlora.models.whole_training import (
    is_trained_whole,
    refuse_quantised_checkpoint,
    train_every_weight,
)


class FastLanguageModel:
    """Load, adapt and switch between training and inference. All methods are static."""

    @staticmethod
    def from_pretrained(
        model_name: str | None = None,
        max_seq_length: int = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        *,
        token: str | None = None,
        device_map: Any = None,
        rope_scaling: dict | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        quantization: str | None = None,
        quantization_budget: str | float = DEFAULT_BUDGET,
        calibration_data: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load a causal language model and its tokenizer.

        Args:
            model_name: a hub id, a model folder, an adapter folder (its base model is loaded too),
                or "embedded" (SmolLM2-135M-Instruct, no network needed once converted). None
                chooses a 4-bit 8B instruct model on a GPU and "embedded" on a CPU.
            max_seq_length: longest sequence in tokens; the trainer truncates to it.
            dtype: compute dtype; None picks bfloat16 only where the hardware has it (a T4 gets
                float16, a CPU without bfloat16 instructions float32).
            load_in_4bit: NF4 with double quantisation (4.13 bits a weight) of every linear layer
                but the output head. A checkpoint that is quantised already stays as it is.
            load_in_8bit: LLM.int8 of bitsandbytes instead; needs load_in_4bit=False.
            token: access token for a gated model; used for this call and stored nowhere.
            device_map: as in transformers; None puts everything on the one GPU, or on the CPU.
            rope_scaling: stretch the positions, e.g. {"rope_type": "linear", "factor": 2.0}.
            revision: branch, tag or commit of the hub model (of an adapter folder's base model).
            trust_remote_code: run Python code that comes with the model; off unless asked for.
            quantization: "nf4" (the default with load_in_4bit), or "dynamic": precision where the
                loss on your rows needs it, block scales that are searched for, and changes of both
                during training; from a 16-bit checkpoint. `quantization_report(model)` shows it.
            quantization_budget: with "dynamic": "+0%" to "+300%" of the bytes of plain NF4's
                linears, GiB for all weights, or "auto": what the activation planner leaves of the
                GPU's memory.
            calibration_data: with "dynamic": the training rows (the first 16 are used): texts, rows
                with "text", "messages", "prompt" and "completion" or "instruction" and "output", a
                Dataset, or the path of a JSON file.
            **kwargs: arguments that tutorials pass (full_finetuning, load_in_16bit, ...; see
                `models/peer_arguments.py`), and those of transformers' from_pretrained.

        Returns:
            (model, tokenizer): a transformers model (or a PeftModel for an adapter folder) and its
            tokenizer. The model, and a PeftModel made of it, has `save_pretrained_merged`,
            `save_pretrained_gguf` and `push_to_hub*`, and its `generate` takes what
            `tokenizer.apply_chat_template` returns.

        Raises:
            UserError: the model cannot be found, read, or used as asked; the message says what to
                do.

        Example:
            >>> model, tokenizer = FastLanguageModel.from_pretrained("embedded", max_seq_length=512)
        """
        load_args, trains_all = loading_options(
            dtype, load_in_4bit, load_in_8bit, kwargs, quantization
        )
        options: dict[str, Any] = {
            "token": token,
            "device_map": device_map,
            "rope_scaling": rope_scaling,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "quantization": quantization,
            "quantization_budget": quantization_budget,
            "calibration_data": calibration_data,
            **kwargs,
        }
        if model_name and is_adapter_folder(model_name):
            if trains_all is not None:
                raise UserError("full_finetuning takes a model, not adapters", got=model_name)
            with unknown_arguments_named(kwargs):
                loaded = load_adapter_folder(model_name, max_seq_length, *load_args, **options)
            bind_methods(loaded[0])
            return loaded
        if trains_all is not None:
            refuse_quantised_checkpoint(
                model_name, token=token, revision=revision, trust_remote_code=trust_remote_code
            )
        with unknown_arguments_named(kwargs):
            loaded = load_model_and_tokenizer(model_name, max_seq_length, *load_args, **options)
        bind_methods(loaded[0])
        if trains_all is not None:
            train_every_weight(loaded[0], trains_all)
        return loaded

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str | None = DEFAULT_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "smart",
        random_state: int | None = 3407,
        *,
        use_fused_layers: bool = True,
        memory_budget_gib: float | None = None,
        host_budget_gib: float | None = None,
        **lora_options: Any,
    ) -> Any:
        """Attach LoRA adapters and return a plain `PeftModel`.

        Args:
            model: what `from_pretrained` gave; or what has just these adapters, which then stay as
                they are, trained or not.
            r: rank; parameters and capacity grow in proportion to it.
            target_modules: names of the linear layers to adapt, or PEFT's "all-linear".
            lora_alpha: the adapter's output is scaled by lora_alpha / r.
            lora_dropout: share of the adapter's input that is dropped in training, 0 to below 1.
            bias: "none", "all" or "lora_only", as in PEFT.
            use_gradient_checkpointing: False keeps all activations, True recomputes every layer,
                "smart" ("unsloth" is another name for it) plans every batch: keeps what fits, sends
                to the host what can travel while the GPU computes, and recomputes the rest; see
                `plan_memory`.
            random_state: seed of the adapters' start, None for one that differs every time; the
                global random state is left alone.
            use_fused_layers: compute decoder layers and loss by the kit's kernels where the model
                allows it; `describe(model)` lists what was swapped, `restore(model)` undoes it.
            memory_budget_gib: with "smart", most GPU memory (torch.cuda.max_memory_allocated) in
                GiB; None: what is free.
            host_budget_gib: with "smart", most page-locked host memory in GiB; None: what is free;
                0 offloads nothing.
            **lora_options: further fields of `peft.LoraConfig` (use_rslora, modules_to_save, ...),
                and what tutorials pass besides; see `models/peer_arguments.py`.

        Returns:
            A `peft.PeftModel` in training mode, adapters in float32, everything else frozen.

        Raises:
            UserError: an unknown target module (the message lists those that exist) or option; or
                the model has other adapters, and the message says what differs.
        """
        if is_trained_whole(model):
            print("colab_qlora: no adapters are attached; it was loaded with full_finetuning=True")
            return model
        target_modules, lora_options, said = adapter_options(model, target_modules, lora_options)
        for line in said:
            print(f"colab_qlora: {line}")
        adapted = attach_lora(
            model,
            r,
            target_modules,
            lora_alpha,
            lora_dropout,
            bias,
            use_gradient_checkpointing,
            random_state,
            use_fused_layers=use_fused_layers,
            memory_budget_gib=memory_budget_gib,
            host_budget_gib=host_budget_gib,
            **lora_options,
        )
        return bind_methods(adapted)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Switch to generating: evaluation mode, key-value cache, no checkpointing.

        Memory that only training needs is given back. On a GPU, `ask` and `stream` of
        `generation.py` then decode by a CUDA graph where the model allows it.

        Returns:
            The same model.
        """
        disable_checkpointing(model)
        bring_embedding_back(model)
        free_recordings(model)
        model.config.use_cache = True
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Switch back to training, with the checkpointing that was chosen before, or another.

        Args:
            model: what `get_peft_model` gave.
            use_gradient_checkpointing: as in `get_peft_model`; None: as before.

        Returns:
            The same model.
        """
        free_decoding(model)
        settings = settings_of(model)
        if use_gradient_checkpointing is not None and settings is not None:
            settings.use_gradient_checkpointing = use_gradient_checkpointing
        model.config.use_cache = False
        if settings is not None and settings.use_gradient_checkpointing is not None:
            set_gradient_checkpointing(
                model,
                settings.use_gradient_checkpointing,
                settings.memory_budget_gib,
                settings.host_budget_gib,
            )
        return model.train()


# the name that newer tutorials import; the same class
FastModel = FastLanguageModel
