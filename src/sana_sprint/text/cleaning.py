"""A caption as found in the wild to lower-case text without links, markup, codes and shop talk.

The rules and their order are those that diffusers' pipelines have from DeepFloyd IF, odd ones included, so that a
caption gives the same picture in both libraries. Each rule is a row here: to read the cleaner is to read `STEPS`.
"""

import html
import re
import warnings
from collections.abc import Callable
from urllib.parse import unquote_plus

Step = Callable[[str], str]


def _replace(*rows: tuple[str, str]) -> Step:
    """One step out of rows of (pattern, replacement), applied in turn."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rows]

    def apply(text: str) -> str:
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return text

    return apply


def _stripped_lower_case(text: str) -> str:
    return text.strip().lower()


def _without_markup(text: str) -> str:
    """What a browser would show of HTML."""
    try:
        from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, ParserRejectedMarkup, XMLParsedAsHTMLWarning
    except ImportError as error:
        raise ImportError(
            "cleaning captions (clean_caption=True) needs Beautiful Soup: pip install beautifulsoup4"
        ) from error
    with warnings.catch_warnings():
        # A caption that looks like a file name or like XML is a caption all the same.
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        try:
            return BeautifulSoup(text, features="html.parser").text
        except ParserRejectedMarkup as error:  # "<![" and an odd character, on some versions of Python
            raise ValueError(
                f"cleaning captions (clean_caption=True) needs markup that can be read, got {text!r}: remove its '<!'"
            ) from error


def _plain_quotes(text: str) -> str:
    return text.translate(_QUOTES)


def _words_joined_by_dashes_apart(text: str) -> str:
    """this-is-my-cute-cat to five words; up to three dashes and underscores may be hyphens and stay."""
    if text.count("-") + text.count("_") > 3:
        return text.translate(_DASHES_TO_SPACES)
    return text


def _mended_encoding(text: str) -> str:
    """Text that was decoded with the wrong code page, decoded with the right one."""
    try:
        import ftfy
    except ImportError as error:
        raise ImportError("cleaning captions (clean_caption=True) needs ftfy: pip install ftfy") from error
    return ftfy.fix_text(text)


_QUOTES = str.maketrans(dict.fromkeys("`´«»“”¨", '"') | dict.fromkeys("‘’", "'"))
_DASHES_TO_SPACES = str.maketrans("-_", "  ")
_DASHES = (
    r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+"
)
_FILE_TYPES = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_HOST = r"[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"

STEPS: tuple[Step, ...] = (
    unquote_plus,  # "%20" and "+" of captions that were part of an address
    _stripped_lower_case,
    _replace(
        ("<person>", "person"),  # a placeholder, before it is taken for a tag
        # Twice, since removing one address can leave another behind; "www:" is upstream's spelling.
        (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_HOST})", ""),
        (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_HOST})", ""),
    ),
    _without_markup,
    _replace(
        (r"@\w+", ""),  # user names
        # From CJK strokes over kana extensions, enclosed letters and hexagrams to the unified ideographs.
        (r"[\u31c0-\u9fff]+", ""),
        (_DASHES, "-"),
    ),
    _plain_quotes,
    _replace(
        (r"&quot;?", ""),
        (r"&amp", ""),
        (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # network addresses
        (r"\d:\d\d\s+$", ""),  # article numbers
        (r"\\n", " "),  # a line break that was escaped
        (r"#\d{1,3}\b", ""),
        (r"#\d{5,}\b", ""),
        (r"\b\d{6,}\b", ""),
        (rf"\S+\.{_FILE_TYPES}", ""),
        (r"[\"']{2,}", '"'),
        (r"\.{2,}", " "),
        (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
        (r"\s+\.\s+", " "),
    ),
    _words_joined_by_dashes_apart,
    _mended_encoding,
    html.unescape,
    html.unescape,  # "&amp;amp;" is common
    _replace(
        # Stock numbers: jc6640, jc6640vc, 6640vc231.
        (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
        (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
        (r"\b\d+[a-zA-Z]+\d+\b", ""),
        (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
        (r"(?:free\s)?download(?:\sfree)?", ""),
        (r"\bclick\b\s(?:for|on)\s\w+", ""),
        (rf"\b{_FILE_TYPES}(?:\simages?)?", ""),
        (r"\bpage\s+\d+\b", ""),
        (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
        (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # sizes, by Latin x, Cyrillic kha or the multiplication sign
        (r"\b\s+:\s+", ": "),
        (r"(\D[,./])\b", r"\1 "),
        (r"\s+", " "),
        # Ends are trimmed of quotes and punctuation before they are of spaces: a space at either end protects them.
        (r"^[\"']([\w\W]+)[\"']$", r"\1"),
        (r"^['_,:;-]", ""),
        (r"['_,:+-]$", ""),
        (r"^\.\S+$", ""),
    ),
    str.strip,
)


def clean_caption(text: str) -> str:
    """The caption after all `STEPS`, twice: what one pass uncovers (a tag in an entity) the second one removes.

    Raises:
        ImportError: if Beautiful Soup or ftfy is not installed.
        ValueError: if the caption holds a declaration that Python's parser refuses.
    """
    for _ in range(2):  # diffusers' contract: two passes, whether or not a third would still change something
        for step in STEPS:
            text = step(text)
    return text


def normalise(text: str, clean: bool) -> str:
    """A prompt as the tokenizer gets it: in lower case and without outer spaces, and on request `clean_caption`."""
    return clean_caption(text) if clean else text.lower().strip()
