"""gettext catalogues: which entries are rows, plural forms, lines, notes, and those of an installed package."""

from __future__ import annotations

from pathlib import Path

import polib
import pytest

from peftlab.data import load_rows
from peftlab.errors import DataError

PO = """\
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\\n"

msgid "Save"
msgstr "Sichern"

msgctxt "month"
msgid "May"
msgstr "Mai"

#, fuzzy
msgid "Old"
msgstr "Neu"

msgid "Untranslated"
msgstr ""

#, python-format
msgid "%(n)s day"
msgid_plural "%(n)s days"
msgstr[0] "%(n)s Tag"
msgstr[1] "%(n)s Tage"

#~ msgid "Gone"
#~ msgstr "Weg"
"""


def write(folder: Path, text: str = PO, name: str = "django.po") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_translated_entries_are_rows_at_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path)
    rows = load_rows(str(path))
    assert [rows.row(i) for i in range(len(rows))] == [
        {"source": "Save", "target": "Sichern", "context": None},
        {"source": "May", "target": "Mai", "context": "month"},
        {"source": "%(n)s day", "target": "%(n)s Tag", "context": None},
        {"source": "%(n)s days", "target": "%(n)s Tage", "context": None},
    ]
    assert [int(p) for p in rows.positions] == [5, 8, 19, 19]
    assert [note.message for note in rows.notes] == [
        f"{path} has strings that are not read: 1 fuzzy, 1 not translated, 1 obsolete"
    ]


def test_language_with_one_form_takes_the_plural(tmp_path: Path) -> None:
    path = write(tmp_path, 'msgid "day"\nmsgid_plural "days"\nmsgstr[0] "hi"\n')
    assert load_rows(str(path)).row(0)["source"] == "days"


def test_language_with_more_forms_has_a_row_of_each(tmp_path: Path) -> None:
    forms = "".join(f'msgstr[{i}] "{text}"\n' for i, text in enumerate(["dzień", "dni", "dnia"]))
    rows = load_rows(str(write(tmp_path, f'msgid "day"\nmsgid_plural "days"\n{forms}')))
    assert rows.columns["source"] == ["day", "days", "days"]
    assert rows.columns["target"] == ["dzień", "dni", "dnia"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('msgid "a"\nmsgstr "b"\n\nmsgidd "c"\n', r"bad.po is no gettext catalogue: syntax error \(line 4\)"),
        (
            'msgid "a"\nmsgstr ""\n\n#, fuzzy\nmsgid "c"\nmsgstr "x"\n',
            "has no translated string: 1 not translated, 1 fuzzy",
        ),
    ],
)
def test_bad_catalogue_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(str(write(tmp_path, text, "bad.po")))


