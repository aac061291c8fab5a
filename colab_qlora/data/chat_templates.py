"""Give a tokenizer a chat format by name, and say what its vocabulary lacks for it.

Three traps are met here:

- An end token that is not in the vocabulary is cut into pieces, and a model that never saw it as
  one token never stops. Adding it would resize the embedding; the tokenizer's own eos is written
  instead.
- A pad token that is the eos token is hidden from the loss together with the eos, with the same
  result. A spare token of the vocabulary is taken instead.
- bos is written by the template and added again by `tokenizer(text)`. Through
  `tokenizer.apply_chat_template(messages, tokenize=True)` it comes once, as that call adds none. A
  text from `tokenize=False` has to be tokenised with add_special_tokens=False, or come from
  `chat_texts.apply_chat_template`, which leaves out the bos that the tokenizer adds.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from colab_qlora.data.template_parts import (
    ASSISTANT,
    SYSTEM,
    USER,
    ChatFormat,
    format_text,
    message_reader,
)
from colab_qlora.data.template_texts import BY_NAME, FORMATS
from colab_qlora.data.wording import shown
from colab_qlora.errors import UserError

# name or alias -> format; the name that tutorials print the keys of
CHAT_TEMPLATES = BY_NAME
MAPPING_KEYS = ("role", "content", USER, ASSISTANT, SYSTEM)
# in this order; the first three are reserved for it or unused in every model that has them
PAD_CANDIDATES = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|vision_pad|>",
    "<|dummy_0|>",
    "[control_8]",
    "<unused0>",
    "<unk>",
    "<|endoftext|>",
)


def get_chat_template(
    tokenizer: Any,
    chat_template: str | Sequence[str] | ChatFormat = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Set a tokenizer's chat template, end token and pad token.

    The vocabulary is never changed. Whatever it lacks, and a pad token that is changed or unfit, is
    told in one printed line. Tell a model that is loaded already about a changed end token:
    `model.generate(..., eos_token_id=tokenizer.eos_token_id)`.

    Args:
        tokenizer: a Hugging Face tokenizer; it is changed in place.
        chat_template: a format's name or alias (the table is `template_texts.FORMATS`), or your own
            `(jinja_text, eos_token)`, in which "eos_token" stands for the tokenizer's; or a format.
        mapping: what your data calls the keys "role" and "content" and the roles "user",
            "assistant" and "system", as in {"role": "from", "content": "value", "user": "human",
            "assistant": "gpt"}. The usual names are understood as well.
        map_eos_token: make the token that ends a turn the tokenizer's eos, where the vocabulary has
            it; where not, write the tokenizer's eos in its place.
        system_message: system text of a conversation that brings none; None for the format's own.

    Returns:
        The tokenizer.

    Raises:
        UserError: the format or a key of `mapping` is unknown, `tokenizer` is not one or has no eos
            token where one is needed, or `system_message` comes with your own Jinja text.

    Example:
        tokenizer = get_chat_template(tokenizer, "llama-3.1")
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    """
    require_tokenizer(tokenizer)
    mapping = checked_mapping(mapping)
    entry = find_format(chat_template)
    is_own = not isinstance(chat_template, (str, ChatFormat))
    if is_own and system_message is not None:
        raise UserError(
            "system_message is only known to the formats that have a name",
            got=shown(system_message),
            allowed="None with a Jinja text of your own",
            do="Write the system text into your Jinja text",
        )
    notes: list[str] = []
    turn_end = _choose_turn_end(tokenizer, entry, map_eos_token, notes)
    if is_own:
        text = _own_text(entry, mapping, turn_end)
    else:
        bos = bool(tokenizer.bos_token) and (entry.writes_bos or adds_bos(tokenizer))
        text = format_text(entry, mapping, turn_end, bos, system_message)
    _choose_pad(tokenizer, entry, notes)
    tokenizer.chat_template = text
    if notes:
        print(f"chat template {entry.name}: {'; '.join(notes)}.")
    return tokenizer


def _own_text(entry: ChatFormat, mapping: Mapping[str, str], turn_end: str | None) -> str:
    text = entry.turns
    if entry.turn_end and turn_end and turn_end != entry.turn_end:
        text = text.replace(entry.turn_end, turn_end)
    if mapping:
        text = message_reader(mapping) + "{%- set messages = chat.turns -%}\n" + text
    return text


