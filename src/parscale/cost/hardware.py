"""The machines that costs are derived for: peak arithmetic, bandwidth and memory, from the makers' data sheets."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from parscale.errors import InputError


@dataclass(frozen=True)
class Hardware:
    """A machine. `flops`: peak of dense 16-bit matrix products, FLOP/s. `flops32`: of float32. `bandwidth`: of its
    memory, bytes/s. `memory`: bytes."""

    name: str
    flops: float
    flops32: float
    bandwidth: float
    memory: float

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if field != "name" and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise InputError(f"hardware {self.name!r}: {field} is {value!r}, a positive number is needed")


# "cpu" is a desktop with 8 cores of AVX-512 at 4 GHz and two channels of DDR5-5200. Yours differs: `parscale cost
# --measure --json` reports the floors of the machine at hand, which a hardware file can state.
HARDWARE = {
    machine.name: machine
    for machine in (
        Hardware("a100-80g", 312e12, 19.5e12, 2039e9, 80e9),
        Hardware("h100", 989e12, 67e12, 3350e9, 80e9),
        Hardware("h200", 989e12, 67e12, 4800e9, 141e9),
        Hardware("rtx4090", 165e12, 82.6e12, 1008e9, 24e9),
        Hardware("l4", 121e12, 30.3e12, 300e9, 24e9),
        Hardware("m3-max", 14.2e12, 14.2e12, 400e9, 64e9),
        Hardware("cpu", 1.0e12, 1.0e12, 83.2e9, 32e9),
    )
}


def hardware_of(name: str | Path | Hardware) -> Hardware:
    """A machine by name, or from a JSON file with the keys flops, bandwidth, memory and, optionally, flops32, name."""
    if isinstance(name, Hardware):
        return name
    if str(name) in HARDWARE:
        return HARDWARE[str(name)]
    path = Path(name)
    if not path.is_file():
        raise InputError(
            f"hardware {str(name)!r} is not known: choose one of {', '.join(HARDWARE)}, or give a JSON file"
        )
    return _read(path)


def _read(path: Path) -> Hardware:
    needed = ("flops", "bandwidth", "memory")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"hardware file {str(path)!r} is not JSON: {error}") from None
    missing = [key for key in needed if not isinstance(given, dict) or key not in given]
    if missing:
        raise InputError(
            f"hardware file {str(path)!r} lacks {missing[0]!r}: it needs {', '.join(needed)} (FLOP/s, bytes)"
        )
    return Hardware(
        given.get("name", path.stem), flops32=given.get("flops32", given["flops"]), **{k: given[k] for k in needed}
    )
