"""A tiny random Llama, saved in 16 bits and loaded in 4 by bitsandbytes, and text boxes."""

from __future__ import annotations

import torch

from colab_qlora.models.quiet_import import import_bitsandbytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama_config(**changes):
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
    }
    return LlamaConfig(**(sizes | changes))


def save_llama(folder, dtype=torch.bfloat16, **changes):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(**changes)).to(dtype).save_pretrained(folder)
    return folder


def load_4bit(folder, dtype=torch.bfloat16, quantize=True):
    import_bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": DEVICE},
        **({"quantization_config": how} if quantize else {}),
    )


def adapt(model, rank=8, **changes):
    from peft import LoraConfig, get_peft_model

    options = {"r": rank, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | changes
    return get_peft_model(model, LoraConfig(**options))


def text_boxes(fig):
    """(words, box in px) of each text that is drawn, tick labels included."""
    from matplotlib.text import Text

    fig.canvas.draw()
    renderer = fig.canvas.get_renderer()
    texts = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip()]
    # ticks beyond the limits are kept by matplotlib, but not drawn
    hidden = set()
    for ax in fig.axes:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    return [(t, t.get_window_extent(renderer)) for t in texts if t not in hidden]
