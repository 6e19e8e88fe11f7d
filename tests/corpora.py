"""Real text that every machine has: a few modules of the Python standard library."""

import argparse
import ast
import calendar
import csv
import inspect
import json.decoder
import shutil
import textwrap
from pathlib import Path

MODULES = (argparse, ast, calendar, csv, json.decoder, textwrap)


def write_corpus(folder: Path) -> Path:
    """Copy the modules' source into `folder`, one document each."""
    folder.mkdir(parents=True, exist_ok=True)
    for module in MODULES:
        source = inspect.getsourcefile(module)
        assert source is not None
        shutil.copy(source, folder / f"{module.__name__}.py")
    return folder
