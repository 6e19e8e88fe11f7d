"""What `parscale merge-first` does: load a model, merge its first stream's LoRA, write it whole."""

from pathlib import Path

from parscale.load import load_model, load_tokenizer
from parscale.streams.merge_first import merge_first
from parscale.utils.files import new_folder


def merge_folder(name: str | Path, out: str | Path) -> Path:
    """`merge_first` on a saved model: what `parscale merge-first` does. Model and tokenizer are written, in the
    checkpoint's dtype, or nothing is.

    Args:
        name: a folder or hub name of a model with a LoRA for each stream, or of its adapters: their base is then in
            what is written.
        out: folder to write; it must not hold anything yet.

    Returns:
        `out`.

    Raises:
        InputError: as `merge_first`; a model that cannot be loaded; an `out` that holds something.
    """
    out = Path(out)
    with new_folder(out) as folder:
        model, tokenizer = load_model(name, dtype="auto"), load_tokenizer(name)
        merge_first(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out
