"""Fields that ask for something which is not done here: refused by name, not passed over.

Values that ask for nothing (what many clients always send) are fine, and so are fields that nobody here knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import SlalomError

_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
#: Field: values that ask for nothing, beside those of _NOTHING.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "return_token_ids": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (),
}


def refuse_unserved(body: Mapping[str, Any], *, chat: bool) -> None:
    """:param body: a request as it came
    :param chat: else a plain completion

    :raises SlalomError: it asks for what is not done here
    """
    for field, harmless in (_UNSERVED | ({"echo": ()} if chat else {"top_logprobs": ()})).items():
        value = body.get(field)
        if not any(value == nothing for nothing in (*_NOTHING, *harmless)):
            raise SlalomError(field, value, "this is not served here: leave the field out")
