"""What the front and the back of the book promise: landing page, glossary, notation, bibliography, readme, licences."""
import configparser
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
BACK = ROOT / "nbs" / "back"
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

sys.path.insert(0, str(ROOT / "book"))
import speechlearn_book as book  # noqa: E402

from speechlearn.checkpoint import list_checkpoints, load_checkpoint  # noqa: E402
from speechlearn.cli import make_parser  # noqa: E402
from speechlearn.data.batches import is_padding  # noqa: E402
from speechlearn.data.synthetic import TEST_VOICES, TRAIN_VOICES, sampler  # noqa: E402
from speechlearn.recogniser import load_recogniser  # noqa: E402
from speechlearn.sound.features import n_frames  # noqa: E402
from speechlearn.text import CharacterVocabulary, WordVocabulary  # noqa: E402


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def markdown_of(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def name_of(path):
    return str(path.relative_to(ROOT))


# ---- the glossary -------------------------------------------------------------------------------------------


def glossary():
    """[(names of a term, its definition)], in the order of the page."""
    body = re.search(r"```\{glossary\}\n(.*?)```", read("nbs/back/glossary.md"), re.S).group(1)
    entries = []
    for block in re.split(r"\n\s*\n", body.strip()):
        lines = block.splitlines()
        names = [line for line in lines if not line.startswith(" ")]
        entries.append((names, " ".join(line.strip() for line in lines if line.startswith(" "))))
    return entries


def test_glossary_is_in_order_and_names_no_term_twice():
    first = [names[0].lower() for names, _ in glossary()]
    assert first == sorted(first)
    everything = [name.lower() for names, _ in glossary() for name in names]
    twice = sorted({name for name in everything if everything.count(name) > 1})
    assert not twice, f"defined twice: {twice}"


def test_glossary_has_the_words_a_newcomer_meets_first():
    defined = {name.lower() for names, _ in glossary() for name in names}
    assert {"sample rate", "frame", "batch", "mask", "padding", "blank", "ctc", "encoder", "loss", "word error rate", "character error rate"} <= defined


@pytest.mark.parametrize(("names", "definition"), glossary(), ids=lambda value: value[0] if isinstance(value, list) else "")
def test_definitions_are_short_sentences_that_lead_to_an_existing_chapter(names, definition):
    text = re.sub(r"\[[^\]]*\]\([^)]*\)|\*Part \d\*", "", definition).strip()
    assert text and text[0].isupper() and text.endswith("."), f"{names[0]}: a definition is a sentence, got {text!r}"
    assert len(text.split()) <= 40, f"{names[0]}: {len(text.split())} words; say it shorter"
    for target in re.findall(r"\]\(([^)]*)\)", definition):
        path = (BACK / target).resolve()
        assert path.exists(), f"{names[0]} leads to {target}, which does not exist"
        in_toc = {ROOT / f"{name}.ipynb" for name, _ in book.chapters_in_toc()}
        assert path in in_toc, f"{names[0]} leads to {target}, which is not in _toc.yml"


# ---- the bibliography ---------------------------------------------------------------------------------------


def bibliography():
    from pybtex.database import parse_file  # refuses a repeated key

    return parse_file(str(ROOT / "references.bib")).entries


def test_every_citation_has_its_source():
    keys = set(bibliography())
    pages = NOTEBOOKS + sorted(BACK.glob("*.md"))
    for page in pages:
        text = markdown_of(page) if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
        for cited in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text):
            for key in cited.split(","):
                assert key.strip() in keys, f"{name_of(page)} cites {key.strip()!r}, which is not in references.bib"


