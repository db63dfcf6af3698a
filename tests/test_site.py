"""The documentation site: generated tables, links, and the messages that it quotes.

That it builds without a warning is a step of `.ci/run`.
"""

import ast
import re
from pathlib import Path

import config_keys
import pytest
import site_pages

from configs import base
from solov2_jax.config import apply_overrides, flatten, load_config

ROOT = Path(__file__).resolve().parent.parent
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
GAP = "…"


def test_every_key_is_described_once():
    keys = [key for section in config_keys.base_sections() for key in section.keys]
    values = flatten(base.get_config())
    assert sorted(key.name for key in keys) == sorted(values)
    assert {key.name: key.value for key in keys} == values
    assert not [key.name for key in keys if not key.text]
    text = config_keys.tables()
    for name in values:
        assert text.count(f"| `{name}`{{ #{name} }} |") == 1, name


def test_comments_are_read_as_they_stand():
    source = '''
"""A config."""


def get_config():
    config = ConfigDict()
    # Above, in two
    # lines [A.B_C].
    config.one = 1
    config.part = part = ConfigDict()
    part.two = "#"  # beside it, with a * and `code_*` [..D]
    # All of the part below.
    part.inner = ConfigDict()
    part.inner.three = (
        0.5,
    )
    return config
'''
    values = {"one": 1, "part.two": "#", "part.inner.three": (0.5,)}
    top, part, inner = config_keys.sections(source, values)
    (one,), (two,), (three,) = top.keys, part.keys, inner.keys
    assert (one.text, one.reference) == ("Above, in two lines.", "A.B_C")
    assert (two.text, two.reference) == ("Beside it, with a * and `code_*`.", "A.D")
    assert (inner.text, three.text) == ("All of the part below.", "")
    assert config_keys.escape(two.text) == r"Beside it, with a \* and `code_*`."


def test_the_table_shows_each_keys_range_and_when_it_is_used():
    text = config_keys.tables()
    assert "| a number, above 0, at most 10 | Factor at each milestone" in text
    assert "Used where `optim.schedule` is `'multistep'` or `'fixed_gamma'`." in text
    assert "Used where `augment.jitter_scale` is not `()`." in text


