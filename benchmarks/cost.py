"""The costs of `parscale cost --measure` for own and for shared keys and values, kept with what they were measured on.

python benchmarks/cost.py                       # the 0.5B shape, 4 of its layers
python benchmarks/cost.py --layers 1 --out 2    # to try it
"""

import argparse

from record import write

from parscale.cost.measure import measure_table
from parscale.cost.model import KV, Workload


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="0.5B")
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--in", dest="input", type=int, default=64)
    arguments.add_argument("--out", type=int, default=8)
    arguments.add_argument("--dtype", default="bf16")
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    rows = []
    for kv in KV:
        work = Workload(input=options.input, output=options.out, dtype=options.dtype, kv=kv, accounting="counted")
        measured = measure_table(
            options.model, options.streams, options.batch, work, repeats=options.repeats, layers=options.layers
        )
        rows += [{"kv": kv} | row for row in measured]
    print(write("cost", vars(options), rows))


if __name__ == "__main__":
    main()
