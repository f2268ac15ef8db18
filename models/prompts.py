"""Warn about prompts that are too long: text encoders silently truncate them to a number of tokens."""

import sys
from collections.abc import Iterable

from utils.runs import is_first_process

MOST_SHOWN = 3  # prompts of a data set that are shown
MOST_CHARACTERS = 200  # of a part that is shown


def cut_off(tokenizer, prompt: str, limit: int) -> str:
    """The end of a prompt that an encoder of `limit` tokens does not read; empty if it reads all of it.

    tokenizer: a fast one of transformers, which ends a text with one special token.
    """
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    if len(encoded.input_ids) <= limit:
        return ""
    return prompt[encoded["offset_mapping"][limit - 1][0] :]  # the last token that is read ends the text


def warn_of_cuts(encoder: str, tokenizer, prompts: Iterable[str], limit: int) -> None:
    """Print on stderr, a line per prompt, the part that an encoder of `limit` tokens does not read."""
    cuts = [cut for prompt in dict.fromkeys(prompts) if (cut := cut_off(tokenizer, prompt, limit))]
    for cut in cuts[:MOST_SHOWN] if is_first_process() else ():
        shown, more = cut[:MOST_CHARACTERS], len(cut) - MOST_CHARACTERS
        rest = f" … and {more} more characters" if more > 0 else ""
        print(f"warning: {encoder} reads {limit} tokens of a prompt; not this: {shown!r}{rest}", file=sys.stderr)
    if len(cuts) > MOST_SHOWN and is_first_process():
        print(f"warning: {encoder} cuts {len(cuts) - MOST_SHOWN} more prompts", file=sys.stderr)
