"""How transformers' generate would choose tokens, by its own settings and its own objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# those that look at scores and tokens alone
_PROCESSORS = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
)
# settings that ask for something else than tokens, or for another way to find them
_BEYOND = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "stop_strings",
    "token_healing",
    "cache_implementation",
    "compile_config",
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where answers end.

    Attributes:
        processors: (tokens so far, scores) -> scores, of transformers; empty for plain greedy.
        draws: tokens are drawn, not the most likely ones taken.
        max_new_tokens: longest answer, in tokens.
        end_tokens: an answer's last token is the first of these.
        pad_token: follows it in a row that ends before others.
    """

    processors: Any
    draws: bool
    max_new_tokens: int
    end_tokens: frozenset[int]
    pad_token: int

    @property
    def is_plain(self) -> bool:
        """The tokens are those of the highest logits."""
        return not self.draws and not self.processors

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The next tokens, (rows, 1), as generate chooses them.

        Args:
            ids: int64, (rows, tokens so far), prompts and padding included.
            logits: float32, (rows, vocabulary); it stays as it is.
        """
        scores = self.processors(ids, logits)
        if not self.draws:
            return scores.argmax(-1, keepdim=True)
        return torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1)


def sampling_of(
    causal: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> Sampling | None:
    """What generate would do with these options; None if it is more than this package does.

    Args:
        causal: the transformers model, whose generation config counts where no option is given.
        inputs: "input_ids" and "attention_mask" of the prompts.
        options: arguments of generate.
    """
    if set(inputs) != {"input_ids", "attention_mask"} or "max_length" in options:
        return None
    try:
        # generate's own steps, of no public name; it is asked itself wherever they have changed,
        # and it tells the user what is wrong with an option
        config, rest = causal._prepare_generation_config(None, **options)
        if rest or config.get_generation_mode().value not in ("greedy_search", "sample"):
            return None
        causal._prepare_special_tokens(config, True, device=inputs["input_ids"].device)
        processors = causal._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=inputs["input_ids"].shape[1],
            encoder_input_ids=inputs["input_ids"],
            device=inputs["input_ids"].device,
            model_kwargs={"attention_mask": inputs["attention_mask"]},
        )
    except (AttributeError, TypeError, ValueError):
        return None
    if config.max_time is not None or any(getattr(config, name, None) for name in _BEYOND):
        return None
    if (config.num_return_sequences or 1) != 1 or not isinstance(config.max_new_tokens, int):
        return None
    if not config.max_new_tokens:
        return None
    if any(type(processor).__name__ not in _PROCESSORS for processor in processors):
        return None
    ends = _tokens(config.eos_token_id)
    pad = _tokens(config.pad_token_id) or ends or [0]
    return Sampling(
        processors, bool(config.do_sample), config.max_new_tokens, frozenset(ends), pad[0]
    )


def _tokens(found: Any) -> list[int]:
    if found is None:
        return []
    return [int(token) for token in found] if isinstance(found, (list, tuple)) else [int(found)]
