"""Texts in the window."""

import html

STYLE = "white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8em; margin: 0.5em 1em; user-select: text"


def preformatted(text: str) -> str:
    """HTML that shows a text as it is: names and prompts of users are no markup."""
    return f'<pre style="{STYLE}">{html.escape(text)}</pre>'