def test_compiled_catalogue_is_named(tmp_path: Path) -> None:
    polib.pofile(PO).save_as_mofile(str(tmp_path / "django.mo"))
    with pytest.raises(DataError, match=r"a compiled gettext catalogue; name the \.po file"):
        load_rows(str(tmp_path / "django.mo"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package whose import fails, with two catalogues of German and one of French."""
    root = tmp_path / "shopx"
    write(root / "locale/de/LC_MESSAGES")
    write(root / "cart/locale/de/LC_MESSAGES", 'msgid "Save"\nmsgstr "Sichern"\n\nmsgid "Pay"\nmsgstr "Bezahlen"\n')
    write(root / "locale/fr/LC_MESSAGES", 'msgid "Save"\nmsgstr "Enregistrer"\n')
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return root


def test_catalogues_of_a_package_are_gathered_without_importing_it(package: Path) -> None:
    rows = load_rows("catalogues:shopx/de")
    assert rows.columns["source"] == ["Save", "Pay", "May", "%(n)s day", "%(n)s days"]
    assert rows.where(1) == f"{package}/cart/locale/de/LC_MESSAGES/django.po:4"
    assert any("1 string that repeats an earlier one" in note.message for note in rows.notes)
    parts = [load_rows(f"catalogues:shopx/de:{part}") for part in ("train", "test")]
    assert sorted([*parts[0].columns["source"], *parts[1].columns["source"]]) == sorted(rows.columns["source"])


def test_two_languages_are_aligned_by_the_strings_of_the_program(package: Path) -> None:
    """By msgid and context, in the same catalogue of both; of plural forms, those with the same number."""
    plural = 'msgid "%(n)s day"\nmsgid_plural "%(n)s days"\n'
    write(
        package / "locale/fr/LC_MESSAGES",
        'msgid "Save"\nmsgstr "Enregistrer"\n\nmsgid "May"\nmsgstr "Pouvoir"\n\nmsgid "Old"\nmsgstr "Vieux"\n\n'
        f'{plural}msgstr[0] "%(n)s jour"\nmsgstr[1] "%(n)s jours"\n',
    )
    rows = load_rows("catalogues:shopx/de/fr")
    assert list(zip(rows.columns["source"], rows.columns["target"], strict=True)) == [
        ("Sichern", "Enregistrer"),
        ("%(n)s Tag", "%(n)s jour"),
        ("%(n)s Tage", "%(n)s jours"),
    ]
    assert rows.where(1) == f"{package}/locale/fr/LC_MESSAGES/django.po:10"
    assert "2 not translated in" in rows.notes[0].message
    write(package / "locale/fr/LC_MESSAGES", f'{plural}msgstr[0] "%(n)s jour"\n\nmsgid "Save"\nmsgstr "Sauver"\n')
    one_form = load_rows("catalogues:shopx/de/fr")
    assert one_form.columns["target"] == ["Sauver"]
    assert "1 with other plural forms" in one_form.notes[0].message


def test_near_duplicates_are_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{noun} number {i} is not a valid choice" for noun in ("The first", "Another") for i in range(20)]
    write(
        tmp_path / "shopx/locale/de/LC_MESSAGES",
        "\n\n".join(f'msgid "{text}"\nmsgstr "{i}"' for i, text in enumerate(texts)),
    )
    (tmp_path / "shopx/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    sides = [set(load_rows(f"catalogues:shopx/de:{part}").columns["source"]) for part in ("train", "test")]
    assert len(sides[0] | sides[1]) == 40
    for noun in ("The first", "Another"):
        alike = {text for text in texts if text.startswith(noun)}
        assert not (alike & sides[0]) or not (alike & sides[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("catalogues:shopx/de/fr/it", "or catalogues:PACKAGE/LANGUAGE/LANGUAGE to translate between two"),
        ("catalogues:shopx/en/de", r"shopx has no catalogue of the language 'en'.* It has 'de', 'fr'"),
        ("catalogues:shopx/it_IT/de:train", "shopx has no catalogue of the language 'it_IT'"),
        ("catalogues:shopx/fr/xx", "shopx has no catalogue of the language 'xx'"),
        (
            "catalogues:shopx/dee",
            r"shopx has no catalogue of the language 'dee'; did you mean 'de'\? It has 'de', 'fr'",
        ),
        ("catalogues:shopx", "expected catalogues:PACKAGE/LANGUAGE, such as catalogues:django/de"),
        ("catalogues:shoppx/de", "package 'shoppx' is not installed, so it has no catalogues"),
        ("catalogues:numpy/de", "numpy has no gettext catalogues"),
    ],
)
def test_unknown_catalogues_are_refused(name: str, message: str, package: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(name)


def test_languages_without_a_common_string_are_refused(package: Path) -> None:
    write(package / "locale/fr/LC_MESSAGES", 'msgid "Elsewhere"\nmsgstr "Ailleurs"\n')
    with pytest.raises(DataError, match="no string of shopx is translated into 'de' and 'fr'"):
        load_rows("catalogues:shopx/de/fr")
