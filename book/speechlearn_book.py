"""The book's own Sphinx extension.

- Takes nbdev's directives (`#| export`, `#| hide`, …) off the pages.
- Draws the card at the head of every chapter from the `chapter` metadata of its notebook.
- Adds the boxes `{misconception}`, `{question}` and `{versions}`, and the indexes made from them.
- Makes stale outputs impossible: when the package, the pins or the data changed, nothing cached is used.
"""
import hashlib
import html
import json
import os
import platform
import shutil
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
CACHE = BUILD / ".jupyter_cache"
KEY_FILE = BUILD / "outputs.key"
TIMES_FILE = BUILD / "seconds.json"

PARTS = {  # in reading order; short names fit the map on a phone
    "start": "Start",
    "sound": "1 Sound",
    "transformer": "2 Attention",
    "speech_transformer": "3 Speech-Transformer",
    "alignment": "4 Alignment",
    "zipformer_parts": "5 Parts",
    "zipformer": "6 Zipformer",
    "beyond": "7 Beyond",
    "workshop": "Workshop",
}

QUESTIONS = {
    1: "Are embeddings required for any type of data?",
    2: "Why sines and cosines for positions?",
    3: "What do stacked layers add, and how do they differ?",
    4: "Why “encoder” and “decoder” if they are nearly the same layers?",
    5: "How do the training data of sequence-to-sequence models, decoder-only models and BERT differ?",
    6: "How large is the attention window, and why is it unbounded in theory?",
    7: "How do Transformers avoid over-confidence from the softmax?",
    8: "What is the sequence dimension, and how does it relate to vocab_size and d_model?",
    9: "How does the output become “a probability for each next character”?",
    10: "How does Function.apply connect to backward, and what is ctx?",
    11: "When do I need a backward of my own at all?",
    12: "What is initial_scale, what is initial_speed, and which one does the Zipformer use?",
    13: "Which reference file should I follow: which version is the paper's?",
    14: "Do I need ScaledAdam?",
    15: "Where do the Swoosh constants come from?",
    16: "stack or cat?",
    17: "Batched or looped groups?",
    18: "What do skip_rate and straight_through_rate mean?",
    19: "Which details matter in the end?",
}


# ---- chapters as data ---------------------------------------------------------------------------------


def chapter_of(notebook: Path) -> dict | None:
    """The `chapter` metadata of a notebook; None where it is not a chapter."""
    return json.loads(notebook.read_text(encoding="utf-8"))["metadata"].get("chapter")


def chapters_in_toc() -> list[tuple[str, dict]]:
    """(document name, chapter data) for each chapter of `_toc.yml`, in reading order."""
    import yaml

    names = []

    def walk(node):
        for key in ("root", "file"):
            if key in node:
                names.append(node[key])
        for key in ("parts", "chapters", "sections"):
            for child in node.get(key, []):
                walk(child)

    walk(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))
    found = []
    for name in names:
        path = ROOT / f"{name}.ipynb"
        if path.exists() and (chapter := chapter_of(path)):
            found.append((name, chapter))
    return found


def notebooks_in_toc() -> list[Path]:
    return [ROOT / f"{name}.ipynb" for name, _ in chapters_in_toc()]


# ---- no stale outputs -----------------------------------------------------------------------------------


def outputs_key() -> str:
    """A hash over everything but the notebooks that can change what a notebook prints."""
    digest = hashlib.sha256()
    files = sorted(p for p in (ROOT / "speechlearn").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    for path in [*files, ROOT / "constraints.txt", ROOT / "book" / "build.py"]:
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes() if path.exists() else b"")
    digest.update(f"{platform.python_version()} {platform.machine()} {platform.system()}".encode())
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):  # pages read stored results
        digest.update(path.read_bytes())
    fsdd = os.environ.get("SPEECHLEARN_FSDD", "")
    digest.update(f"{fsdd} {os.environ.get('SPEECHLEARN_QUICK', '')}".encode())
    if fsdd:
        for path in sorted(Path(fsdd).rglob("*.wav")):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


def forget_stale_outputs() -> bool:
    """Empty the cache of executed notebooks when it was made by another package, pin set or data. True if it was."""
    key = outputs_key()
    if KEY_FILE.exists() and KEY_FILE.read_text() == key:
        return False
    for stale in (CACHE, BUILD / "html", BUILD / ".doctrees"):
        shutil.rmtree(stale, ignore_errors=True)
    TIMES_FILE.unlink(missing_ok=True)
    KEY_FILE.parent.mkdir(parents=True, exist_ok=True)
    KEY_FILE.write_text(key)
    return True


