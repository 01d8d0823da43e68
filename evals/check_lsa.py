"""Identities of two-level decoding on the device at hand: `python -m evals.check_lsa`.

Those of `lsa_jax.checks.identities`, on one device, which any runs in a minute, or on a mesh. Exit
code 1 where something does not hold.
"""

import argparse
import sys
from typing import get_args

import jax

from lsa_jax import shardings
from lsa_jax.checks.identities import identities
from lsa_jax.lsa.config import ResidentPath


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=1, help="spread over so many (tensor axis)")
    others = [path for path in get_args(ResidentPath) if path != "mask"]
    parser.add_argument(
        "--paths", nargs="+", choices=others, default=others, help="beside mask (default: all)"
    )
    args = parser.parse_args(argv)
    mesh = shardings.make_mesh(1, 1, args.devices) if args.devices > 1 else None
    device = jax.devices()[0]
    print(f"{args.devices} x {device.device_kind}, JAX {jax.__version__}", flush=True)
    good = True
    for said, holds in identities(mesh, args.paths):
        print(f"{'ok  ' if holds else 'FAIL'} {said}", flush=True)
        good &= holds
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