@pytest.mark.parametrize("key", bibliography())
def test_sources_can_be_found(key):
    entry = bibliography()[key]
    fields = entry.fields
    assert entry.persons.get("author") and fields.get("title"), "a source has authors and a title"
    assert "year" in fields or "url" in fields
    if "year" in fields:
        assert re.fullmatch(r"(19|20)\d\d", fields["year"])
        assert fields["year"] in key, f"the key {key} names another year than {fields['year']}"
    if "pages" in fields:
        first, last = map(int, re.fullmatch(r"(\d+)--(\d+)", fields["pages"]).groups())
        assert first <= last, "pages run forwards, written 10--21"
    if "doi" in fields:
        assert re.fullmatch(r"10\.\d{4,}/\S+", fields["doi"]), "a doi is the name alone, without https://doi.org/"
    if "eprint" in fields:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", fields["eprint"]) and fields.get("archiveprefix") == "arXiv"


# ---- the notation -------------------------------------------------------------------------------------------


def test_notation_names_exist_in_the_package():
    table_names = set(re.findall(r"^\|[^|\n]*\|((?: *`\w+`,?)+) *\|", read("nbs/back/notation.md"), re.M))
    names = {name for cell in table_names for name in re.findall(r"`(\w+)`", cell)}
    assert {"batch", "frames", "vocab", "feature_lengths", "log_probs"} <= names
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "speechlearn").rglob("*.py"))
    later = {"d_head"}  # built with attention
    for name in names - later:
        assert re.search(rf"\b{name}\b", source), f"notation.md lists {name!r}, which the package does not use"


@pytest.mark.parametrize("vocabulary", [CharacterVocabulary(), WordVocabulary()])
def test_special_symbols_have_the_numbers_that_notation_states(vocabulary):
    stated = re.search(r"blank (\d), padding (\d), start (\d), end (\d), unknown (\d)", read("nbs/back/notation.md"))
    assert list(map(int, stated.groups())) == [vocabulary.blank, vocabulary.pad, vocabulary.sos, vocabulary.eos, vocabulary.unk]


@pytest.mark.parametrize("samples", [400, 559, 560, 719, 720, 16_000])
def test_number_of_frames_is_the_formula_of_notation(samples):
    assert "`1 + (N - window) // hop`" in read("nbs/back/notation.md")
    window, hop = 400, 160
    assert n_frames(torch.tensor([samples]), window, hop).tolist() == [1 + (samples - window) // hop]


def test_is_padding_is_true_on_filler():
    assert is_padding(torch.tensor([2, 3])).tolist() == [[False, False, True], [False, False, False]]


def test_masks_of_pytorch_mean_what_notation_says():
    """Two keys that differ much; the mask [False, True] must choose opposite ones in the two functions."""
    mask = torch.tensor([[False, True]])
    query, keys, values = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 1.0], [5.0, 5.0]]]])
    takes_part = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    assert takes_part.flatten().tolist() == [5.0, 5.0]

    attention = torch.nn.MultiheadAttention(2, 1, bias=False, batch_first=True).eval()
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.eye(2).repeat(3, 1))
        attention.out_proj.weight.copy_(torch.eye(2))
        leaves_out, _ = attention(torch.zeros(1, 1, 2), torch.zeros(1, 2, 2), values[0], key_padding_mask=mask)
    assert leaves_out.flatten().tolist() == [1.0, 1.0]


# ---- the landing page ---------------------------------------------------------------------------------------


def cards():
    """{title of a card: its text}"""
    text = markdown_of(ROOT / "nbs" / "index.ipynb")
    return dict(re.findall(r":::\{grid-item-card\} ([^\n]+)\n(.*?)\n:::", text, re.S))


def test_landing_page_has_a_card_for_each_part_and_says_which_are_written():
    titles = list(cards())
    assert len(titles) == len(book.PARTS)
    written = {chapter["part"] for _, chapter in book.chapters_in_toc()}
    for (part, _), title in zip(book.PARTS.items(), titles, strict=True):
        promised = "being written" not in cards()[title].lower()
        assert promised == (part in written), f"the card {title!r} and _toc.yml disagree on whether that part is written"


