"""How a message quotes values, shows names and lists what is valid."""

from __future__ import annotations

import pytest

from tl_trainer.ground.wording import printable, shown, unknown


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("adm", "unknown name 'adm'; did you mean 'adam' or 'adamw'? (valid: adam, adamw, sgd)"),
        ("adamw2", "unknown name 'adamw2'; did you mean 'adamw' or 'adam'? (valid: adam, adamw, sgd)"),
        ("lion", "unknown name 'lion' (valid: adam, adamw, sgd)"),
        (5, "unknown name 5 (valid: adam, adamw, sgd)"),
        (None, "unknown name nothing (valid: adam, adamw, sgd)"),
    ],
)
def test_unknown_lists_the_valid_names_and_the_nearest(given: object, sentence: str) -> None:
    assert unknown("name", given, ["sgd", "adamw", "adam"]) == sentence


def test_unknown_does_not_list_hundreds_of_names() -> None:
    names = [f"name{n:03}" for n in range(200)]
    sentence = unknown("label", "name007x", names)
    assert "did you mean 'name007'" in sentence
    assert sentence.endswith("(valid: 200 names, such as name000, name001, name002)")
    assert unknown("label", "x", names, "tl-train --list y").endswith(
        "(valid: 200 names, listed by `tl-train --list y`)"
    )


@pytest.mark.parametrize(
    ("given", "valid", "meant"),
    [
        ("effnet", ["efficientnet_b0", "efficientnet_v2_s", "resnet18"], "'efficientnet_b0' or 'efficientnet_v2_s'"),
        ("vit", ["vit_b_16", "vit_l_32", "maxvit_t"], "'vit_b_16' or 'vit_l_32'"),
        ("timm/vit", ["timm/vit_b", "timm/eva"], "'timm/vit_b'"),
        ("RandomFlip", ["RandomCrop", "RandomHorizontalFlip", "RandomVerticalFlip"],
         "'RandomVerticalFlip' or 'RandomHorizontalFlip'"),
        ("resent50", ["resnet50", "alexnet"], "'resnet50'"),
    ],
)  # fmt: skip
def test_a_family_is_known_by_its_short_name(given: str, valid: list[str], meant: str) -> None:
    assert f"unknown x '{given}'; did you mean {meant}? (valid: " in unknown("x", given, valid)


def test_what_is_like_nothing_gets_no_hint() -> None:
    assert unknown("x", "re", ["recall", "resize"]) == "unknown x 're' (valid: recall, resize)"


def test_a_value_is_quoted_on_one_short_line() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown({"a": [1, None]}) == "{'a': [1, None]}"
    assert len(shown("x" * 100_000)) < 150
    assert len(shown([["x" * 1000] * 1000] * 1000)) < 5000
    assert len(unknown("name", "x" * 100_000, ["x"])) < 200


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("\x1b[31m\0", r"\x1b[31m\x00"),
        ("a\nb\r\tc\v", r"a\nb\r\tc\x0b"),
        ("\x7f\x85\x9b", r"\x7f\x85\x9b"),
        ("\u202egpj\u202c", r"\u202egpj\u202c"),
        ("\u2066\u200fx\u2069", r"\u2066\u200fx\u2069"),
        (b"caf\xe9\x80".decode("utf-8", "surrogateescape"), r"caf\udce9\udc80"),
    ],
)
def test_what_would_move_the_cursor_is_shown_as_an_escape(name: str, text: str) -> None:
    assert printable(name) == text
    assert printable(f"é{name}🐝") == f"é{text}🐝"
    assert text.isascii()


@pytest.mark.parametrize(
    "name",
    [
        "", "a b/c.jpg", r"$a_b$ \n <b>&amp;", "café", "cafe\u0301", "Größe", "Ελλάδα", "Москва", "עברית", "العربية",
        "हिन्दी", "ไทย", "日本語", "한국어", "ⵜⴰⵎⴰⵣⵉⵖⵜ", "🐝🦋", "☀\ufe0f", "👍🏽", "€½°",
    ],
)  # fmt: skip
def test_letters_of_every_script_and_emoji_stay_as_they_are(name: str) -> None:
    assert printable(name) == name
