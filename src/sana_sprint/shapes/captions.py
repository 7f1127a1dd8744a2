"""Requests to captions in several wordings, captions back to requests, and the rule that holds captions out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import astuple

import numpy as np

from sana_sprint.shapes.scenes import COLOURS, GROUNDS, KINDS, Placed, Request, Scene, Thing, choose

# In every list the first wording is the usual one; the others are for those who write differently.
_KIND_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"),),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
}
_COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    **{colour: (colour,) for colour in (*COLOURS, *GROUNDS)},
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "grey": ("grey", "gray"),
}
_SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
_NUMBER_WORDS: dict[int, tuple[str, ...]] = {
    1: ("one", "1"),
    2: ("two", "a pair of", "2"),
    3: ("three", "3"),
}
# What stands between two things, and what follows the second.
_RELATION_WORDS: dict[str | None, tuple[tuple[str, str], ...]] = {
    None: (("and", ""), ("with", ""), ("next to", ""), ("beside", "")),
    "left of": (
        ("left of", ""),
        ("to the left of", ""),
        ("on the left of", ""),
        ("on the left and", "on the right"),
    ),
    "right of": (
        ("right of", ""),
        ("to the right of", ""),
        ("on the right of", ""),
        ("on the right and", "on the left"),
    ),
    "above": (("above", ""), ("over", ""), ("on top of", ""), ("at the top and", "at the bottom")),
    "below": (("below", ""), ("under", ""), ("beneath", ""), ("underneath", ""), ("at the bottom and", "at the top")),
}
# Read, but not written: lists without a joining word.
_LIST_WORDS: dict[tuple[str, str], str | None] = {
    ("", ""): None,
    ("on the left", "on the right"): "left of",
    ("on the right", "on the left"): "right of",
    ("at the top", "at the bottom"): "above",
    ("at the bottom", "at the top"): "below",
}
_PICTURE_WORDS = ("picture", "image", "drawing", "photo")
_PREFIXES = ("", "a picture of", "an image of", "a drawing of", "a photo of")
_GROUND_AFTER = ("on a {} ground", "on a {} background", "against a {} background", "against {}", "on {}")
_GROUND_BEFORE = ("on a {} ground, ", "on a {} background, ", "against a {} background, ")
_COLOUR_JOINTS = (" and ", " with ", ", ")  # of captions that name colours only
_ARTICLES = ("a", "an", "the")

_HELD_OUT_MODULUS = 32

_EXAMPLE = "write for example 'a small red circle left of a blue square on a white ground'"


def _pick(rng: np.random.Generator, wordings: Sequence[str]) -> str:
    """A wording, the usual one in seven cases of ten."""
    return wordings[0] if rng.random() < 0.7 else choose(rng, wordings)


def _noun_phrase(thing: Thing, rng: np.random.Generator, is_terse: bool, is_counted: bool) -> str:
    singular, plural = _KIND_WORDS[thing.kind][0] if rng.random() < 0.9 else choose(rng, _KIND_WORDS[thing.kind])
    words = [_pick(rng, _SIZE_WORDS[thing.size])] if thing.size else []
    if thing.colour:
        words.append(_COLOUR_WORDS[thing.colour][0] if rng.random() < 0.9 else choose(rng, _COLOUR_WORDS[thing.colour]))
    words.append(plural if thing.count > 1 else singular)
    if is_counted or thing.count > 1:
        words.insert(0, _pick(rng, _NUMBER_WORDS[thing.count]))
    elif not is_terse:
        article = "an" if words[0][0] in "aeiou" else "a"
        words.insert(0, article if rng.random() < 0.95 else "the")
    return " ".join(words)


def describe(request: Request, rng: np.random.Generator) -> str:
    """A caption that says what the request says, in a wording drawn at random; `parse` reads every one of them."""
    is_terse = bool(rng.random() < 0.12)
    nouns = [_noun_phrase(thing, rng, is_terse, request.category == "counting") for thing in request.things]
    caption = nouns[0]
    tail = ""
    if len(nouns) == 2:
        wordings = _RELATION_WORDS[request.relation]
        joint, tail = wordings[0] if rng.random() < 0.4 else choose(rng, wordings)
        if is_terse and request.relation is None:
            caption = ", ".join(nouns)
        else:
            caption = " ".join(part for part in (nouns[0], joint, nouns[1], tail) if part)
    prefix = "" if is_terse else _pick(rng, _PREFIXES)
    caption = f"{prefix} {caption}".strip()
    if request.ground:
        ground = choose(rng, _COLOUR_WORDS[request.ground]) if rng.random() < 0.3 else request.ground
        if is_terse:
            caption += f", {ground} {choose(rng, ('background', 'ground'))}"
        elif tail or rng.random() < 0.1:
            # After "on the right" a second "on" would read badly.
            caption = choose(rng, _GROUND_BEFORE).format(ground) + caption
        else:
            caption += " " + choose(rng, _GROUND_AFTER).format(ground)
    if rng.random() < 0.1:
        caption = caption[0].upper() + caption[1:] + "."
    return caption


def _in_line(shapes: Sequence[Placed]) -> list[Placed]:
    """From left to right where they spread further across, from the top down where they spread further down."""
    axes = ([shape.x for shape in shapes], [shape.y for shape in shapes])
    places = max(axes, key=lambda axis: max(axis) - min(axis))
    return [shape for _, shape in sorted(zip(places, shapes), key=lambda pair: pair[0])]


def describe_colours(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that names a scene's colours only, in a wording drawn at random: "red and blue on a white ground".

    Each colour of a shape comes once, in the order of `_in_line`, and the ground before or behind them. It is for
    pictures whose shapes are given otherwise, as by their edges; `parse` cannot read it.
    """
    colours = dict.fromkeys(shape.colour for shape in _in_line(scene.shapes))
    named = _pick(rng, _COLOUR_JOINTS).join(_pick(rng, _COLOUR_WORDS[colour]) for colour in colours)
    named = f"{_pick(rng, _PREFIXES)} {named}".strip()
    ground = _pick(rng, _COLOUR_WORDS[scene.ground])
    if rng.random() < 0.2:
        return choose(rng, _GROUND_BEFORE).format(ground) + named
    return f"{named} {choose(rng, _GROUND_AFTER).format(ground)}"


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _vocabulary() -> frozenset[str]:
    phrases = [*_PREFIXES, *_GROUND_AFTER, *_GROUND_BEFORE, *_ARTICLES, "background", "ground"]
    phrases += [form for forms in _KIND_WORDS.values() for form in sum(forms, ())]
    phrases += [word for table in (_COLOUR_WORDS, _SIZE_WORDS) for words in table.values() for word in words]
    phrases += [word for words in _NUMBER_WORDS.values() for word in words]
    phrases += [part for wordings in _RELATION_WORDS.values() for wording in wordings for part in wording]
    return frozenset(word for phrase in phrases for word in _words(phrase))