def _choose_turn_end(
    tokenizer: Any, entry: ChatFormat, map_eos_token: bool, notes: list[str]
) -> str | None:
    """The token to write behind a turn; None for the tokenizer's eos, whatever it is by then."""
    wanted = entry.turn_end
    plain = [marker for marker in entry.markers if not _is_one_token(marker, tokenizer)]
    is_known = wanted is not None and _is_one_token(wanted, tokenizer)
    if not is_known and not tokenizer.eos_token and (wanted is None or map_eos_token):
        raise UserError(
            f"the tokenizer has no token that could end a turn of {entry.name}",
            got=f"eos_token {tokenizer.eos_token!r}, and {wanted!r} is not in the vocabulary",
            allowed="a tokenizer with an eos token",
            do="Set tokenizer.eos_token to a token of its vocabulary",
        )
    if is_known and map_eos_token:
        tokenizer.eos_token = wanted
    elif not is_known and wanted is not None and map_eos_token:
        notes.append(
            f"{wanted} is not in the vocabulary, and {tokenizer.eos_token}, the tokenizer's own "
            "eos, is written in its place"
        )
        wanted = tokenizer.eos_token
    elif not is_known and wanted is not None:
        plain.append(wanted)
    if plain:
        verb = "is" if len(plain) == 1 else "are"
        notes.append(f"{', '.join(plain)} {verb} not in the vocabulary and written as plain text")
    return wanted


def _choose_pad(tokenizer: Any, entry: ChatFormat, notes: list[str]) -> None:
    pad, eos = tokenizer.pad_token, tokenizer.eos_token
    if pad is not None and pad != eos:
        return
    was = "missing" if pad is None else f"{eos}, the end token"
    taken = {eos, tokenizer.bos_token, entry.turn_end, *entry.markers}
    for candidate in PAD_CANDIDATES:
        if candidate not in taken and _is_one_token(candidate, tokenizer):
            tokenizer.pad_token = candidate
            notes.append(f"the pad token was {was}, and is now {candidate}")
            return
    outcome = (
        "rows of different lengths cannot be batched until you set one"
        if pad is None
        else "a collator that hides padding hides the end token too, and the model may never stop"
    )
    notes.append(f"the pad token is {was}, and the vocabulary has no spare one: {outcome}")


def find_format(template: object) -> ChatFormat:
    """The format of that name or alias, one made of (jinja_text, eos_token), or itself."""
    if isinstance(template, ChatFormat):
        return template
    if isinstance(template, str) and template in BY_NAME:
        return BY_NAME[template]
    if isinstance(template, (tuple, list)) and len(template) == 2:
        text, eos_token = template
        if isinstance(text, str) and text and isinstance(eos_token, str) and eos_token:
            # tutorials pass this name, which is Jinja's for the tokenizer's own
            turn_end = None if eos_token == "eos_token" else eos_token
            return ChatFormat(
                "of your own", text, source="", turn_end=turn_end, eos_token=eos_token, roles=()
            )
    near = difflib.get_close_matches(str(template).lower(), BY_NAME, n=1)
    suggestion = BY_NAME[near[0]].name if near else "chatml"
    raise UserError(
        "chat_template is unknown",
        got=shown(template),
        allowed=", ".join(entry.name for entry in FORMATS) + ", or (jinja_text, eos_token)",
        do=f"Pass chat_template={suggestion!r}",
    )


def checked_mapping(mapping: Mapping[str, str] | None) -> Mapping[str, str]:
    """`mapping`, or an empty one; refuses what names no key and no role."""
    mapping = {} if mapping is None else mapping
    roles = [theirs for ours, theirs in mapping.items() if ours not in ("role", "content")]
    if (
        set(mapping) - set(MAPPING_KEYS)
        or not all(isinstance(theirs, str) and theirs for theirs in mapping.values())
        or len(set(roles)) < len(roles)
    ):
        raise UserError(
            "mapping does not say what your data calls its keys and roles",
            got=shown(mapping, 120),
            allowed=f"texts for {', '.join(MAPPING_KEYS)}, and each role's another one",
            do="Pass mapping={'role': 'from', 'content': 'value', 'user': 'human', "
            "'assistant': 'gpt'}",
        )
    return mapping


def require_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer."""
    if not hasattr(tokenizer, "get_vocab"):
        raise UserError(
            "tokenizer is not a tokenizer",
            got=type(tokenizer).__name__,
            allowed="a Hugging Face tokenizer",
            do="Pass the tokenizer that was loaded with the model",
        )


def _is_one_token(token: str, tokenizer: Any) -> bool:
    """Whether a text becomes that very token. An entry that the splitter never yields does not."""
    token_id = tokenizer.get_vocab().get(token)
    ids = list(tokenizer(token, add_special_tokens=False)["input_ids"])
    return token_id is not None and ids == [token_id]


def adds_bos(tokenizer: Any) -> bool:
    """Whether `tokenizer(text)` begins with bos by itself."""
    bos_id = getattr(tokenizer, "bos_token_id", None)
    return bos_id is not None and list(tokenizer("a")["input_ids"])[:1] == [bos_id]