def _forget_before_reading(app, config):
    forget_stale_outputs()


# ---- nbdev directives -----------------------------------------------------------------------------------


def strip_directives(app, doctree):
    for cell in list(doctree.findall(lambda n: isinstance(n, nodes.container) and n.get("nb_element") == "cell_code")):
        blocks = list(cell.findall(nodes.literal_block))
        if not blocks or cell.children[0].get("nb_element") != "cell_code_source":
            continue
        lines = blocks[0].astext().splitlines()
        if lines and lines[0].startswith(("#| hide", "#| default_exp")):
            cell.parent.remove(cell)
            continue
        kept = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
        block = blocks[0]
        block.rawsource = kept
        block.children = [nodes.Text(kept)]
        block.children[0].parent = block


# ---- the card at the head of a chapter ------------------------------------------------------------------


def map_svg(lit: str) -> str:
    """The path of the book as small boxes, the current part filled."""
    width, height, gap = 86, 34, 10
    per_row = 4
    shapes = []
    names = list(PARTS.items())
    for i, (key, label) in enumerate(names):
        row, column = divmod(i, per_row)
        x, y = column * (width + gap) + 2, row * (height + gap) + 2
        on = key == lit
        if column:
            shapes.append(f'<path class="map-arrow" d="M{x - gap} {y + height / 2}h{gap}"/>')
        shapes.append(f'<rect class="map-box{" lit" if on else ""}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>')
        words = label.replace("-", "- ").split(" ") if len(label) > 12 else [label]
        if len(words) > 2:
            words = [" ".join(words[:-1]).replace("- ", "-"), words[-1]]
        for j, word in enumerate(words):
            dy = height / 2 + 4 + (j - (len(words) - 1) / 2) * 12
            shapes.append(f'<text class="map-text{" lit" if on else ""}" x="{x + width / 2}" y="{y + dy}">{html.escape(word)}</text>')
    rows = -(-len(names) // per_row)
    w, h = per_row * (width + gap) - gap + 4, rows * (height + gap) - gap + 4
    return (
        f'<svg class="chapter-map" viewBox="0 0 {w} {h}" role="img" '
        f'aria-label="Map of the book; this chapter belongs to “{html.escape(PARTS.get(lit, lit))}”">{"".join(shapes)}</svg>'
    )


def measured_seconds() -> dict[str, float]:
    return json.loads(TIMES_FILE.read_text()) if TIMES_FILE.exists() else {}


def _link(app, here: str, target: str, text: str) -> str:
    try:
        return f'<a href="{app.builder.get_relative_uri(here, target)}">{html.escape(text)}</a>'
    except Exception:  # a builder without pages, such as the one for plain text
        return html.escape(text)


def chapter_card(app, docname: str, chapter: dict) -> str:
    titles = {name: data["title"] for name, data in chapters_in_toc()}
    needs = []
    for need in chapter["needs"]:
        if f"nbs/{need}" not in titles:
            raise ValueError(f"{docname}: the prerequisite {need!r} in its front matter is no chapter of _toc.yml")
        needs.append(_link(app, docname, f"nbs/{need}", titles[f"nbs/{need}"]))
    seconds = measured_seconds().get(docname)
    ran = f" (measured: {seconds:.0f} s)" if seconds is not None else ""
    facts = [("You build", html.escape(chapter["build"])), ("You need", ", ".join(needs) or "Python; nothing else")]
    facts.append(("Time", f"{chapter['minutes']} min to read and do, {chapter['seconds']} s to run on one CPU core{ran}"))
    if chapter.get("module"):
        module = f"speechlearn.{chapter['module']}"
        uri = app.builder.get_relative_uri(docname, "nbs/back/api") + f"#module-{module}"
        facts.append(("Module", f'<a href="{uri}"><code>{module}</code></a>'))
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    key = docname.removeprefix("nbs/")
    return (
        f'<div class="chapter-card"><div class="chapter-facts"><dl>{rows}</dl>'
        f'<label class="chapter-done"><input type="checkbox" class="chapter-tick" data-chapter="{key}"> '
        f"I have worked through this chapter (your browser remembers)</label></div>{map_svg(chapter['part'])}</div>"
    )


def add_chapter_card(app, doctree):
    docname = app.env.docname
    path = ROOT / f"{docname}.ipynb"
    if app.builder.format != "html" or not path.exists() or not (chapter := chapter_of(path)) or chapter.get("card") is False:
        return
    for section in doctree.findall(nodes.section):
        title_at = next(i for i, child in enumerate(section.children) if isinstance(child, nodes.title))
        section.insert(title_at + 1, nodes.raw("", chapter_card(app, docname, chapter), format="html"))
        return


# ---- boxes and the indexes made from them ---------------------------------------------------------------


class _Box(SphinxDirective):
    has_content = True
    required_arguments = 0
    optional_arguments = 1
    final_argument_whitespace = True
    option_spec = {"class": directives.class_option}
    kind = ""

    def title_text(self) -> str:
        raise NotImplementedError

    def run(self):
        title = self.title_text()
        identifier = f"{self.kind}-{nodes.make_id(title)}"
        box = nodes.admonition(classes=[self.kind], ids=[identifier])
        parsed, messages = self.state.inline_text(title, self.lineno)
        box += nodes.title(title, "", *parsed)
        self.state.nested_parse(self.content, self.content_offset, box)
        self.remember(title, identifier)
        return [box, *messages]

    def remember(self, title, identifier):
        boxes = self.env.__dict__.setdefault("speechlearn_boxes", {}).setdefault(self.env.docname, [])
        boxes.append((self.kind, self.arguments[0] if self.arguments else "", title, identifier))


class Misconception(_Box):
    kind = "misconception"
    required_arguments, optional_arguments = 1, 0

    def title_text(self):
        return f"Misconception: {self.arguments[0]}"


class Question(_Box):
    kind = "question"
    required_arguments, optional_arguments = 1, 0

    def title_text(self):
        number = int(self.arguments[0])
        if number not in QUESTIONS:
            raise self.error(f"there is no question {number}; they run from 1 to {max(QUESTIONS)}")
        return f"Question {number}: {QUESTIONS[number]}"


class Versions(_Box):
    kind = "versions"

    def title_text(self):
        return self.arguments[0] if self.arguments else "Paper says, reference does, here"

    def remember(self, title, identifier):
        pass


class index_marker(nodes.General, nodes.Element):
    """Stands for an index until all pages have been read."""


class _Marker(SphinxDirective):
    """An index of the whole book, or of the chapters in one folder of `nbs`."""

    kind = ""
    optional_arguments = 1

    def run(self):
        return [index_marker(kind=self.kind, folder=self.arguments[0] if self.arguments else "")]


def _marker(kind_name):
    return type(f"Marker_{kind_name}", (_Marker,), {"kind": kind_name})


def _reference(app, here, docname, identifier, text):
    uri = app.builder.get_relative_uri(here, docname) + (f"#{identifier}" if identifier else "")
    return nodes.reference("", text, internal=True, refuri=uri)


def _table(headings, rows, widths):
    table = nodes.table(classes=["colwidths-given"])
    group = nodes.tgroup(cols=len(headings))
    table += group
    for width in widths:
        group += nodes.colspec(colwidth=width)

    def make(cells):
        row = nodes.row()
        for cell in cells:
            entry = nodes.entry()
            paragraph = nodes.paragraph()
            paragraph += cell if isinstance(cell, nodes.Node) else nodes.Text(str(cell))
            entry += paragraph
            row += entry
        return row

    head, body = nodes.thead(), nodes.tbody()
    head += make(headings)
    for row in rows:
        body += make(row)
    group += head
    group += body
    return table


def _index_nodes(app, kind, here, folder=""):
    boxes = getattr(app.env, "speechlearn_boxes", {})
    in_order = [name for name, _ in chapters_in_toc() if name.startswith(f"nbs/{folder}")]
    titles = {name: data["title"] for name, data in chapters_in_toc()}
    if kind == "misconceptions":
        rows = []
        for docname in in_order:
            for box, argument, _, identifier in boxes.get(docname, []):
                if box == "misconception":
                    rows.append([_reference(app, here, docname, identifier, argument), titles[docname]])
        return [_table(["What people believe", "Shown failing in"], rows, [70, 30])] if rows else []
    if kind == "questions":
        where = {}
        for docname in in_order:
            for box, argument, _, identifier in boxes.get(docname, []):
                if box == "question":
                    where.setdefault(int(argument), (docname, identifier))
        rows = []
        for number, text in QUESTIONS.items():
            if number in where:
                docname, identifier = where[number]
                rows.append([number, _reference(app, here, docname, identifier, text), titles[docname]])
            else:
                rows.append([number, text, "in a part that is still being written"])
        return [_table(["", "Question", "Answered in"], rows, [6, 64, 30])]
    if kind == "chapter-times":
        seconds = measured_seconds()
        rows = []
        for docname, data in chapters_in_toc():
            ran = seconds.get(docname)
            rows.append([_reference(app, here, docname, "", data["title"]), data["minutes"], data["seconds"], f"{ran:.1f}" if ran else "not run"])
        return [_table(["Chapter", "Minutes to read", "Seconds stated", "Seconds measured"], rows, [46, 18, 18, 18])]
    if kind == "modules":
        rows = []
        for docname, data in chapters_in_toc():
            if data.get("module"):
                module = f"speechlearn.{data['module']}"
                rows.append([_reference(app, here, docname, "", data["title"]), _reference(app, here, "nbs/back/api", f"module-{module}", module)])
        return [_table(["Chapter", "Module"], rows, [50, 50])]
    raise ValueError(kind)


def fill_indexes(app, doctree, docname):
    for marker in list(doctree.findall(index_marker)):
        marker.replace_self(_index_nodes(app, marker["kind"], docname, marker["folder"]))


def _forget_boxes(app, env, docname):
    getattr(env, "speechlearn_boxes", {}).pop(docname, None)


def _merge_boxes(app, env, docnames, other):
    env.__dict__.setdefault("speechlearn_boxes", {}).update(getattr(other, "speechlearn_boxes", {}))


def _indexes_follow_chapters(app, env):
    # The index pages show what other pages hold, so they are written again at every build.
    return [name for name in ("nbs/back/misconceptions", "nbs/back/questions", "nbs/back/times", "nbs/back/api", "nbs/zipformer/23b_measured") if name in env.all_docs]


# ---- docstrings on the API page -------------------------------------------------------------------------


def docstring_as_rst(app, what, name, obj, options, lines):
    """House docstrings use `$…$` for mathematics and end with `Chapter: part/name`; both become RST here."""
    import re

    for i, line in enumerate(lines):
        line = re.sub(r"(?<![\\$])\$([^$]+)\$(?!\$)", r":math:`\1`", line)
        match = re.search(r"Chapter: ([\w/]+?)\.?$", line)
        if match:
            target = match.group(1)
            if (ROOT / "nbs" / f"{target}.ipynb").exists():
                line = line.replace(match.group(0), f"Chapter: :doc:`/nbs/{target}`.")
        lines[i] = line


def readable_signature(app, what, name, obj, options, signature, return_annotation):
    """Show shape annotations as they stand in the source, not as the repr of jaxtyping's classes."""
    import ast
    import inspect
    import textwrap

    target = obj.__init__ if inspect.isclass(obj) else obj
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(target)))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    arguments = tree.args
    if what in ("method", "class", "exception") and (arguments.posonlyargs + arguments.args):
        first = (arguments.posonlyargs + arguments.args)[0].arg
        if first in ("self", "cls"):
            (arguments.posonlyargs or arguments.args).pop(0)
    returns = ast.unparse(tree.returns) if tree.returns is not None and what not in ("class", "exception") else None
    return f"({ast.unparse(arguments)})", returns


