"""The notebooks that the browser tests open, built in code: a title and some code cells each."""

from __future__ import annotations

import json
from pathlib import Path

# a recorded run, fed as a trainer would; the plot goes by the clock of that run, which took minutes
LIVE = """\
import time
from colab_qlora.curves.live import LivePlot
from colab_qlora.curves.log import LossLog, read_log
from colab_qlora.samples import sample_path

records = read_log(sample_path("curves/overfitting.jsonl")).records
now = 0.0
plot = LivePlot(total_steps=records[-1]["step"], clock=lambda: now)
with LossLog.open("live.jsonl") as log:
    log.truncate_after(-1)
    plot.begin(log)
    for record in records:
        time.sleep(0.05)
        now = record["seconds"]
        log.append(record)
        plot.update(log)
    plot.finish(log)
"""

EXPLORER = """\
from colab_qlora.curves.widgets import explore_curves

explorer = explore_curves(chosen="overfitting")
explorer
"""
STATE = "print('view', explorer.view)\n"

PANEL = """\
from colab_qlora.curves.hyperparameter_panel import hyperparameter_panel

class Plan:
    def __init__(self, settings):
        self.settings = settings

    def sentence(self):
        rows = self.settings["batch_size"] * self.settings["gradient_accumulation_steps"]
        return f"{rows} rows a step of {self.settings['max_seq_length']} tokens"

settings = {
    "learning_rate": 2e-4, "warmup_share": 0.05, "num_train_epochs": 2, "max_steps": -1,
    "batch_size": 4, "gradient_accumulation_steps": 2, "max_seq_length": 1024,
    "r": 16, "lora_alpha": 32,
}
hints = {"r": "start with 16; raise it when the result is too weak"}
hyperparameter_panel(settings, plan=Plan, hints=hints)
"""
# a model that answers at once, or on and on until it is stopped
CHAT = """\
import time
from colab_qlora import chat_box as module

def stream(model, tokenizer, messages, *, stop, **options):
    words = messages[-1]["content"]
    pieces = ["You said ", words, "."] if words != "long" else ["on "] * 600
    for piece in pieces:
        if stop.is_set():
            return
        time.sleep(0.05)
        yield piece

class Tokenizer:
    chat_template = "yes"

module.stream = stream
chat = module.chat_box(None, Tokenizer(), system="Be brief.")
chat
"""
MESSAGES = "print('said', [m['content'] for m in chat.messages])\n"
SETTINGS = "print('settings', settings)\n"


def write_notebook(path: Path, title: str, cells: list[str]) -> None:
    """Write a notebook with a heading and these code cells."""
    code = [
        {
            "cell_type": "code",
            "id": f"cell-{number}",
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": source,
        }
        for number, source in enumerate(cells)
    ]
    heading = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {title}"}
    content = {
        "cells": [heading, *code],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
