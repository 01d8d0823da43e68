"""The notebooks: `notebooks/*.md` (MyST) are the source, `*.ipynb` are made from them.

python .ci/notebooks.py write      makes every notebook, without outputs
python .ci/notebooks.py run DIR    executes every notebook in a new folder of its own below DIR, and
                                   fails on errors and on every warning that a user would see
"""

import copy
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
LIMIT = 900  # seconds of one cell; what a machine with two cores should take is in the notebook
_WARNING = re.compile(r"warning|deprecat|traceback|^[WEF]\d{4} ", re.IGNORECASE | re.MULTILINE)


def sources() -> list[Path]:
    """The notebooks' sources, in their order."""
    return sorted(FOLDER.glob("*.md"))


def make(source: Path) -> NotebookNode:
    """The notebook that a source says, the same each time."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell["metadata"] = {}
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "colab": {"provenance": []},
    }
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    nbformat.validate(notebook)
    return notebook


def text_of(notebook: NotebookNode) -> str:
    """A notebook as its file has it."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def write() -> None:
    """Makes every notebook from its source."""
    for source in sources():
        source.with_suffix(".ipynb").write_text(text_of(make(source)), "utf-8")


def texts(cell: NotebookNode) -> Iterator[str]:
    """What a user reads below a cell."""
    for output in cell.get("outputs", ()):
        if output.output_type == "stream":
            yield output.text
        elif output.output_type == "error":
            yield "\n".join(output.traceback)
        else:
            yield str(output.get("data", {}).get("text/plain", ""))


def faults(notebook: NotebookNode) -> list[str]:
    """What a user should not see, with its cell: lines that warn, pictures that are not shown."""
    found = []
    for cell in notebook.cells:
        for line in "".join(texts(cell)).splitlines():
            if _WARNING.search(line):
                found.append(f"{cell['id']}: {line}")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if data.get("text/plain", "").startswith("<Figure") and "image/png" not in data:
                found.append(f"{cell['id']}: a figure without its picture")
    return found


def run(source: Path, directory: Path) -> None:
    """Executes one notebook in a new folder and keeps it there with its outputs.

    Raises nbclient's error where a cell fails, RuntimeError where a cell has faults.
    """
    folder = directory / source.stem
    folder.mkdir(parents=True)
    notebook, began = copy.deepcopy(make(source)), time.monotonic()
    client = NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute()
    finally:
        nbformat.write(notebook, folder / f"{source.stem}.ipynb")
    for cell in notebook.cells:
        print("".join(texts(cell)), end="")
    print(f"--- {source.stem}: {time.monotonic() - began:.0f} s", flush=True)
    if found := faults(notebook):
        lines = "\n  ".join(found)
        raise RuntimeError(f"{source.stem} must show no warning, got {len(found)}:\n  {lines}")


def main(argv: list[str]) -> None:
    """Command line."""
    match argv:
        case ["write"]:
            write()
        case ["run", directory]:
            for source in sources():
                run(source, Path(directory))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
