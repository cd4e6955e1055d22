"""Run the notebooks of this folder and keep their outputs, without what differs from machine to machine.

`python notebooks/write.py` runs all of them, `python notebooks/write.py 02 04` those whose names begin so.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

FOLDER = Path(__file__).resolve().parent

for path in sorted(FOLDER.glob("*.ipynb")):
    if sys.argv[1:] and not path.name.startswith(tuple(sys.argv[1:])):
        continue
    notebook = nbformat.read(path, as_version=4)
    run = ExecutePreprocessor(timeout=120, coalesce_streams=True)
    run.preprocess(notebook, {"metadata": {"path": str(FOLDER)}})
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
    nbformat.write(notebook, path)
    print(path.name)