def test_the_shipped_variants_are_listed():
    text = config_keys.variants()
    names = {p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__", "base"}
    assert set(re.findall(r"^### `(\w+)`", text, flags=re.M)) == names
    key = "[`model.backbone.depth`](#model.backbone.depth)"
    assert f"| {key} | `101`{{ .short }} | `50`{{ .short }} |" in text


@pytest.mark.parametrize(
    "page, link, expected",
    [
        ("data.md", "training.md#resuming", "training.md#resuming"),
        ("data.md", "#classes", "#classes"),
        ("data.md", "report.jpg", "report.jpg"),
        ("data.md", "../benchmarks/README.md#a", "benchmarks.md#a"),
        ("data.md", "../README.md", "index.md"),
        ("contributing.md", "docs/data.md", "data.md"),
        ("benchmarks.md", "../docs/data.md", "data.md"),
        ("data.md", "../notebooks/predict.ipynb#a", "notebooks/predict.md#a"),
        ("notebooks/predict.md", "train_on_your_data.ipynb", "train_on_your_data.md"),
        ("notebooks/predict.md", "../docs/data.md", "../data.md"),
        ("data.md", "../setup.py", "../setup.py"),  # the build says that it is missing
    ],
)
def test_links_lead_to_pages(page, link, expected):
    assert site_pages.target(link, page) == expected
    converted = site_pages.convert(f"see [it]({link}), `x`", page)
    assert converted == f"see [it]({expected}), `x`"


def test_drawings_become_part_of_the_page():
    page = site_pages.convert('![A "b" way](architecture.svg)', "architecture.md")
    assert page.startswith('<div>\n<svg role="img" aria-label=\'A "b" way\' xmlns')
    assert page.endswith("</svg>\n</div>") and "\n\n" not in page


def test_notebooks_are_pages():
    cells = [
        {"cell_type": "code", "source": ["a = 1\n", "b = 2"]},
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
    ]
    page = site_pages.notebook_page({"cells": cells}, "x.ipynb")
    assert page.startswith("# Title\ntext\n\nThe notebook: <a href")
    assert page.endswith("```python\na = 1\nb = 2\n```")
    shown = {source for source in site_pages.OUTSIDE if source.endswith(".ipynb")}
    assert shown == {f"notebooks/{p.name}" for p in ROOT.glob("notebooks/*.ipynb")}


def test_the_written_pages_are_plain_markdown(tmp_path):
    site_pages.write_pages(tmp_path / "pages")
    pages = {p.relative_to(tmp_path / "pages").as_posix() for p in tmp_path.rglob("*.md")}
    assert {"index.md", "benchmarks.md", "changelog.md", "notebooks/predict.md"} <= pages
    text = (tmp_path / "pages" / "configuration.md").read_text("utf-8")
    assert "| `train.steps`{ #train.steps } |" in text and "<!-- every key" not in text
    assert (tmp_path / "pages" / "notebooks" / "predict.ipynb").is_file()
    assert not list(tmp_path.rglob("*.py"))


def test_a_finished_page_that_loads_from_elsewhere_is_an_error(tmp_path, capsys):
    (tmp_path / "a.html").write_text("<p>1 / 2</p>")
    assert site_pages.finish(tmp_path) == 0
    (tmp_path / "b.html").write_text('<script src="https://x.org/a.js"></script>')
    assert site_pages.finish(tmp_path) == 1
    assert "b.html loads from elsewhere" in capsys.readouterr().err


def test_long_names_may_break():
    assert site_pages.breakable("a" * 40) == f"{'a' * 16}<wbr>{'a' * 16}<wbr>{'a' * 8}"
    assert site_pages.breakable("data/train/a.json") == "data/<wbr>train/<wbr>a.json"
    html = f"<td><code id='k'>{'b' * 41}</code></td><code>short</code>"
    broken = site_pages.breakable_html(html)
    assert site_pages.breakable_html("<td>9 / 10</td>") == "<td>9&nbsp;/&nbsp;10</td>"
    assert broken.count("<wbr>") == 2 and broken.replace("<wbr>", "") == html


def test_what_loads_from_elsewhere_is_found():
    found = site_pages.LOADS.search
    assert found('<script defer src="https://x.org/a.js">')
    assert found('<link rel="stylesheet" href="//x.org/a.css">')
    assert not found('<script src="a.js"></script><a href="https://x.org">x</a>')


def sources() -> list[str]:
    """Returns every text of the programs, with a gap where values are put in."""
    texts = []
    for path in [*(ROOT / "solov2_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        module = ast.parse(path.read_text("utf-8"))
        constants = {
            target.id: node.value
            for node in module.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        for node in ast.walk(module):
            if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant):
                texts.append(text_of(node, constants))
    return texts


def text_of(node: ast.AST, constants: dict[str, ast.Constant]) -> str:
    """Returns the text of an expression; what its module does not say is a gap.

    Args:
      constants: the module's texts that have a name.
    """
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, constants) + text_of(node.right, constants)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        named = constants.get(node.value.id)
        return text_of(named, constants) if named else GAP
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = re.sub(r"%[-+0-9.]*[a-z]", GAP, node.value.replace("%%", "\0"))
        return text.replace("\0", "%")
    return GAP


def is_said(message: str, texts: list[str]) -> bool:
    """Returns whether a text has the message's pieces, in their order."""
    pattern = ".*".join(re.escape(piece.strip()) for piece in message.split(GAP))
    return any(re.search(pattern, text, flags=re.S) for text in texts)


def test_the_quoted_messages_are_the_programs():
    blocks = re.findall(r"^```text\n(.*?)^```", TROUBLE, flags=re.M | re.S)
    messages = [line for block in blocks for line in block.splitlines() if line]
    texts = sources()
    assert len(messages) > 80
    wrong = [message for message in messages if not is_said(message, texts)]
    assert not wrong, wrong
    assert not is_said("step … is skipped: nothing", texts)


def test_the_quoted_error_of_a_key():
    (key,) = re.findall(r"--config\.(\S+)=", re.search(r"^\$ .*", TROUBLE, re.M)[0])
    with pytest.raises(ValueError) as raised:
        apply_overrides(base.get_config(), [f"--config.{key}=0.005"])
    assert f"error: {raised.value}\n" in TROUBLE


def test_the_example_of_a_configuration_is_one(tmp_path):
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    path = tmp_path / "mine.py"
    path.write_text(code)
    assert load_config(str(path)).data.val.images == "photos"
