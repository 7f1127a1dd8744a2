"""Caption cleaning: equal to the installed diffusers' on many texts, and what it does in plain sight."""

import random
import sys
import warnings
from collections.abc import Callable

import pytest
from bs4 import ParserRejectedMarkup
from diffusers import SanaSprintPipeline

from sana_sprint.text.cleaning import clean_caption, normalise

CAPTIONS = [
    "",
    "   ",
    "A Red Circle left of a Blue Square",
    "<person> holding a <b>bold</b> sign &amp; an &quot;umbrella&quot;",
    "<script>alert('x')</script><p>a cat</p><br/>on a mat",
    "&lt;b&gt;hidden tags&lt;/b&gt; and &amp;lt;i&amp;gt;deeper ones",
    "&#65;&#x42;C upper case out of entities JC6640 here",
    "<![🐈 a declaration that some versions of Python refuse",
    "unclosed <a href='x' and < b > c <!-- comment",
    "<?xml version='1.0'?><svg>drawing</svg>",
    "<![CDATA[some data]]> <!doctype html> <![if",
    "see https://example.org/a%20b?c=d or http:/x, www.example.com/path, www:x and example.ru",
    "aahttps://b.com.net and a.https://com in a row, mail me@example.com or @me_too",
    "httwww:xps://nested.com",
    "a%20cat+on%2Ba+mat%0Anew line",
    "猫が座っている a cat 漢字 ㈱ ㌀ ䷀ ㇀ ㇰ カタカナ 한국어",
    "Кошка сидит на ковре 20х30 см, «кавычки» и — тире",
    "en–dash em—dash ―bar ‐hyphen ‑nb 〜wave ゠ ︱ －full --double",
    '`tick´ “double” ‘single’ ¨umlaut¨ «guillemets» \'\'two\'\' """three"""',
    "server at 192.168.0.1 or 1.2.3.4.5 or 999.999.999.999",
    "article 1:23   ",
    "article 1:23",
    "one\\ntwo\nthree\ttab\r\nfour\x0bfive\u2028six\xa0seven",
    "#1 #12 #123 #1234 #12345 #123456 1234567 12345 x1234567",
    "photo.png my-photo.jpeg /a/b/c.webp movie.mp4 thing.pdf.apk png image jpg images",
    "***SALE*** #NEW ®©™ •bullet ~(round) [square] {curly} |pipe| back\\slash fore/slash ¡hola! ¿qué?",
    "wait.... what . ever .. and ...",
    "this-is-my-cute-cat",
    "this_is_my_cute_cat_too",
    "well-known state-of-the-art",
    "- - - -",
    "----------",
    "_____",
    "mojibake: schÃ¶n â€œquotedâ€\x9d, naÃ¯ve",
    "jc6640 jc6640vc 6640vc231 j2d1a2a abc123def a1 ab12 abcd123456",
    "worldwide free shipping, free download free, download, click for more, click on it now, page 12",
    "size 10x20 or 1.5×2.5 or 3х4 or 10 x 20",
    "colon : spaced, comma,tight. full.stop a/b c./d 1,5",
    "'quoted whole'",
    '"quoted whole"',
    "' quoted with spaces '",
    ",leading comma",
    "trailing comma,",
    "-dash-",
    ".hidden",
    ".hidden file",
    "+plus+",
    "emoji 🐈 🏳️‍🌈 👩🏽‍🚀 ☃ ★",
    "RTL עברית العربية and İstanbul ß ﬁ ＦＵＬＬ ｗｉｄｔｈ",
    "\u200bzero\u200bwidth \ufeffbom \u00adsoft \x00null \x1b[31mansi\x1b[0m",
    "a photo of " + "very " * 100 + "long text",
]

FRAGMENTS = [
    *" \t\n.,:;-_+'\"`´«»“”‘’#@&%/\\()[]{}|<>*=?!~",
    *"aZéßхЖ猫㈱🐈1207",
    *[
        "&amp;",
        "&quot",
        "&lt;b&gt;",
        "<b>",
        "</b>",
        "<person>",
        "http://",
        "https:",
        "www:",
        ".com",
        ".org/x",
        "%20",
        "\\n",
    ],
    *[".png", "jpeg", "images", "page", "12", "3456789", "10x20", "192.168.1.1", "#123", "#12345", "1:23", "ab123"],
    *[
        "free",
        "shipping",
        "download",
        "click on",
        "a cat",
        "red-circle",
        "--",
        "...",
        "—",
        "Ã©",
        "\xa0",
        "\u3000",
        "@you",
    ],
]


def random_text(seed: int) -> str:
    """Pieces that mean something to a rule, in random order, so that rules meet and feed each other."""
    pick = random.Random(seed)
    return "".join(pick.choice(FRAGMENTS) for _ in range(pick.randint(1, 40)))


@pytest.fixture(scope="module")
def upstream():
    """diffusers' method, which reads nothing of its pipeline but a pattern of the class."""
    pipeline = SanaSprintPipeline.__new__(SanaSprintPipeline)

    def twice(text: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pipeline._text_preprocessing(text, clean_caption=True)[0]

    return twice


def outcome(clean: Callable[[str], str], text: str) -> str | None:
    """The cleaned text, or None where the parser of this Python refuses it."""
    try:
        return clean(text)
    except ParserRejectedMarkup:
        return None
    except ValueError as error:
        if isinstance(error.__cause__, ParserRejectedMarkup) and "needs markup that can be read, got '" in str(error):
            return None
        raise


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_is_cleaned_as_by_diffusers_or_refused_by_name(caption, upstream):
    assert outcome(clean_caption, caption) == outcome(upstream, caption)


def test_texts_of_random_pieces_are_cleaned_as_by_diffusers(upstream):
    texts = [random_text(seed) for seed in range(1500)]
    assert [text for text in texts if outcome(clean_caption, text) != outcome(upstream, text)] == []
    # The comparison would say little if the texts were all left alone, emptied or refused.
    assert sum(outcome(clean_caption, text) not in ("", text, None) for text in texts) > 1000


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("<p>A <b>Red</b> Circle</p>", "a red circle"),
        ("a cat https://example.org/cat on a mat", "a cat on a mat"),
        ("my-cute-cat-photo-one", "my cute cat photo one"),
        ("“A cat”", "a cat"),
        ("&lt;i&gt;a cat", "a cat"),  # one pass makes the tag, the next removes it
        ("a cat, free shipping", "a cat"),
    ],
)
def test_cleaning_leaves_what_the_caption_says(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_captions_like_file_names_or_xml_are_cleaned_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clean_caption("cats") == "cats"
        clean_caption("/home/cat")
        clean_caption("<?xml version='1.0'?><a>cat</a>")


def test_without_cleaning_only_case_and_outer_spaces_go():
    assert normalise("  A <b>Cat</b>,  Two-Tone ", clean=False) == "a <b>cat</b>,  two-tone"
    assert normalise("  A <b>Cat</b>,  Two-Tone ", clean=True) == "a cat, two-tone"


@pytest.mark.parametrize(("module", "package"), [("bs4", "beautifulsoup4"), ("ftfy", "ftfy")])
def test_a_missing_package_is_named(module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # Python then refuses to import it
    with pytest.raises(ImportError, match=f"clean_caption=True.* needs .*pip install {package}"):
        clean_caption("a cat")
    assert normalise("A cat", clean=False) == "a cat"