VOCABULARY: frozenset[str] = _vocabulary()


def knows_no_word(prompt: str) -> bool:
    """Whether a prompt has words, and none of them is in `VOCABULARY`."""
    words = _words(prompt)
    return bool(words) and VOCABULARY.isdisjoint(words)


def unknown_words(prompt: str) -> list[str]:
    """Words of a prompt outside `VOCABULARY`, each once, in order; case and punctuation do not matter."""
    return list(dict.fromkeys(word for word in _words(prompt) if word not in VOCABULARY))


def _invert(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: meaning for meaning, words in table.items() for word in words}


def _any_of(words: Sequence[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_SINGULARS = {forms[0]: kind for kind, options in _KIND_WORDS.items() for forms in options}
_PLURALS = {forms[1]: kind for kind, options in _KIND_WORDS.items() for forms in options}
_COLOURS_READ = {word: colour for word, colour in _invert(_COLOUR_WORDS).items() if colour in COLOURS}
_GROUNDS_READ = {word: colour for word, colour in _invert(_COLOUR_WORDS).items() if colour in GROUNDS}
_SIZES_READ = _invert(_SIZE_WORDS)
_NUMBERS_READ = {"pair of": 2, **{word: number for number, words in _NUMBER_WORDS.items() for word in words}}
_RELATIONS_READ = {
    **_LIST_WORDS,
    **{wording: relation for relation, wordings in _RELATION_WORDS.items() for wording in wordings},
}

_ARTICLE = rf"(?:{_any_of(_ARTICLES)} )?"
_ATTRIBUTE = _any_of([*_SIZES_READ, *_COLOURS_READ])
_NOUN = _any_of([*_SINGULARS, *_PLURALS])
_THING = re.compile(
    rf"\b(?:(?P<number>{_any_of([*_NUMBERS_READ, *_ARTICLES])}) )?(?P<attributes>(?:{_ATTRIBUTE} )*)(?P<noun>{_NOUN})\b"
)
# "on white", "on a white ground", "white background"; but neither "white circle" nor "on a white circle".
_GROUND_NAME = _any_of(list(_GROUNDS_READ))
_GROUND = re.compile(
    rf"\b(?:(?:on|against|with) )?{_ARTICLE}(?P<named>{_GROUND_NAME}) (?:back)?ground\b"
    rf"|\b(?:on|against) {_ARTICLE}(?P<bare>{_GROUND_NAME})\b(?! {_ATTRIBUTE}| {_NOUN})"
)
_PREFIX = re.compile(rf"^{_ARTICLE}{_any_of(_PICTURE_WORDS)} of ")


def _refuse(caption: str, reason: str) -> ValueError:
    return ValueError(f"cannot read the caption {caption!r}: {reason}; {_EXAMPLE}")


def _read_thing(found: re.Match[str], caption: str) -> Thing:
    attributes = found["attributes"].split()
    colours = [_COLOURS_READ[word] for word in attributes if word in _COLOURS_READ]
    sizes = [_SIZES_READ[word] for word in attributes if word in _SIZES_READ]
    if len(colours) > 1 or len(sizes) > 1:
        raise _refuse(caption, f"{found[0]!r} has more than one colour or size")
    is_plural = found["noun"] in _PLURALS
    kind = _PLURALS[found["noun"]] if is_plural else _SINGULARS[found["noun"]]
    count = _NUMBERS_READ.get(found["number"], 1)
    if is_plural != (count > 1):
        raise _refuse(caption, f"{found[0]!r} must be one shape, or 'two' or 'three' of them")
    return Thing(kind, colours[0] if colours else None, sizes[0] if sizes else None, count)


def _infer_category(things: Sequence[Thing], relation: str | None, is_counted: bool) -> str:
    if len(things) == 2:
        if relation is not None:
            return "position"
        first, second = things
        is_attribution = first.colour and second.colour and first.colour != second.colour
        return "colour_attribution" if is_attribution else "two_objects"
    if is_counted:
        return "counting"
    return "colours" if things[0].colour else "single_object"


def parse(caption: str) -> Request:
    """The request that a caption states: the inverse of `describe`, whatever the case and punctuation.

    The category follows from what is said: a relation makes it position; two things, both coloured and differently,
    colour_attribution; any other two things two_objects; a number before the only thing ("one" included) counting; a
    colour colours; and a bare kind single_object. A size or a ground never changes it.

    Raises:
        ValueError: A word is unknown (the message names it and all known words), or the known words say something that
            the shapes world cannot show.
    """
    unknown = unknown_words(caption)
    if unknown:
        named = ", ".join(repr(word) for word in unknown)
        raise ValueError(f"unknown words in {caption!r}: {named}; known words: {', '.join(sorted(VOCABULARY))}")
    text = " ".join(_words(caption))
    grounds = {_GROUNDS_READ[match["named"] or match["bare"]] for match in _GROUND.finditer(text)}
    if len(grounds) > 1:
        raise _refuse(caption, f"one ground at most, found {' and '.join(sorted(grounds))}")
    text = _PREFIX.sub("", " ".join(_GROUND.sub(" ", text).split()))
    matches = list(_THING.finditer(text))
    if not 1 <= len(matches) <= 2:
        raise _refuse(caption, f"one or two things wanted, found {len(matches)} (shapes: {', '.join(KINDS)})")
    bounds = [0, *(end for match in matches for end in match.span()), len(text)]
    before, *between, after = [text[start:end].strip() for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
    joint = (between[0] if between else "", after)
    if before or joint not in _RELATIONS_READ or (not between and after):
        rest = ", ".join(repr(part) for part in (before, *between, after) if part)
        raise _refuse(
            caption, f"did not understand {rest} (shapes can be {', '.join(COLOURS)}; grounds {', '.join(GROUNDS)})"
        )
    things = tuple(_read_thing(match, caption) for match in matches)
    relation = _RELATIONS_READ[joint]
    category = _infer_category(things, relation, is_counted=matches[0]["number"] in _NUMBERS_READ)
    return Request(category, things, relation, next(iter(grounds), None))


def _held_out_key(request: Request, caption: str) -> str:
    if request.category in ("single_object", "colours"):
        return " ".join(_words(caption))
    is_combination = request.category in ("position", "colour_attribution")
    things = [astuple(thing) for thing in request.things]
    looks = [
        repr((kind, colour)) if is_combination else repr((kind, colour, size, n)) for kind, colour, size, n in things
    ]
    # One fact has one key: "A right of B" is "B left of A", and "A and B" is "B and A".
    relation = {"right of": "left of", "below": "above"}.get(request.relation or "", request.relation)
    if relation != request.relation:
        looks.reverse()
    elif relation is None:
        looks.sort()
    return repr((looks, relation, None if is_combination else request.ground))


def _is_drawn_out(key: str) -> bool:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % _HELD_OUT_MODULUS == 0


def is_held_out(caption: str) -> bool:
    """Whether a caption is kept for scoring (about one in 32), a stable rule on what it says.

    Position and colour_attribution: a combination of kinds, colours and relation is held out, in every size, ground,
    order and wording. Counting and two_objects: a full content (kinds, colours, sizes, number, ground) is held out, in
    every wording. Single_object and colours have so few contents that holding one out would take, say, "a red circle"
    from training altogether: there the exact words are held out, and the same content is trained on in other words.

    Raises:
        ValueError: `parse` cannot read the caption.
    """
    return _is_drawn_out(_held_out_key(parse(caption), caption))


def are_words_held_out(caption: str) -> bool:
    """Whether the exact words of a caption are kept for scoring (about one in 32), whatever they say.

    For captions that name colours only. All of their contents are few, and are trained on in other words.
    """
    return _is_drawn_out(" ".join(_words(caption)))