def test_cards_of_written_parts_lead_to_their_first_chapter():
    first = {}
    for name, chapter in book.chapters_in_toc():
        if name != "nbs/index":
            first.setdefault(chapter["part"], name.removeprefix("nbs/"))
    for (part, _), text in zip(book.PARTS.items(), cards().values(), strict=True):
        if part in first:
            assert f":link: {first[part]}\n" in text


def test_first_sound_is_a_voice_and_a_sentence_kept_from_training_and_is_written_down_right():
    source = "".join("".join(cell["source"]) for cell in json.loads(read("nbs/index.ipynb"))["cells"])
    utterance = sampler()[int(re.search(r"sampler\(\)\[(\d+)\]", source).group(1))]
    variant = utterance.speaker.split("+")[1]
    assert variant in TEST_VOICES and variant not in TRAIN_VOICES
    assert load_recogniser("digits").transcribe(utterance.waveform(), 16_000).text == utterance.text


def test_commands_on_the_landing_page_are_in_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.M))
    for command in re.findall(r"^make (\w+)", markdown_of(ROOT / "nbs" / "index.ipynb"), re.M):
        assert command in targets


# ---- the readme ---------------------------------------------------------------------------------------------


def code_lines(text):
    return [line for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for line in block.splitlines() if line.strip()]


def test_readme_sets_up_with_two_commands():
    setup = re.search(r"## Set up\n(.*?)\n## ", read("README.md"), re.S).group(1)
    assert code_lines(setup) == ["make book", "make test"]


@pytest.mark.parametrize("line", [line for line in code_lines(read("README.md")) if line.startswith("speechlearn ")])
def test_readme_commands_are_understood(line):
    make_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_readme_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.M))
    named = {line.split()[1] for line in code_lines(read("README.md")) if line.startswith("make ")}
    assert named and named <= targets


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "NOTICE"])
def test_files_and_links_named_by_front_pages_exist(page):
    text = read(page)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), f"{page} leads to {target}"
    for target in re.findall(r"`((?:nbs|book|tests|speechlearn)/[\w/.]+)`", text):
        assert (ROOT / target).exists(), f"{page} names {target}, which does not exist"


# ---- licence, notice, citation ------------------------------------------------------------------------------


def test_licence_is_the_whole_apache_licence():
    text = read("LICENSE")
    headings = re.findall(r"^\s+(\d)\. [A-Z]\w+", text, re.M)
    assert headings == list("123456789")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("name", list_checkpoints())
def test_notice_names_what_the_shipped_weights_were_made_from(name):
    notice = " ".join(read("NOTICE").split())
    assert f"speechlearn/checkpoints/{name}" in notice
    metadata = load_checkpoint(name).metadata
    if "fsdd" in metadata["trained_on"]:
        for needed in ("Zohar Jackson", "github.com/Jakobovski/free-spoken-digit-dataset", "Attribution-ShareAlike 4.0", "Changes to the recordings"):
            assert needed in notice, f"CC BY-SA 4.0 asks for it: {needed}"
        assert "CC BY-SA 4.0" in metadata["licence"], "the terms travel with the weights"
    assert "espeak-ng" in notice


def test_no_recording_of_people_is_shipped():
    sounds = [p for p in (ROOT / "speechlearn").rglob("*") if p.suffix in (".wav", ".flac", ".ogg", ".mp3")]
    assert sounds and all(p.parent.name == "sampler" for p in sounds)
    assert {u.speaker.split("+")[-1] for u in sampler()} <= set(TEST_VOICES), "the sampler holds machine voices only"


def test_citation_agrees_with_the_package():
    citation = yaml.safe_load(read("CITATION.cff"))
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    settings = settings["DEFAULT"]
    assert str(citation["version"]) == settings["version"]
    assert citation["license"] == "Apache-2.0"
    assert citation["repository-code"] == settings["git_url"]
    assert f"## {settings['version']}" in read("CHANGELOG.md")
