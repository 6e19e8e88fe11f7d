"""Real text that every machine has: a few modules of the Python standard library."""

import inspect
import shutil
from pathlib import Path

import argparse
import ast
import calendar
import csv
import json.decoder
import textwrap

MODULES = (argparse, ast, calendar, csv, json.decoder, textwrap)


def write_corpus(folder: Path) -> Path:
    """Copy the modules' source into `folder`, one document each."""
    folder.mkdir(parents=True, exist_ok=True)
    for module in MODULES:
        source = inspect.getsourcefile(module)
        assert source is not None
        shutil.copy(source, folder / f"{module.__name__}.py")
    return folder
