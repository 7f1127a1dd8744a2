"""Prompts for the embedded checkpoint to a warning or an error that says which words it knows."""

from collections.abc import Sequence

from sana_sprint.cli import screen


def known_words() -> str:
    """The words of the shapes world in groups, for a message."""
    from sana_sprint.shapes.captions import VOCABULARY
    from sana_sprint.shapes.scenes import COLOURS, GROUNDS, KINDS

    groups = {"shapes": KINDS, "colours": COLOURS, "grounds": GROUNDS}
    named = {word for words in groups.values() for word in words}
    groups["and"] = tuple(sorted(VOCABULARY - named))
    return "; ".join(f"{title}: {', '.join(words)}" for title, words in groups.items())


def check_words(prompts: Sequence[str], *, follows_drawing: bool = False) -> None:
    """Warns of words that the embedded checkpoint was not trained on, and of prompts it cannot follow.

    Beside a drawing, which says the rest, any of its words will do.

    Raises ValueError if it knows no word of a prompt, except for an empty one.
    """
    from sana_sprint.shapes.captions import knows_no_word, parse, unknown_words

    unknown: dict[str, None] = {}
    for prompt in dict.fromkeys(prompts):
        words = unknown_words(prompt)
        if knows_no_word(prompt):
            raise ValueError(f"the embedded model knows no word of {prompt!r}; it knows {known_words()}")
        unknown.update(dict.fromkeys(words))
        if not words and prompt.strip() and not follows_drawing:
            try:
                parse(prompt)
            except ValueError as error:
                screen.report("warning", f"the embedded model may not follow this: {error}")
    if unknown:
        screen.report("warning", f"the embedded model does not know {', '.join(unknown)}; it knows {known_words()}")