def without_thebe(app, pagename, templatename, context, doctree):
    """The theme's live-code add-on, which this book does not use, declares its constants twice: a script error on every page."""

    def is_thebe(script) -> bool:
        return "thebe" in f"{getattr(script, 'filename', '')} {getattr(script, 'attributes', {}).get('body', '')}".lower()

    context["script_files"] = [script for script in context.get("script_files", []) if not is_thebe(script)]


def setup(app):
    app.connect("config-inited", _forget_before_reading, priority=100)
    app.connect("doctree-read", strip_directives)
    app.connect("doctree-read", add_chapter_card)
    app.connect("doctree-resolved", fill_indexes)
    app.connect("html-page-context", without_thebe, priority=900)
    app.connect("env-purge-doc", _forget_boxes)
    app.connect("env-merge-info", _merge_boxes)
    app.connect("env-updated", _indexes_follow_chapters)
    app.connect("autodoc-process-docstring", docstring_as_rst, priority=400)
    app.connect("autodoc-process-signature", readable_signature)
    app.add_node(index_marker)
    app.add_directive("misconception", Misconception)
    app.add_directive("question", Question)
    app.add_directive("versions", Versions)
    for kind in ("misconceptions", "questions", "chapter-times", "modules"):
        app.add_directive(f"{kind}-index" if kind != "chapter-times" else kind, _marker(kind))
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
