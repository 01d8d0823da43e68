"""README.md says what is there: its layout, its links, its commands. `.ci/run` executes them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text("utf-8")
PACKAGES = ("lsa_jax", "pallas_kernels", "infer", "train", "evals")
OPERATIONS = sorted(file.parent.name for file in ROOT.glob("pallas_kernels/*/reference.py"))
FOLDERS_AS_ONE_LINE = tuple(f"pallas_kernels/{name}/" for name in OPERATIONS)


def layout() -> Iterator[str]:
    """Paths of the Layout section's tree: two spaces a level, folders end with a slash."""
    (tree,) = re.findall(r"^## Layout\n\n```text\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    parents: list[str] = []
    for line in tree.splitlines():
        match = re.fullmatch(r"((?:  )*)(\S+) +\S.*", line)
        assert match, f"no path and description: {line!r}"
        depth = len(match[1]) // 2
        parents[depth:] = [match[2]]
        yield "".join(parents)


def test_every_path_of_the_layout_exists() -> None:
    missing = [path for path in layout() if not (ROOT / path).exists()]
    assert missing == []
    assert all((ROOT / path).is_dir() == path.endswith("/") for path in layout())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_in_the_layout(package: str) -> None:
    modules = (ROOT / package).rglob("*.py")
    paths = {p.relative_to(ROOT).as_posix() for p in modules if p.name != "__init__.py"}
    unnamed = paths - set(layout())
    assert {p for p in unnamed if not p.startswith(FOLDERS_AS_ONE_LINE)} == set()
    assert len(OPERATIONS) > 3 and set(FOLDERS_AS_ONE_LINE) <= set(layout())


def test_every_folder_of_code_is_in_the_layout() -> None:
    folders = {path.parent.name + "/" for path in ROOT.glob("[!.]*/*.py")} - {"build/", "dist/"}
    named = {path for path in layout() if path.endswith("/") and path.count("/") == 1}
    assert named == folders | {".ci/", "docs/", "notebooks/"}


def test_the_readme_names_two_commands() -> None:
    commands = re.findall(r"<!-- command: (\w+) -->\n```bash\n(.*)\n```", README)
    assert [name for name, _ in commands] == ["run", "test"]
    assert all(text.startswith("pip install ") and " && " in text for _, text in commands)


def test_every_preset_is_named() -> None:
    assert all(f"`{path.stem}`" in README for path in (ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_and_named_tests_exist(document: Path) -> None:
    text = document.read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    named = re.findall(r"`(?:tests/)?(test_\w+\.py)`", text)
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []
